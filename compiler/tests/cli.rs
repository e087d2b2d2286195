//! The `moec` command as a user meets it: what it says to bad input, and that nothing half-made is left behind.

use moec::emit::executable::output_when_closed;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tempfile::TempDir;

fn moec(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_moec")).args(arguments).output().expect("moec starts")
}

fn numerals() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/numerals")
}

/// A copy of the numerals model in a directory of its own, to be broken.
fn copy() -> TempDir {
    let directory = TempDir::new().expect("a temporary directory");
    for file in
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    {
        std::fs::copy(numerals().join(file), directory.path().join(file)).expect("the model ships with moec");
    }
    directory
}

/// Asserts that a build fails with status 1, a message with all of `words` and no panic, and leaves nothing.
fn refused(model: &Path, more: &[&str], words: &[&str]) {
    let out = TempDir::new().expect("a temporary directory");
    let output = out.path().join("m");
    let mut arguments = vec!["build", text(model), "-o", text(&output)];
    arguments.extend(more);
    let done = moec(&arguments);
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(1), "{said}");
    for word in words {
        assert!(said.contains(word), "expected `{word}` in: {said}");
    }
    assert!(!said.contains("panicked"), "{said}");
    assert_eq!(std::fs::read_dir(out.path()).expect("readable").count(), 0, "something was left behind");
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

#[test]
fn a_model_becomes_an_executable_that_runs_alone() {
    let out = TempDir::new().expect("a temporary directory");
    let executable = out.path().join("numerals");
    let done = moec(&["build", text(&numerals()), "-o", text(&executable), "--quant", "q4"]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let moved = out.path().join("elsewhere");
    std::fs::rename(&executable, &moved).expect("it can be moved");
    let run = |arguments: &[&str]| {
        let done = Command::new(&moved).args(arguments).env_clear().output().expect("it starts");
        assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).expect("text")
    };
    assert_eq!(run(&["generate", "fr 1987 ="]), "mille neuf cent quatre-vingt-sept\n");
    assert_eq!(run(&["generate", "de 21 ="]), "einundzwanzig\n");
    run(&["selftest"]);
    let info: serde_json::Value = serde_json::from_str(&run(&["info", "--json"])).expect("JSON");
    assert!(info.is_object());
    let held = numerals().join("heldout.jsonl");
    let report = run(&["score", "--answers", text(&held), "--limit", "100"]);
    let report: serde_json::Value = serde_json::from_str(&report).expect("JSON");
    assert!(report["accuracy"].as_f64().expect("a number") >= 0.99, "{report}");
}

