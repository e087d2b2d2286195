//! What `moec build --emit object|staticlib|cdylib` writes, linked into programs: the examples, a program with two models, one that misuses the API.
//!
//! Cross compilers, an emulator, valgrind and Python are used where they are installed; with `CI` set they must be.

use object::read::{File, Object, ObjectSection, ObjectSymbol};
use object::{Architecture, BinaryFormat};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

const C: &[&str] = &["-std=c11", "-pedantic", "-Wall", "-Wextra", "-Werror", "-O1", "-g"];
const CPP: &[&str] = &["-x", "c++", "-pedantic", "-Wall", "-Wextra", "-Werror", "-O1"];
const SPELLED: &str = "mille neuf cent quatre-vingt-sept\neinundzwanzig\nforty-two\n";
/// The least x86-64 level, which valgrind knows.
const LEAST: &[&str] = &["--target-cpu", "x86-64-v3"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_path_buf()
}

fn example(name: &str) -> PathBuf {
    root().join("examples").join(name)
}

fn numerals() -> PathBuf {
    example("numerals")
}

/// Whether a program is there; in CI it must be.
fn installed(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok_and(|done| done.status.success());
    assert!(found || std::env::var_os("CI").is_none(), "CI needs {program}: .ci/run installs it");
    if !found {
        eprintln!("without {program} this is not tested");
    }
    found
}

/// Runs a command that must succeed; returns what it prints.
fn run(command: &mut Command) -> String {
    let done = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{command:?}: {}\n{said}", done.status);
    String::from_utf8(done.stdout).expect("text")
}

fn moec(arguments: &[&OsStr]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moec"));
    command.args(arguments);
    command
}

/// Builds `model` as `kind` into `directory`.
fn build(model: &Path, kind: &str, name: &str, directory: &Path, more: &[&str]) {
    let mut command = moec(&["build".as_ref(), model.as_ref(), "-o".as_ref(), directory.as_ref()]);
    run(command.args(["--emit", kind, "--name", name]).args(more));
}

/// Compiles `source` with the headers in `directory`, and links it with `libraries`.
fn compile(cc: &str, flags: &[&str], source: &Path, directory: &Path, libraries: &[&str]) -> PathBuf {
    let stem = source.file_stem().expect("a file").to_str().expect("a plain name");
    let (object, program) = (directory.join(format!("{stem}.user.o")), directory.join(stem));
    run(Command::new(cc).args(flags).arg("-I").arg(directory).arg("-c").arg(source).arg("-o").arg(&object));
    run(Command::new(cc).arg(&object).arg("-L").arg(directory).args(libraries).arg("-o").arg(&program));
    program
}

const RUNTIME: &[&str] = &["-lnumerals", "-lother", "-lm", "-lpthread", "-ldl"];

/// Libraries of the numerals model and of one with a sliding window, as `numerals` and `other`.
fn two_libraries(more: &[&str]) -> TempDir {
    let directory = TempDir::new().expect("a temporary directory");
    build(&numerals(), "staticlib", "numerals", directory.path(), more);
    build(&root().join("tests/data/models/mixtral-d"), "staticlib", "other", directory.path(), more);
    directory
}

fn source(name: &str) -> PathBuf {
    root().join("compiler/tests/link").join(name)
}

