//! The command line, end to end, of a compiled model whose steps are written by hand.
#![allow(missing_docs)]

mod harness;

use harness::fake::{self, Shape, expected_logits};
use harness::{Model, greedy, ids, shape, text, tokenizer};
use moec_abi::metadata::Golden;
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

fn main() -> ExitCode {
    harness::main(TESTS)
}

tests! {
    generates_ids generates_text streams_are_decodings threads_and_chunks_do_not_matter samples_by_seed
    ends_at_eos stops_at_strings fills_the_context reads_standard_input writes_logits_and_routes scores
    tokenizes tells_about_itself tests_itself benchmarks wrong_usage_is_2 what_is_missing_is_said
    broken_executables_say_so output_may_be_closed ctrl_c_ends_cleanly starts_fast
    chats_in_a_pipe ctrl_c_stops_an_answer embeds
    scores_choices
}

fn generates_ids() {
    let model = Model::new("fake");
    let args = ["generate", "--tokens", "1,2,3", "--max-tokens", "20", "--print-tokens"];
    assert_eq!(ids(&model.stdout(&args)), greedy(&Shape::default(), &[1, 2, 3], 20));
    assert_eq!(ids(&model.stdout(&["generate", "--tokens", "1", "--print-tokens", "-n", "0"])), [] as [u32; 0]);
    let window = Model::new("fake-window");
    assert_eq!(ids(&window.stdout(&args)), greedy(&shape("fake-window"), &[1, 2, 3], 20));
}

fn generates_text() {
    let model = Model::new("fake");
    let prompt = tokenizer().encode("Free software", true).unwrap();
    let continuation = greedy(&Shape::default(), &prompt, 12);
    let mut expected = tokenizer().decode(&continuation).unwrap();
    if !expected.ends_with('\n') {
        expected.push('\n');
    }
    assert_eq!(model.stdout(&["generate", "Free software", "--max-tokens", "12"]), expected);
    assert_eq!(model.stdout(&["generate", "Free software", "--max-tokens", "0"]), "\n");
}

/// What is streamed is what all ids at once decode to, whatever they are.
fn streams_are_decodings() {
    let model = Model::new("fake");
    for seed in 0..10 {
        let seed = seed.to_string();
        let mut args = vec![
            "generate",
            "--tokens",
            "1",
            "--max-tokens",
            "60",
            "--temperature",
            "1",
            "--top-k",
            "0",
            "--seed",
            &seed,
        ];
        let text = model.stdout(&args);
        args.push("--print-tokens");
        let mut expected = tokenizer().decode(&ids(&model.stdout(&args))).unwrap();
        if !expected.ends_with('\n') {
            expected.push('\n');
        }
        assert_eq!(text, expected);
    }
}

fn threads_and_chunks_do_not_matter() {
    let model = Model::new("fake");
    let prompt = (0..100).map(|i| (i * 31 % 384).to_string()).collect::<Vec<_>>().join(",");
    let run = |extra: &[&str]| {
        let args = ["generate", "--tokens", &prompt, "--max-tokens", "10", "--print-tokens"];
        model.stdout(&[&args, extra].concat())
    };
    let expected = run(&[]);
    for threads in ["1", "2", "3"] {
        for chunk in ["1", "5", "1000"] {
            assert_eq!(run(&["--threads", threads, "--chunk", chunk]), expected);
        }
    }
    assert_eq!(run(&["--level", "plain", "--low-memory"]), expected);
}

fn samples_by_seed() {
    let model = Model::new("fake");
    let run = |extra: &[&str]| {
        let args = ["generate", "--tokens", "5", "--max-tokens", "10", "--print-tokens", "--temperature", "1.5"];
        ids(&model.stdout(&[&args, extra].concat()))
    };
    assert_eq!(run(&["--seed", "1"]), run(&["--seed", "1"]));
    assert_ne!(run(&["--seed", "1"]), run(&["--seed", "2"]));
    assert_ne!(run(&[]), run(&[]));
    assert_eq!(run(&["--top-k", "1"]), greedy(&Shape::default(), &[5], 10));
    assert_eq!(run(&["--top-p", "0", "--top-k", "0"]), greedy(&Shape::default(), &[5], 10));
    assert_eq!(run(&["--min-p", "1", "--top-k", "0"]), greedy(&Shape::default(), &[5], 10));
    let penalized = run(&["--top-k", "1", "--repeat-penalty", "1e9", "--repeat-last", "100"]);
    let mut different = penalized.clone();
    different.sort_unstable();
    different.dedup();
    assert_eq!(different.len(), penalized.len(), "{penalized:?}");
}

