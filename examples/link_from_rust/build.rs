fn main() {
    moec::build("../numerals").name("numerals").compile();
}