#[test]
fn objects_of_all_formats_need_nothing() {
    let formats = [
        ("x86_64-unknown-linux-gnu", "x86-64-v3", BinaryFormat::Elf, Architecture::X86_64),
        ("x86_64-unknown-linux-gnu", "znver5,x86-64-v3", BinaryFormat::Elf, Architecture::X86_64),
        ("aarch64-unknown-linux-gnu", "neoverse-v1,armv8-a", BinaryFormat::Elf, Architecture::Aarch64),
        ("x86_64-apple-darwin", "x86-64-v3", BinaryFormat::MachO, Architecture::X86_64),
        ("aarch64-apple-darwin", "apple-m1", BinaryFormat::MachO, Architecture::Aarch64),
        ("x86_64-pc-windows-msvc", "x86-64-v3", BinaryFormat::Coff, Architecture::X86_64),
        ("aarch64-pc-windows-msvc", "armv8-a", BinaryFormat::Coff, Architecture::Aarch64),
    ];
    let mut weights = Vec::new();
    for (target, cpu, format, architecture) in formats {
        let directory = TempDir::new().expect("a temporary directory");
        build(&numerals(), "object", "numerals", directory.path(), &["--target", target, "--target-cpu", cpu]);
        let mut files: Vec<_> = std::fs::read_dir(directory.path())
            .expect("it was made")
            .map(|file| file.expect("readable").file_name().into_string().expect("plain"))
            .collect();
        files.sort();
        assert_eq!(files, ["numerals.h", "numerals.o", "numerals.weights"]);
        let bytes = std::fs::read(directory.path().join("numerals.o")).expect("it was written");
        let object = File::parse(&*bytes).unwrap_or_else(|error| panic!("{target}: {error}"));
        assert_eq!((object.format(), object.architecture()), (format, architecture), "{target}");
        let undefined: Vec<_> =
            object.symbols().filter(|s| s.is_undefined() && !s.name().unwrap_or("?").is_empty()).collect();
        assert!(undefined.is_empty(), "{target}: {undefined:?}");
        let global: Vec<_> =
            object.symbols().filter(|s| s.is_global()).map(|s| s.name().expect("text").to_owned()).collect();
        let expected = if format == BinaryFormat::MachO { "_numerals_model" } else { "numerals_model" };
        assert_eq!(global, [expected], "{target}");
        let code: u64 = object.sections().filter(|s| s.kind() == object::SectionKind::Text).map(|s| s.size()).sum();
        assert!(code > 20_000, "{target}: {code} bytes of code");
        if format == BinaryFormat::Elf {
            assert!(object.section_by_name(".note.GNU-stack").is_some(), "{target}: the stack would become executable");
        }
        weights.push(std::fs::read(directory.path().join("numerals.weights")).expect("they were written"));
    }
    assert!(weights.windows(2).all(|pair| pair[0] == pair[1]), "one payload serves every target");
}

/// The new tokens and the hash of the logits, of the program without a runtime.
fn bare(program: &Path, emulator: &[&str], threads: &str) -> String {
    let prompt = std::fs::read_to_string(example("link_bare_c/prompt.ids")).expect("it ships");
    let mut command = match emulator {
        [] => Command::new(program),
        [emulator, more @ ..] => {
            let mut command = Command::new(emulator);
            command.args(more).arg(program);
            command
        }
    };
    let weights = program.with_file_name("numerals.weights");
    run(command.arg(weights).args([threads, "7"]).args(prompt.split_whitespace()))
}

#[test]
fn a_program_without_runtime_has_the_same_bits_everywhere() {
    for quant in ["q8", "q4", "none"] {
        let directory = TempDir::new().expect("a temporary directory");
        let path = directory.path();
        let link = |cc: &str, flags: &[&str], more: &[&str]| {
            build(&numerals(), "object", "numerals", path, &[more, &["--quant", quant]].concat());
            let object = path.join("numerals.o");
            let object = object.to_str().expect("a plain path");
            compile(cc, flags, &example("link_bare_c/main.c"), path, &[object, "-lpthread"])
        };
        let program = link("cc", C, &[]);
        let expected = bare(&program, &[], "1");
        assert!(expected.starts_with("357 467 336 432 309 436 2 \n"), "{quant}: {expected}");
        assert_eq!(hash_by_executable(path, quant, &expected), expected.lines().nth(1).expect("a hash"), "{quant}");
        assert_eq!(bare(&program, &[], "3"), expected, "{quant}");
        assert_eq!(bare(&link("c++", CPP, LEAST), &[], "2"), expected, "{quant}");
        if !(installed("aarch64-linux-gnu-gcc") && installed("qemu-aarch64")) {
            continue;
        }
        let emulator = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"];
        for cpu in ["armv8-a", "neoverse-n1", "neoverse-v1"] {
            let more = ["--target", "aarch64-unknown-linux-gnu", "--target-cpu", cpu];
            let program = link("aarch64-linux-gnu-gcc", C, &more);
            assert_eq!(bare(&program, &emulator, "2"), expected, "{quant} {cpu}");
        }
    }
}