fn ends_at_eos() {
    let model = Model::new("fake-ending");
    let shape = shape("fake-ending");
    let expected = greedy(&shape, &[1, 2, 3], 5);
    assert_eq!(ids(&model.stdout(&["generate", "--tokens", "1,2,3", "--print-tokens"])), expected);
    let text = model.stdout(&["generate", "--tokens", "1,2,3"]);
    assert_eq!(text.trim_end_matches('\n'), tokenizer().decode(&expected[..4]).unwrap().trim_end_matches('\n'));
}

fn stops_at_strings() {
    let model = Model::new("fake");
    let args = ["generate", "--tokens", "1,2,3", "--max-tokens", "40"];
    let whole = model.stdout(&args);
    // Every piece of the text stops it at its first occurrence.
    let starts: Vec<usize> = whole.char_indices().map(|(at, _)| at).collect();
    for window in starts.windows(4).step_by(5) {
        let stop = &whole[window[0]..window[3]];
        let stopped = model.stdout(&[&args[..], &["--stop", stop, "--stop", "never"]].concat());
        let expected = &whole[..whole.find(stop).unwrap()];
        assert_eq!(stopped.strip_suffix('\n').unwrap(), expected.strip_suffix('\n').unwrap_or(expected), "{stop:?}");
    }
    let all = ids(&model.stdout(&[&args[..], &["--print-tokens"]].concat()));
    let some = ids(&model.stdout(&[&args[..], &["--print-tokens", "--stop", &whole[starts[5]..starts[7]]]].concat()));
    assert!(some.len() < all.len() && all.starts_with(&some));
}

fn fills_the_context() {
    let model = Model::new("fake-short");
    let output = model.run(&["generate", "--tokens", "1,2,3", "--print-tokens"]);
    let shape = shape("fake-short");
    assert_eq!(ids(&text(&output.stdout)), greedy(&shape, &[1, 2, 3], 37));
    assert_eq!(text(&output.stderr), "note: the context of 40 tokens is full\n");
    let long = vec!["7"; 41].join(",");
    let error = model.failure(1, &["generate", "--tokens", &long, "--print-tokens"]);
    assert!(error.starts_with("error: the text does not fit: it has 41 tokens"), "{error}");
}