#[test]
fn an_executable_that_is_cut_or_stripped_is_told() {
    let out = TempDir::new().expect("a temporary directory");
    let executable = out.path().join("numerals");
    let done = moec(&["build", text(&numerals()), "-o", text(&executable)]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let whole = std::fs::read(&executable).expect("it is there");
    let cut = |length: usize| {
        std::fs::write(&executable, &whole[..length]).expect("writable");
        output_when_closed(Command::new(&executable).arg("info"))
    };
    let mut starts = false;
    for length in (0..24).map(|part| whole.len() / 24 * part + 1).chain([whole.len() - 1]) {
        match cut(length) {
            // The system refuses to start it: it ends inside the code.
            Err(_) => assert!(!starts, "cut at {length}"),
            Ok(done) => {
                starts = true;
                let said = String::from_utf8_lossy(&done.stderr);
                assert_eq!(done.status.code(), Some(1), "cut at {length}: {}: {said}", done.status);
                assert!(said.contains("has lost its weights"), "cut at {length}: {said}");
            }
        }
    }
    assert!(starts, "cuts inside the weights are found by the executable");
    let done = cut(whole.len()).expect("it starts");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    // A linker comes with `strip`, usually.
    if Command::new("strip").arg(&executable).output().is_ok_and(|done| done.status.success()) {
        let done = output_when_closed(Command::new(&executable).arg("info")).expect("it starts");
        assert_eq!(done.status.code(), Some(1), "{}", done.status);
        assert!(String::from_utf8_lossy(&done.stderr).contains("stripped"));
    }
}

#[test]
fn wrong_usage_is_status_2() {
    for arguments in [
        &["build"][..],
        &["frobnicate"],
        &["build", "x", "-o", "y", "--quant", "q5"],
        &["build", "x", "-o", "y", "--quant", "auto"],
        &["build", "x", "-o", "y", "--size-budget", "much"],
        &["build", "x", "-o", "y", "--emit", "object", "--score-text", "z"],
        &["build", "x", "--kv", "f8"],
        &["build", "x", "-o", "y", "--context", "0"],
        &["build", "x", "-o", "y", "--context", "-1"],
        &["build", "x", "-o", "y", "--target-cpu", "z80"],
        &["inspect", "x", "--after", "frobnicate"],
    ] {
        let done = moec(arguments);
        assert_eq!(done.status.code(), Some(2), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    }
}

#[test]
fn a_reader_that_is_gone_is_no_failure() {
    for arguments in [&["targets"][..], &["inspect", text(&numerals()), "--plan"]] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_moec"))
            .args(arguments)
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .expect("moec starts");
        drop(child.stdout.take());
        let done = child.wait_with_output().expect("it ends");
        assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
        assert_eq!(String::from_utf8_lossy(&done.stderr), "", "{arguments:?}");
    }
}

#[test]
fn what_is_no_model_is_refused_by_name() {
    refused(Path::new("/nowhere/at/all"), &[], &["/nowhere/at/all", "no such file"]);
    let empty = TempDir::new().expect("a temporary directory");
    refused(empty.path(), &[], &["config.json"]);
}

#[test]
fn a_missing_tokenizer_is_named() {
    let model = copy();
    std::fs::remove_file(model.path().join("tokenizer.json")).expect("it is there");
    refused(model.path(), &[], &["tokenizer.json", "missing"]);
}

#[test]
fn an_unknown_architecture_is_named() {
    let model = copy();
    let config = std::fs::read_to_string(model.path().join("config.json")).expect("it is there");
    let config = config.replace("MixtralForCausalLM", "MambaForCausalLM").replace("\"mixtral\"", "\"mamba\"");
    std::fs::write(model.path().join("config.json"), config).expect("writable");
    refused(model.path(), &[], &["MambaForCausalLM"]);
}

#[test]
fn truncated_weights_are_named() {
    let model = copy();
    let file = model.path().join("model.safetensors");
    let bytes = std::fs::read(&file).expect("it is there");
    for length in [0, 4, 100, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&file, &bytes[..length]).expect("writable");
        refused(model.path(), &[], &["model.safetensors"]);
    }
}

#[test]
fn an_infinite_weight_is_named() {
    let model = copy();
    let file = model.path().join("model.safetensors");
    let mut bytes = std::fs::read(&file).expect("it is there");
    // The last element of the last tensor becomes bf16 infinity.
    let end = bytes.len();
    bytes[end - 2..].copy_from_slice(&[0x80, 0x7f]);
    std::fs::write(&file, bytes).expect("writable");
    refused(model.path(), &["--quant", "q8"], &["a weight must be a finite number"]);
}

#[test]
fn options_that_do_not_fit_the_model_are_refused() {
    refused(&numerals(), &["--context", "4096"], &["--context 4096", "128"]);
    refused(&numerals(), &["--disable-pass", "select_kernels"], &["select_kernels"]);
}

#[test]
fn an_output_that_cannot_be_written_is_named() {
    let done = moec(&["build", text(&numerals()), "-o", "/proc/m"]);
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(1), "{said}");
    assert!(said.contains("/proc"), "{said}");
    let directory = TempDir::new().expect("a temporary directory");
    let done = moec(&["build", text(&numerals()), "-o", text(directory.path())]);
    assert_eq!(done.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&done.stderr).contains("is a directory"));
    let nowhere = directory.path().join("not/there");
    let done = moec(&["build", text(&numerals()), "-o", text(&nowhere)]);
    assert_eq!(done.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&done.stderr).contains("no such directory"));
}

/// A file size limit stands for a full disk: both make a write fail half-way.
#[test]
fn a_full_disk_leaves_nothing() {
    let out = TempDir::new().expect("a temporary directory");
    let script = format!(
        "trap '' XFSZ; ulimit -f 12000; exec {} build {} -o {}/m --quant f32",
        env!("CARGO_BIN_EXE_moec"),
        text(&numerals()),
        text(out.path())
    );
    let done = Command::new("bash").args(["-c", &script]).output().expect("a shell");
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(1), "{said}");
    assert!(!said.contains("panicked"), "{said}");
    assert_eq!(std::fs::read_dir(out.path()).expect("readable").count(), 0, "something was left: {said}");
}