/// The hash over all logits as the executable computes them.
fn hash_by_executable(directory: &Path, quant: &str, bare: &str) -> String {
    let executable = directory.join("executable");
    run(moec(&["build".as_ref(), numerals().as_ref(), "-o".as_ref(), executable.as_ref()]).args(["--quant", quant]));
    let prompt = std::fs::read_to_string(example("link_bare_c/prompt.ids")).expect("it ships");
    let ids: Vec<&str> =
        prompt.split_whitespace().chain(bare.lines().next().expect("ids").split_whitespace()).collect();
    let file = directory.join("logits.safetensors");
    run(Command::new(executable).args(["logits", "--tokens", &ids.join(","), "-o"]).arg(&file));
    let bytes = std::fs::read(file).expect("it was written");
    let header = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    let logits = &bytes[8 + header..];
    assert_eq!(logits.len(), ids.len() * 512 * 4);
    let hash = logits
        .iter()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3));
    format!("{hash:016x}")
}

#[test]
fn the_examples_run() {
    let mut kinds = vec!["link_bare_c", "link_from_c"];
    if installed("python3") {
        kinds.push("link_from_python");
    }
    for name in kinds {
        let directory = TempDir::new().expect("a temporary directory");
        let mut script = Command::new(example(name).join("run.sh"));
        let said = run(script.arg(directory.path()).env("MOEC", env!("CARGO_BIN_EXE_moec")));
        match name {
            "link_bare_c" => assert!(said.starts_with("357 467 336 432 309 436 2 \n"), "{said}"),
            _ => assert_eq!(said, SPELLED, "{name}"),
        }
    }
}

#[test]
fn the_c_example_is_cpp_too_and_pkg_config_knows_how_to_link_it() {
    let directory = two_libraries(&[]);
    let path = directory.path();
    let main = example("link_from_c/main.c");
    let program = compile("c++", CPP, &main, path, RUNTIME);
    let spell = |program: &Path| {
        run(Command::new(program).arg(path.join("numerals.weights")).args(["fr 1987 =", "de 21 =", "en 42 ="]))
    };
    assert_eq!(spell(&program), SPELLED);
    if installed("pkg-config") {
        let mut pkg_config = Command::new("pkg-config");
        let flags = run(pkg_config.env("PKG_CONFIG_PATH", path).args(["--cflags", "--libs", "numerals"]));
        let program = path.join("by_pkg_config");
        run(Command::new("cc").arg(&main).args(flags.split_whitespace()).arg("-o").arg(&program));
        assert_eq!(spell(&program), SPELLED);
    }
}

#[test]
fn two_models_in_one_process() {
    let directory = two_libraries(&[]);
    let path = directory.path();
    for (cc, flags) in [("cc", C), ("c++", CPP)] {
        let program = compile(cc, flags, &source("two_models.c"), path, RUNTIME);
        let mut command = Command::new(program);
        command.args([path.join("numerals.weights"), path.join("other.weights"), path.to_path_buf()]);
        assert_eq!(run(&mut command), "two models: done\n");
    }
    assert!(path.join("session").is_file() && !path.join("session.unfinished").exists());
}

#[test]
fn two_shared_libraries_in_one_process() {
    let directory = TempDir::new().expect("a temporary directory");
    let path = directory.path();
    // The same model with a chat template, which asks for the last message as it is.
    let model = path.join("model");
    std::fs::create_dir(&model).expect("a new directory");
    for file in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(numerals().join(file), model.join(file)).expect("the model is shipped");
    }
    std::fs::write(model.join("chat_template.jinja"), "{{ bos_token }}{{ messages[-1]['content'].strip() }}")
        .expect("writable");
    build(&numerals(), "cdylib", "plain", path, &[]);
    build(&model, "cdylib", "chatty", path, &[]);
    let program = compile("cc", C, &source("two_libraries.c"), path, &["-lpthread", "-ldl"]);
    for mode in ["local", "global"] {
        let mut command = Command::new(&program);
        command.arg(mode);
        command.args(["libplain.so", "plain.weights", "libchatty.so", "chatty.weights"].map(|file| path.join(file)));
        assert_eq!(run(command.arg(path)), "two libraries: done\n", "{mode}");
    }
}