fn reads_standard_input() {
    let model = Model::new("fake");
    let mut child = model.command(&["tokenize", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all("Free software".as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(ids(&text(&output.stdout)), tokenizer().encode("Free software", true).unwrap());

    let args = ["generate", "--tokens", "-", "--max-tokens", "3", "--print-tokens"];
    for (input, status) in [("[1, 2,\n3]\n", 0), ("1,x", 1), ("", 1)] {
        let mut child = model.command(&args).stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(status), "{}", text(&output.stderr));
        if status == 0 {
            assert_eq!(ids(&text(&output.stdout)), greedy(&Shape::default(), &[1, 2, 3], 3));
        }
    }
}

fn writes_logits_and_routes() {
    let model = Model::new("fake");
    let path = model.dir.path().join("out.safetensors");
    let tokens: Vec<u32> = (0..50).map(|i| i * 77 % 384).collect();
    let list = tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    for extra in [&[][..], &["--chunk", "1"], &["--chunk", "7", "--threads", "3"]] {
        let args = ["logits", "--tokens", &list, "-o", path.to_str().unwrap(), "--routes"];
        assert_eq!(model.stdout(&[&args, extra].concat()), "");
        let bytes = fs::read(&path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let logits = file.tensor("logits").unwrap();
        assert_eq!(logits.shape(), [50, 384]);
        let expected: Vec<u8> = (1..=50)
            .flat_map(|n| expected_logits(&Shape::default(), &tokens[..n]))
            .flat_map(f32::to_le_bytes)
            .collect();
        assert!(logits.data() == expected);
        let experts = file.tensor("selected_experts.1").unwrap();
        assert_eq!((experts.shape(), experts.dtype()), (&[50, 2][..], safetensors::Dtype::I64));
        let expected: Vec<u8> = tokens
            .iter()
            .flat_map(|id| [0, 1].map(|k| i64::from(fake::route(*id, 1, k).0)))
            .flat_map(i64::to_le_bytes)
            .collect();
        assert!(experts.data() == expected);
        assert_eq!(file.tensor("routing_weights.0").unwrap().shape(), [50, 2]);
        fs::remove_file(&path).unwrap();
    }
    let error = model.failure(1, &["logits", "--tokens", "1", "-o", "/nowhere/x.safetensors"]);
    assert!(error.starts_with("error: cannot write /nowhere/x.safetensors: "), "{error}");
    let error = model.failure(1, &["logits", "--tokens", "1", "-o", "/dev/full"]);
    assert!(error.starts_with("error: cannot write /dev/full: "), "{error}");
    let error = model.failure(1, &["logits", "--tokens", "1,384", "-o", path.to_str().unwrap()]);
    assert_eq!(error, "error: token id 384 does not exist: the model's vocabulary has 384 tokens, 0 to 383\n");
    assert!(!path.exists());
    assert_eq!(fs::read_dir(model.dir.path()).unwrap().count(), 1, "temporary files are left");
    let dense = Model::new("fake-dense");
    let error = dense.failure(1, &["logits", "--tokens", "1", "-o", path.to_str().unwrap(), "--routes"]);
    assert_eq!(error, "error: this model has no experts, so there are no routes to show or count\n");
}

fn scores() {
    let model = Model::new("fake");
    let tokens: Vec<u32> = (0..60).map(|i| i * 77 % 384).collect();
    let list = tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let nll = |tokens: &[u32]| {
        let logits = expected_logits(&Shape::default(), &tokens[..tokens.len() - 1]);
        let sum: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
        sum.ln() - f64::from(logits[*tokens.last().unwrap() as usize])
    };
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let whole: Vec<f64> = (2..=60).map(|n| nll(&tokens[..n])).collect();
    let report: Value = serde_json::from_str(&model.stdout(&["score", "--tokens", &list, "--per-token"])).unwrap();
    assert_eq!(report["tokens"], 59);
    let close = |value: &Value, expected: f64| (value.as_f64().unwrap() - expected).abs() < 1e-9 * expected.abs();
    assert!(close(&report["mean_nll"], mean(&whole)), "{report}");
    assert!(close(&report["perplexity"], mean(&whole).exp()), "{report}");
    assert!(report["token_nll"].as_array().unwrap().iter().zip(&whole).all(|(a, b)| close(a, *b)));

    let args = ["score", "--tokens", &list, "--limit", "21", "--context", "11"];
    let report: Value = serde_json::from_str(&model.stdout(&args)).unwrap();
    let halves: Vec<f64> =
        (2..=11).map(|n| nll(&tokens[..n])).chain((2..=11).map(|n| nll(&tokens[10..10 + n]))).collect();
    assert_eq!((&report["tokens"], &report["windows"]), (&20.into(), &2.into()));
    assert!(close(&report["mean_nll"], mean(&halves)), "{report}");

    let file = model.dir.path().join("text");
    fs::write(&file, "The GNU General Public License").unwrap();
    let file = file.to_str().unwrap();
    let with: Value = serde_json::from_str(&model.stdout(&["score", "--file", file])).unwrap();
    let without: Value = serde_json::from_str(&model.stdout(&["score", "--file", file, "--no-bos"])).unwrap();
    assert_eq!((&with["tokens"], &without["tokens"]), (&22.into(), &21.into()));
    let error = model.failure(1, &["score", "--file", "/nowhere"]);
    assert!(error.starts_with("error: cannot read /nowhere: "), "{error}");
    fs::write(model.dir.path().join("bad"), [0xff, 0xfe]).unwrap();
    model.failure(1, &["score", "--file", model.dir.path().join("bad").to_str().unwrap()]);
    model.failure(1, &["score", "--tokens", "1"]);
}

fn tokenizes() {
    let model = Model::new("fake");
    assert_eq!(model.stdout(&["tokenize", "Free software!"]), "[1,333,286,344,311,358,321,312,326,329,307,344,36]\n");
    assert_eq!(model.stdout(&["tokenize", "é", "--no-bos"]), "[333,198,172]\n");
    assert_eq!(model.stdout(&["tokenize", ""]), "[1]\n");
}

fn tells_about_itself() {
    let model = Model::new("fake");
    let info: Value = serde_json::from_str(&model.stdout(&["info", "--json"])).unwrap();
    assert_eq!((&info["name"], &info["vocab"], &info["level"]), (&"fake".into(), &384.into(), &"plain".into()));
    assert_eq!(info["quantization"]["experts"], "q4");
    assert_eq!(info["memory"]["kv_bytes_per_token"], 8);
    assert!(!info["levels"][0]["missing"].as_array().unwrap().is_empty());
    let table = model.stdout(&["info"]);
    assert!(table.contains("experts        5, 2 per token\n") && table.contains("plain (used here)"), "{table}");
    assert!(model.stdout(&["--help"]).contains("./fake generate \"Once upon a time\""));
    for command in ["generate", "chat", "serve", "embed", "logits", "score", "tokenize", "bench", "info", "selftest"] {
        assert!(model.stdout(&["--help"]).contains(command));
        assert!(model.stdout(&[command, "--help"]).contains("Usage: ./fake"), "{command}");
    }
}

fn tests_itself() {
    let record = |model: &Model| model.stdout(&["selftest", "--record"]);
    let plain = Model::new("fake");
    let mut golden: Golden = serde_json::from_str(&record(&plain)).unwrap();
    assert_eq!((golden.tokens.len(), golden.tokens[0], golden.first_logits.len()), (12, 1, 8));
    let error = plain.failure(1, &["selftest"]);
    assert!(error.contains("nothing was recorded"), "{error}");
    let model = Model::with_golden("fake", Some(&golden));
    assert_eq!(
        model.stdout(&["selftest"]),
        "ok: plain gives the recorded logits for 12 tokens, at once and one by one\n"
    );
    golden.logits_fnv1a ^= 1;
    let error = Model::with_golden("fake", Some(&golden)).failure(1, &["selftest"]);
    assert!(error.contains("are not those recorded"), "{error}");
}

fn benchmarks() {
    let model = Model::new("fake-short");
    let report: Value =
        serde_json::from_str(&model.stdout(&["bench", "--json", "--repeat", "2", "--depth", "10"])).unwrap();
    assert_eq!((&report["prefill"]["tokens"], &report["decode"]["tokens"]), (&30.into(), &30.into()));
    for (part, key) in [
        ("prefill", "tokens_per_s"),
        ("prefill", "multiply_adds_per_s"),
        ("prefill", "share_of_peak"),
        ("decode", "tokens_per_s"),
        ("decode", "bytes_per_s"),
        ("decode", "share_of_bandwidth"),
        ("machine", "read_bytes_per_s"),
        ("machine", "peak_multiply_adds_per_s"),
        ("machine", "threads"),
    ] {
        let value = report[part][key].as_f64().unwrap_or(0.0);
        assert!(value > 0.0 && value.is_finite(), "{part}.{key} {value}");
    }
    assert!(model.stdout(&["bench", "--new-tokens", "3"]).contains("% of bandwidth"));
    let error = model.failure(1, &["bench", "--prompt-tokens", "512"]);
    assert!(error.contains("do not fit into the model's context of 40"), "{error}");
    model.failure(1, &["bench", "--depth", "40"]);
}

fn wrong_usage_is_2() {
    let model = Model::new("fake");
    for args in [
        &[][..],
        &["fly"],
        &["chat", "hello"],
        &["serve", "--port", "many"],
        &["generate"],
        &["generate", "x", "y"],
        &["generate", "x", "--threads", "many"],
        &["logits", "--tokens", "1,,2", "-o", "x"],
        &["score", "--file", "a", "--tokens", "1"],
        &["info", "--yaml"],
    ] {
        model.failure(2, args);
    }
}

fn what_is_missing_is_said() {
    let mute = Model::new("fake-mute");
    let error = mute.failure(1, &["generate", "hello"]);
    assert!(error.starts_with("error: the model carries no tokenizer"), "{error}");
    mute.failure(1, &["tokenize", "hello"]);
    mute.stdout(&["generate", "--tokens", "1", "--max-tokens", "3", "--print-tokens"]);
    let cpu = Model::new("fake-cpu");
    let error = cpu.failure(1, &["generate", "--tokens", "1", "--print-tokens"]);
    assert!(error.starts_with("error: this CPU lacks ") && error.contains("build it again with"), "{error}");
    assert!(cpu.stdout(&["info"]).contains("this CPU lacks"));
    // With hardly more address space than the program itself takes.
    let model = Model::new("fake-roomy");
    let limited = |megabytes: usize| {
        let limit = format!("ulimit -v {}; exec \"$0\" generate hello --max-tokens 3", megabytes << 10);
        Command::new("sh").args(["-c", &limit]).arg(&model.path).output().unwrap()
    };
    assert_eq!(limited(4000).status.code(), Some(0));
    let output = limited(1000);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), String::new()));
    assert!(
        text(&output.stderr).starts_with("error: not enough memory: working memory for "),
        "{}",
        text(&output.stderr)
    );
    let hungry = Model::new("fake-hungry");
    let error = hungry.failure(1, &["generate", "hello"]);
    assert!(error.starts_with("error: not enough memory: working memory for "), "{error}");
    let model = Model::new("fake");
    let error = model.failure(1, &["generate", "x", "--level", "zen9"]);
    assert_eq!(error, "error: the model has no code for zen9; it was compiled for impossible, plain\n");
    let error = model.failure(1, &["generate", "x", "--level", "impossible"]);
    assert!(error.starts_with("error: this CPU lacks "), "{error}");
    let mut full = model.command(&["generate", "x", "--max-tokens", "5"]);
    full.stdout(fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
    let output = full.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).starts_with("error: cannot write to standard output: "), "{}", text(&output.stderr));
}