#[test]
fn inspect_shows_every_stage() {
    let model = numerals();
    let show = |arguments: &[&str]| {
        let mut all = vec!["inspect", text(&model)];
        all.extend(arguments);
        let done = moec(&all);
        assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).expect("text")
    };
    assert!(show(&["--after", "import"]).contains("expert_matmul"));
    let specialized = show(&["--after", "specialize_dispatch"]);
    assert!(specialized.contains("dispatch=decode") && specialized.contains("dispatch=grouped"));
    let plan = show(&["--plan"]);
    assert!(plan.contains("barrier") && plan.contains("@layers.0.experts.gate_up"));
    let kernels = show(&["--kernel", "all"]);
    let name = kernels.lines().find(|name| name.starts_with("matmul")).expect("a product");
    for (cpu, dot) in [("x86-64-v3", "dot_s8s8"), ("znver4", "dot_u8s8")] {
        let kernels = show(&["--target-cpu", cpu, "--kernel", "all"]);
        let name = kernels.lines().find(|name| name.starts_with("matmul")).expect("a product");
        assert!(show(&["--target-cpu", cpu, "--kernel", name]).contains(dot), "{cpu}");
    }
    assert!(show(&["--clif", name]).contains("block0"));
    assert!(!show(&["--asm", name]).is_empty());
}

#[test]
fn a_report_tells_what_was_decided() {
    let out = TempDir::new().expect("a temporary directory");
    let executable = out.path().join("numerals");
    let done = moec(&["build", text(&numerals()), "-o", text(&executable), "--quant", "q4", "--report"]);
    let said = String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    for (name, format, weights) in [("experts", "q4", 4 * 8 * 3 * 96 * 128), ("embedding", "bf16", 512 * 128)] {
        let line =
            said.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name} is not in: {said}"));
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!((words[1], words[2]), (format, weights.to_string().as_str()), "{line}");
    }
    for words in ["a token    reads", "memory ", "barriers", "written "] {
        assert!(said.contains(words), "{words} is not in: {said}");
    }
}

#[test]
fn a_report_sets_what_was_measured_beside_what_was_predicted() {
    let out = TempDir::new().expect("a temporary directory");
    let at = |name: &str| out.path().join(name);
    let good = |arguments: &[&str]| {
        let done = moec(arguments);
        assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).expect("text")
    };
    let (executable, json, bench) = (at("numerals"), at("r.json"), at("bench.json"));
    let model = numerals();
    good(&["build", text(&model), "-o", text(&executable), "--quant", "q4", "--report", text(&json)]);
    let run = output_when_closed(Command::new(&executable).args(["bench", "--profile", "--json", "--repeat", "1"]));
    let run = run.expect("it starts");
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    std::fs::write(&bench, run.stdout).expect("writable");

    let said = good(&["report", text(&json), "--measured", text(&bench)]);
    for words in ["predictions are scaled by that", "predicted  measured", "expert_gate_up", "all together", "written "]
    {
        assert!(said.contains(words), "{words} is not in: {said}");
    }
    let page = at("r.html");
    good(&["report", text(&json), "--measured", text(&bench), "-o", text(&page)]);
    let page = std::fs::read_to_string(page).expect("written");
    assert!(page.starts_with("<!DOCTYPE html>") && page.contains("Predicted and measured"), "{page}");
    // What packing lost is told although the weights are now those of an earlier build.
    let (again, markdown) = (at("again"), at("r.md"));
    good(&[
        "build",
        text(&model),
        "-o",
        text(&again),
        "--quant",
        "q4",
        "--report",
        text(&markdown),
        "--limits",
        "none",
    ]);
    let markdown = std::fs::read_to_string(markdown).expect("written");
    let line = markdown.lines().find(|line| line.starts_with("| experts | q4")).expect("the experts' weights");
    assert!(line.contains(" %") && line.contains("layers."), "{line}");
    assert!(!markdown.contains("Expected times"), "nothing is predicted with --limits none");
    // Of the model itself, for what was measured: another prompt.
    let short = output_when_closed(Command::new(&executable).args([
        "bench",
        "--profile",
        "--json",
        "--repeat",
        "1",
        "--prompt-tokens",
        "40",
        "--threads",
        "1",
    ]));
    std::fs::write(&bench, short.expect("it starts").stdout).expect("writable");
    let refused = moec(&["report", text(&json), "--measured", text(&bench)]);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("does not belong to") && said.contains("give the model"), "{said}");
    let said = good(&["report", text(&model), "--quant", "q4", "--measured", text(&bench)]);
    assert!(said.contains("prefill of 40 tokens"), "{said}");
}