#[test]
fn misuse_is_refused_and_harms_nobody() {
    let directory = two_libraries(&[]);
    let path = directory.path();
    let program = compile("cc", C, &source("abuse.c"), path, RUNTIME);
    compile("c++", CPP, &source("abuse.c"), path, RUNTIME);
    let program = if program.is_file() { program } else { path.join("abuse") };
    for seed in 1..=4 {
        let mut command = Command::new(&program);
        let done =
            command.arg(path.join("numerals.weights")).args(["10000", &seed.to_string()]).output().expect("it starts");
        let said = String::from_utf8_lossy(&done.stdout);
        let complaints = String::from_utf8_lossy(&done.stderr);
        assert!(
            done.status.success() && said.starts_with("abuse: "),
            "seed {seed}: {}\n{said}{complaints}",
            done.status
        );
        assert_eq!(complaints, "", "the library prints nothing");
    }
}

#[test]
fn valgrind_finds_nothing() {
    if !installed("valgrind") {
        return;
    }
    let directory = two_libraries(LEAST);
    let path = directory.path();
    let weights = |name: &str| path.join(format!("{name}.weights")).into_os_string();
    let spell = compile("cc", C, &example("link_from_c/main.c"), path, RUNTIME);
    let two = compile("cc", C, &source("two_models.c"), path, RUNTIME);
    let abuse = compile("cc", C, &source("abuse.c"), path, RUNTIME);
    build(&numerals(), "object", "numerals", path, LEAST);
    let object = path.join("numerals.o");
    let bare = path.join("bare.c");
    std::fs::copy(example("link_bare_c/main.c"), &bare).expect("it ships");
    let bare = compile("cc", C, &bare, path, &[object.to_str().expect("plain"), "-lpthread"]);
    let runs = [
        (spell, vec![weights("numerals"), "fr 12 =".into()]),
        (two, vec![weights("numerals"), weights("other"), path.into()]),
        (abuse, vec![weights("numerals"), "400".into(), "9".into()]),
        (bare, [weights("numerals")].into_iter().chain(["2", "3", "1", "345"].map(Into::into)).collect()),
    ];
    for (program, arguments) in runs {
        let mut command = Command::new("valgrind");
        command.args(["-q", "--error-exitcode=9", "--leak-check=full", "--errors-for-leak-kinds=definite,possible"]);
        run(command.arg("--fair-sched=try").arg(program).args(arguments));
    }
}

#[test]
fn what_cannot_be_built_is_refused() {
    let directory = TempDir::new().expect("a temporary directory");
    let out = directory.path().join("out");
    let refused = |more: &[&str], code: i32, words: &str| {
        let mut command = moec(&["build".as_ref(), numerals().as_ref(), "-o".as_ref(), out.as_ref()]);
        let done = command.args(more).output().expect("moec starts");
        let said = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(code), "{said}");
        assert!(said.contains(words), "expected `{words}` in: {said}");
    };
    let foreign = ["--target", "aarch64-unknown-linux-gnu"];
    for kind in ["exe", "staticlib", "cdylib"] {
        refused(&[&["--emit", kind], &foreign[..]].concat(), 1, "build with --emit object, which needs no runtime");
    }
    refused(
        &["--emit", "object", "--target", "riscv64gc-unknown-linux-gnu"],
        1,
        "generates code for x86_64 and aarch64 only",
    );
    refused(&["--emit", "object", "--target", "nowhere"], 2, "a target is ARCHITECTURE-VENDOR-SYSTEM");
    let native = [&["--emit", "object", "--target-cpu", "native"], &foreign[..]].concat();
    refused(&native, 2, "`--target-cpu native` means this machine");
    refused(&["--emit", "object", "--name", "moec"], 2, "choose another name");
    refused(&["--emit", "object", "--name", "2be"], 2, "a C identifier");
    assert!(!out.exists(), "something was left behind");
    std::fs::write(&out, "x").expect("writable");
    refused(&["--emit", "object"], 1, "is a file; name the directory to write into");
}