fn broken_executables_say_so() {
    let model = Model::new("fake");
    let whole = fs::read(&model.path).unwrap();
    let cut = |bytes: usize| {
        fs::write(&model.path, &whole[..bytes]).unwrap();
        let error = model.failure(1, &["generate", "hello"]);
        assert_eq!(error.lines().count(), 1, "{error}");
        assert!(error.contains("has lost its weights") && error.contains("rebuild it"), "{error}");
    };
    cut(whole.len() - 1);
    cut(whole.len() - 5000);
    // As strip leaves it: without what no section holds.
    cut(fs::metadata(std::env::current_exe().unwrap()).unwrap().len() as usize);
    fs::write(&model.path, [&whole[..], b"more"].concat()).unwrap();
    assert!(model.failure(1, &["info"]).contains("4 bytes follow"));
    // The payload of another model behind this one's code.
    fake::append(&shape("fake-window"), &std::env::current_exe().unwrap(), &model.path, None);
    let error = model.failure(1, &["generate", "hello"]);
    assert!(error.contains("belong to another model or another build"), "{error}");
}

fn output_may_be_closed() {
    let model = Model::new("fake");
    let mut command = model.command(&["generate", "--tokens", "1", "--max-tokens", "500"]);
    let mut child = command.env("FAKE_SLOW", "1").spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    let mut first = [0; 1];
    out.read_exact(&mut first).unwrap();
    drop(out);
    let started = Instant::now();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()));
    assert!(started.elapsed() < Duration::from_secs(8));
}

