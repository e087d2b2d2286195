//! A Rust program with a model in it: `link_from_rust PROMPT...` spells numbers.

use moec_runtime::{Model, Options, Sampling, Session};

moec_runtime::include_model!(numerals);

fn main() -> moec_runtime::Result<()> {
    let model = Model::open(numerals::descriptor()?, &Options::weights(numerals::WEIGHTS))?;
    let tokenizer = model.tokenizer()?;
    for prompt in std::env::args().skip(1) {
        let mut session = Session::new(&model);
        let mut text = tokenizer.stream();
        for token in session.generate(&tokenizer.encode(&prompt, true)?, Sampling::default())?.take(64) {
            print!("{}", text.push(token?)?);
        }
        println!("{}", text.finish()?);
    }
    Ok(())
}
