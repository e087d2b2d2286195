//! This very program, with a payload at its end, is a compiled model whose steps are written by hand: started under a name that
//! begins with `fake` it is the model, otherwise it runs the tests.
#![allow(dead_code)]

#[path = "../../../tests/fake/mod.rs"]
pub mod fake;

pub mod http;

use fake::{Shape, expected_logits};
use moec_abi::metadata::Golden;
use std::ffi::{CString, c_char};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output, Stdio};

/// The shapes that this program can be, by name.
pub fn shape(name: &str) -> Shape {
    match name {
        "fake" => Shape::default(),
        "fake-short" => Shape { context: 40, ..Shape::default() },
        "fake-window" => Shape { window: 8, ..Shape::default() },
        "fake-dense" => Shape { experts: 0, ..Shape::default() },
        "fake-mute" => Shape { tokenizer: Vec::new(), ..Shape::default() },
        "fake-cpu" => Shape { features: 1 << 34, ..Shape::default() },
        "fake-roomy" => Shape { extra_scratch: 1 << 30, ..Shape::default() },
        "fake-hungry" => Shape { extra_scratch: 1 << 46, ..Shape::default() },
        // Ends at the fifth token of the greedy continuation of 1, 2, 3.
        "fake-ending" => Shape { eos: vec![greedy(&Shape::default(), &[1, 2, 3], 5)[4]], ..Shape::default() },
        "fake-chat" => Shape { chat_template: Some(CHAT_TEMPLATE.into()), ..Shape::default() },
        "fake-tools" => {
            let tools = "{% if tools %}[tools] {{ tools | tojson }}{% endif %}";
            Shape { chat_template: Some(CHAT_TEMPLATE.replacen("}}", &format!("}}}}{tools}"), 1)), ..Shape::default() }
        }
        other => panic!("no shape {other}"),
    }
}

/// A conversation as the fake chat model reads it. It takes no system message but the first.
pub const CHAT_TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' and not loop.first %}\
    {{ raise_exception('only the first message may be of the system') }}{% endif %}[{{ m.role }}] {{ m.content }}\
    {% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";

/// Runs the model or the tests.
pub fn main(tests: &[(&str, fn())]) -> ExitCode {
    let name = std::env::args().next().unwrap_or_default();
    let name = Path::new(&name).file_name().unwrap_or_default().to_string_lossy().into_owned();
    if name.starts_with("fake") {
        return be_the_model(&name);
    }
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    let mut failed = 0;
    for (name, test) in tests {
        if filter.as_ref().is_none_or(|filter| name.contains(filter.as_str())) {
            let result = std::panic::catch_unwind(test);
            println!("test {name} ... {}", if result.is_ok() { "ok" } else { "FAILED" });
            failed += usize::from(result.is_err());
        }
    }
    ExitCode::from(u8::from(failed > 0))
}

fn be_the_model(name: &str) -> ExitCode {
    let args: Vec<CString> = std::env::args_os().map(|arg| CString::new(arg.into_vec()).unwrap()).collect();
    let argv: Vec<*const c_char> = args.iter().map(|arg| arg.as_ptr()).collect();
    let descriptor = fake::descriptor(&shape(name));
    // SAFETY: the arguments are C strings, and the descriptor is as a generated one.
    let status = unsafe { moec_app::moec_app_main(argv.len() as i32, argv.as_ptr(), descriptor) };
    ExitCode::from(status as u8)
}

/// The tests' names with the tests.
#[macro_export]
macro_rules! tests {
    ($($name:ident)*) => {
        const TESTS: &[(&str, fn())] = &[$((stringify!($name), $name)),*];
    };
}

/// A compiled model in a directory of its own.
pub struct Model {
    pub dir: tempfile::TempDir,
    pub path: PathBuf,
}

impl Model {
    pub fn new(name: &str) -> Model {
        Model::with_golden(name, None)
    }

    pub fn with_golden(name: &str, golden: Option<&Golden>) -> Model {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        fake::append(&shape(name), &std::env::current_exe().unwrap(), &path, golden);
        Model { dir, path }
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.path);
        command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub fn run(&self, args: &[&str]) -> Output {
        let output = self.command(args).output().unwrap();
        assert!(!text(&output.stderr).contains("panicked"), "{}", text(&output.stderr));
        output
    }

    /// Standard output of a run that must succeed.
    pub fn stdout(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", text(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Standard error of a run that must fail with `status` and print nothing.
    pub fn failure(&self, status: i32, args: &[&str]) -> String {
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(status), "{args:?}: {}", text(&output.stderr));
        assert_eq!(text(&output.stdout), "", "{args:?}");
        text(&output.stderr)
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The greedy continuation of `tokens`.
pub fn greedy(shape: &Shape, tokens: &[u32], count: usize) -> Vec<u32> {
    let mut all = tokens.to_vec();
    for _ in 0..count {
        let logits = expected_logits(shape, &all);
        let best = (0..logits.len()).rev().max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
        all.push(best as u32);
    }
    all.split_off(tokens.len())
}

pub fn ids(text: &str) -> Vec<u32> {
    assert!(text.ends_with('\n') && text.trim_end().lines().count() == 1, "{text}");
    serde_json::from_str(text).unwrap()
}

pub fn tokenizer() -> moec_runtime::Tokenizer {
    moec_runtime::Tokenizer::new(&Shape::default().tokenizer).unwrap()
}