fn interrupt(child: &Child) {
    // SAFETY: sends a signal to a child that has not been waited for.
    unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
}

fn ctrl_c_ends_cleanly() {
    let model = Model::new("fake");
    // While generating: what was printed is whole text, and a newline ends it.
    let args = ["generate", "--tokens", "1,2,3", "--max-tokens", "900"];
    let mut child = model.command(&args).env("FAKE_SLOW", "1").spawn().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut printed = Vec::new();
    while printed.len() < 20 {
        let bytes = out.fill_buf().unwrap().to_vec();
        out.consume(bytes.len());
        printed.extend(bytes);
    }
    interrupt(&child);
    out.read_to_end(&mut printed).unwrap();
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(130));
    let printed = String::from_utf8(printed).unwrap();
    assert!(printed.ends_with('\n'));
    let count = printed.chars().count();
    let ids = greedy(&Shape::default(), &[1, 2, 3], count);
    assert!(tokenizer().decode(&ids).unwrap().starts_with(printed.trim_end_matches(['\n', '\u{fffd}'])));

    // While reading a long prompt: between two chunks.
    let prompt = vec!["5"; 900].join(",");
    let args = ["generate", "--tokens", &prompt, "--print-tokens", "--chunk", "1"];
    let child = model.command(&args).env("FAKE_SLOW", "1").spawn().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let started = Instant::now();
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(130), "[]\n".into()));
    assert!(started.elapsed() < Duration::from_secs(2));
}