#[test]
fn bits_by_heat_are_chosen_within_a_budget_and_scored() {
    let out = TempDir::new().expect("a temporary directory");
    let path = |name: &str| out.path().join(name);
    let (first, built, heat, words, report) = (path("a"), path("m"), path("h.json"), path("t.txt"), path("r.json"));
    std::fs::write(&words, "fr 1987 = mille neuf cent quatre-vingt-sept\nde 21 = einundzwanzig\n").expect("writable");
    let model = numerals();
    let done = moec(&["build", text(&model), "-o", text(&first), "--quant", "q4"]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let score = |executable: &Path, more: &[&str]| {
        let mut command = Command::new(executable);
        let done = output_when_closed(command.args(["score", "--file", text(&words)]).args(more)).expect("it starts");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let printed: serde_json::Value = serde_json::from_slice(&done.stdout).expect("JSON");
        printed["mean_nll"].as_f64().expect("a number")
    };
    let all_cold = score(&first, &["--expert-stats", text(&heat)]);

    let with_budget = |budget: &str| {
        let arguments = ["--quant", "q4,experts=auto", "--expert-profile", text(&heat), "--size-budget", budget];
        let scored = ["--score-text", text(&words), "--report", text(&report), "--limits", "none"];
        moec(&[&["build", text(&model), "-o", text(&built)][..], &arguments, &scored].concat())
    };
    let done = with_budget("1kB");
    let said = String::from_utf8_lossy(&done.stderr).to_string();
    assert_eq!(done.status.code(), Some(1), "{said}");
    let (_, rest) = said.split_once("the smallest that this model can be is ").expect("it says how much is needed");
    let (_, rest) = rest.split_once('(').expect("in bytes");
    let smallest: u64 = rest.split_once(" bytes").expect("in bytes").0.parse().expect("a number");
    let budget = smallest + 250_000;
    let done = with_budget(&budget.to_string());
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success() && said.contains("experts are q8, the others q4"), "{said}");

    let told = moec::report::read(&report).unwrap_or_else(|e| panic!("{e}"));
    assert!(told.memory.weights <= budget && told.memory.weights > smallest);
    let experts = told.experts.expect("there was a profile");
    let choice = experts.by_heat.expect("bits by heat");
    assert_eq!((choice.budget, choice.all_cold), (budget, smallest));
    assert!(choice.covered > 0.0 && choice.covered < 1.0, "{}", choice.covered);
    let scores = told.scores.expect("a text was scored");
    let of = |i: usize| (scores.of[i].what.as_str(), scores.of[i].mean_nll, scores.of[i].weights);
    assert_eq!(scores.of.len(), 3, "{said}");
    assert_eq!(of(0), ("as built", score(&built, &[]), told.memory.weights));
    // A profile moves experts, but no bit of a result.
    assert_eq!(of(1), ("experts=q4", all_cold, smallest));
    assert_eq!((of(2).0, of(2).2), ("experts=q8", choice.all_hot));
    let more = scores.of[1].more.expect("a difference");
    assert!((more.mean - (of(1).1 - of(0).1)).abs() < 1e-12 && more.standard_error > 0.0);
    assert_eq!(std::fs::read_dir(out.path()).expect("readable").count(), 5, "variants are gone");

    // What cannot be read is told before the work.
    refused(&model, &["--score-text", "/nowhere/t.txt"], &["cannot read /nowhere/t.txt"]);
}

#[test]
fn report_may_stand_before_the_model_and_names_are_checked_first() {
    let out = TempDir::new().expect("a temporary directory");
    let output = out.path().join("m");
    let done = moec(&["build", "--report", text(&numerals()), "-o", text(&output)]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert!(String::from_utf8_lossy(&done.stdout).starts_with("weights "));
    std::fs::remove_file(&output).expect("it was built");
    for (arguments, words) in [
        (
            vec!["build", text(&numerals()), "-o", text(&output), "--report", "r.pdf"],
            "r.pdf: a report is written as .html",
        ),
        (vec!["build", "-o", text(&output), "--report", "r.html"], "name the model"),
        (vec!["report", text(&numerals()), "-o", "r.txt"], "r.txt: a report is written as .html"),
    ] {
        let done = moec(&arguments);
        let said = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(2), "{said}");
        assert!(said.contains(words), "{said}");
    }
    assert!(!output.exists(), "nothing is built before the report's name is known to be good");
}

#[test]
fn targets_lists_this_machine() {
    let done = moec(&["targets"]);
    assert!(done.status.success());
    assert!(String::from_utf8_lossy(&done.stdout).contains("this machine"));
}