/// From start to first token in well under 50 ms; the best of several, because tests run side by side.
fn starts_fast() {
    let model = Model::new("fake");
    let best = (0..10)
        .map(|_| {
            let started = Instant::now();
            model.stdout(&["generate", "Free software", "--max-tokens", "1"]);
            started.elapsed()
        })
        .min()
        .unwrap();
    assert!(best < Duration::from_millis(50), "{best:?}");
}

/// What the fake chat model answers to a conversation, and the ids that it reads and writes.
fn chat_answer(conversation: &str, count: usize) -> String {
    let prompt = tokenizer().encode(conversation, false).unwrap();
    tokenizer().decode(&greedy(&shape("fake-chat"), &prompt, count)).unwrap()
}

fn converse(model: &Model, args: &[&str], lines: &str) -> (String, String) {
    let args = [&["chat", "--temperature", "0", "--max-tokens", "6"], args].concat();
    let mut child = model.command(&args).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    (text(&output.stdout), text(&output.stderr))
}

fn chats_in_a_pipe() {
    let model = Model::new("fake-chat");
    let first = chat_answer("<s>[user] hello[assistant]", 6);
    let second_prompt = format!("<s>[user] hello[assistant] {first}[user] a\nb[assistant]");
    let second = chat_answer(&second_prompt, 6);
    let (out, _) = converse(&model, &[], "hello\na\\\nb\n");
    assert_eq!(out, format!("{first}\n{second}\n"));
    // An answer is the same when it is tried again, greedy as it is, and after a fresh start.
    let saved = model.dir.path().join("talk.json");
    let script = format!(
        "hello\n/retry\n/stats\n/save {0}\n/reset\nhello\n/load {0}\n\"\"\"\na\nb\n\"\"\"\n/quit\nx\n",
        saved.display()
    );
    let (out, err) = converse(&model, &[], &script);
    assert_eq!(out, format!("{first}\n{first}\n{first}\n{second}\n"));
    assert!(err.contains("answered 6 tokens") && err.contains("kept 2 messages"), "{err}");
    let kept: Value = serde_json::from_str(&fs::read_to_string(&saved).unwrap()).unwrap();
    assert_eq!(
        (&kept["messages"][1]["role"], &kept["messages"][1]["content"]),
        (&"assistant".into(), &first.as_str().into())
    );
    let (out, _) = converse(&model, &["--load", saved.to_str().unwrap()], "a\\\nb\n");
    assert_eq!(out, format!("{second}\n"));
    // System messages, mistakes, and text that begins with a slash.
    let (out, err) = converse(&model, &["--system", "be kind"], "/system\n/fly\n/save\n/load /nowhere\n//x\n");
    assert_eq!(out, chat_answer("<s>[system] be kind[user] /x[assistant]", 6) + "\n");
    for said in ["be kind", "no command /fly", "write the name of a file", "cannot read /nowhere"] {
        assert!(err.contains(said), "{said}: {err}");
    }
    let error = Model::new("fake").failure(1, &["chat"]);
    assert!(error.contains("no chat template") && error.contains("`generate`"), "{error}");
}

fn ctrl_c_stops_an_answer() {
    let model = Model::new("fake-chat");
    let mut command = model.command(&["chat", "--temperature", "0"]);
    let mut child = command.env("FAKE_SLOW", "1").stdin(Stdio::piped()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    input.write_all(b"hello\n").unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    out.read_exact(&mut [0; 4]).unwrap();
    interrupt(&child);
    let mut rest = Vec::new();
    out.read_until(b'\n', &mut rest).unwrap();
    // The program lives on and answers again.
    input.write_all(b"/reset\nhello\n").unwrap();
    out.read_exact(&mut [0; 4]).unwrap();
    interrupt(&child);
    drop(input);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(text(&output.stderr).matches("(stopped)").count(), 2, "{}", text(&output.stderr));
}

fn embeds() {
    let model = Model::new("fake");
    let shape = Shape::default();
    let vectors = |args: &[&str]| -> Vec<Vec<f32>> {
        model.stdout(args).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let states = |text: &str| -> Vec<Vec<f32>> {
        let ids = tokenizer().encode(text, true).unwrap();
        (1..=ids.len()).map(|n| fake::expected_hidden(&shape, &ids[..n])).collect()
    };
    let last = |text: &str| states(text).pop().unwrap();
    let long = "Free software is a matter of liberty, not price; think of free speech.";
    let plain = ["embed", "--no-normalize", "--pooling"];
    assert_eq!(vectors(&[&plain[..], &["last", "Free software", long]].concat()), [last("Free software"), last(long)]);
    let all = states(long);
    let mean: Vec<f32> = (0..all[0].len())
        .map(|i| all.iter().fold(0f32, |sum, state| sum + state[i]) * (1.0 / all.len() as f32))
        .collect();
    for extra in [&[][..], &["--chunk", "3", "--threads", "2"]] {
        assert_eq!(vectors(&[&plain[..], &["mean", long], extra].concat()), std::slice::from_ref(&mean));
    }
    let file = model.dir.path().join("lines");
    fs::write(&file, format!("Free\n{long}\n")).unwrap();
    let normal = vectors(&["embed", "--file", file.to_str().unwrap()]);
    assert_eq!(normal.len(), 2);
    let length = mean.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
    assert!(normal[1].iter().zip(&mean).all(|(a, b)| (f64::from(*a) - f64::from(*b) / length).abs() < 1e-6));
    let error = Model::new("fake-short").failure(1, &["embed", long]);
    assert!(error.contains("context"), "{error}");
}

fn scores_choices() {
    let model = Model::new("fake");
    let shape = Shape::default();
    let likelihood = |question: &str, choice: &str| {
        let before = tokenizer().encode(question, true).unwrap();
        let whole = tokenizer().encode(&format!("{question} {choice}"), true).unwrap();
        let start = before.iter().zip(&whole).take_while(|(a, b)| a == b).count();
        (start..whole.len())
            .map(|n| {
                let logits = expected_logits(&shape, &whole[..n]);
                f64::from(logits[whole[n] as usize]) - logits.iter().map(|l| f64::from(*l).exp()).sum::<f64>().ln()
            })
            .sum::<f64>()
    };
    let questions = ["Is it?", "Who is right?", "Free software is"];
    let choices = [["yes", "perhaps not"], ["the people", "nobody"], ["a matter of price", "a matter of liberty"]];
    let best = |question: &str, choices: &[&str], per_byte: bool| {
        let value = |choice: &&str| likelihood(question, choice) / if per_byte { choice.len() as f64 } else { 1.0 };
        usize::from(value(&choices[1]) > value(&choices[0]))
    };
    let mut lines = String::new();
    let (mut plain, mut normalized) = (0, 0);
    for (i, (question, choices)) in questions.iter().zip(&choices).enumerate() {
        let answer = i % 2;
        plain += usize::from(best(question, choices, false) == answer);
        normalized += usize::from(best(question, choices, true) == answer);
        let answer = if i == 2 { serde_json::json!(choices[answer]) } else { serde_json::json!(answer) };
        lines += &format!(
            "{}\n\n",
            serde_json::json!({ "question": question, "choices": choices, "answer": answer, "id": i })
        );
    }
    let file = model.dir.path().join("choices.jsonl");
    fs::write(&file, &lines).unwrap();
    let file = file.to_str().unwrap();
    let report: Value = serde_json::from_str(&model.stdout(&["score", "--choices", file])).unwrap();
    assert_eq!(
        (&report["questions"], &report["right"], &report["right_normalized"]),
        (&3.into(), &plain.into(), &normalized.into())
    );
    let wrong = report["wrong"].as_array().unwrap();
    assert_eq!(wrong.len(), 3 - plain);
    for entry in wrong {
        let at = questions.iter().position(|question| entry["question"] == *question).unwrap();
        let found = entry["log_likelihoods"][1].as_f64().unwrap();
        assert!((found - likelihood(questions[at], choices[at][1])).abs() < 1e-9, "{entry}");
    }
    fs::write(file, "{\"question\": \"x\", \"choices\": [\"a\", \"b\"], \"answer\": 2}").unwrap();
    let error = model.failure(1, &["score", "--choices", file]);
    assert!(error.contains("line 1: `answer` must be a number from 0 to 1"), "{error}");
    fs::write(file, "{\"question\": \"x\"}").unwrap();
    assert!(model.failure(1, &["score", "--choices", file]).contains("missing field `choices`"));
}
