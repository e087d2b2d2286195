//! A compiled model as a service: the answers of `serve` are those of the model, to the last bit, whatever else it is doing.
//! The model is `examples/numerals`, which has right answers.

#[path = "../../runtime/app/tests/harness/http.rs"]
#[allow(dead_code)]
mod http;

use http::{Serving, read};
use moec_tests::{Compiled, build};
use serde_json::{Value, json};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

fn numerals() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/numerals")
}

/// Compiled once for all tests.
static MODEL: LazyLock<Arc<Compiled>> = LazyLock::new(|| Arc::new(build(&numerals(), "q8", "f16")));

fn serve(args: &[&str]) -> Serving {
    let model = MODEL.clone();
    let mut command = Command::new(&model.path);
    command.args(["serve", "--port", "0"]).args(args);
    Serving::start_server(command, model)
}

/// Questions with their answers.
fn held_out(count: usize) -> Vec<(String, String)> {
    let text = std::fs::read_to_string(numerals().join("heldout.jsonl")).expect("it ships with the model");
    let line = |line: &str| {
        let value: Value = serde_json::from_str(line).expect("a line of JSON");
        let text = |key: &str| value[key].as_str().expect("a string").to_owned();
        (text("prompt"), text("answer"))
    };
    // From all over the file, so that all languages and lengths come.
    let lines: Vec<&str> = text.lines().collect();
    (0..count).map(|i| line(lines[i * 997 % lines.len()])).collect()
}

/// Requests of all kinds, each with a seed of its own. Some prompts fill a page and begin alike.
fn requests() -> Vec<Value> {
    let questions = held_out(24);
    let long = |i: usize| format!("{} {}", "en 12 = twelve ".repeat(2 + i % 3), "7".repeat(34 + i));
    (0..48usize)
        .map(|i| {
            let prompt = if i % 2 == 0 { questions[i / 2].0.clone() } else { long(i % 7) };
            json!({
                "prompt": prompt, "max_tokens": 5 + i % 20, "temperature": ([0.0, 1.0, 2.0][i % 3]), "seed": i, "logprobs": 3,
                "frequency_penalty": if i % 5 == 0 { 0.5 } else { 0.0 }, "ignore_eos": i % 4 == 1,
            })
        })
        .collect()
}

/// All that an answer says: text, tokens, log-probabilities to the last bit, and how it ends.
fn answer(server: &Serving, request: &Value) -> String {
    server.post("/v1/completions", request).ok()["choices"].to_string()
}

#[test]
fn answers_are_the_same_bits_alone_and_in_company() {
    let requests = requests();
    let server = serve(&["--no-prefix-cache", "--parallel", "1"]);
    let alone: Vec<String> = requests.iter().map(|request| answer(&server, request)).collect();
    drop(server);
    // Two pages hold one context: three force requests to wait for each other and to be computed again.
    let tight = format!("{}B", 3 * page_bytes());
    for args in [
        &["--parallel", "16"][..],
        &["--parallel", "16", "--threads", "1", "--chunk", "7"],
        &["--parallel", "5", "--no-prefix-cache"],
        &["--parallel", "16", "--kv-memory", &tight],
    ] {
        let server = serve(args);
        // The first round finds the prefix cache cold, the second one warm.
        for round in 0..2 {
            let company: Vec<String> = std::thread::scope(|scope| {
                let server = &server;
                let ask = |request| scope.spawn(move || answer(server, request));
                let threads: Vec<_> = requests.iter().map(ask).collect();
                threads.into_iter().map(|thread| thread.join().expect("an answer")).collect()
            });
            for (i, (alone, company)) in alone.iter().zip(&company).enumerate() {
                assert_eq!(alone, company, "{args:?}, round {round}, request {i}: {}", requests[i]);
            }
        }
        server.until("the figures are brought up to date", || server.figure("moec_requests_running") == 0.0);
        assert_eq!(
            server.figure("moec_prefix_hit_tokens_total") > 0.0,
            !args.contains(&"--no-prefix-cache"),
            "{args:?}"
        );
        if args.contains(&"--kv-memory") {
            assert!(server.figure("moec_preemptions_total") > 0.0, "nothing was preempted");
        }
    }
}

fn page_bytes() -> u64 {
    let info: Value = serde_json::from_str(&MODEL.run(&["info", "--json"])).expect("JSON");
    info["memory"]["kv_bytes_per_token"].as_u64().expect("a number") * 64
}

#[test]
fn answers_are_those_of_the_command_line() {
    let server = serve(&[]);
    for (prompt, right) in held_out(10) {
        let body = json!({ "prompt": prompt, "temperature": 0, "max_tokens": 100 });
        let text = server.post("/v1/completions", &body).ok()["choices"][0]["text"].clone();
        assert_eq!(text.as_str().map(str::trim), Some(right.as_str()), "{prompt}");
        assert_eq!(MODEL.run(&["generate", &prompt]).trim(), right);
    }
    let sampled =
        ["generate", "fr 2024 =", "--temperature", "2", "--seed", "3", "--top-k", "0", "--top-p", "1", "--min-p", "0"];
    let body = json!({ "prompt": "fr 2024 =", "temperature": 2, "seed": 3, "max_tokens": 100 });
    let text = server.post("/v1/completions", &body).ok()["choices"][0]["text"].clone();
    assert_eq!(text.as_str().map(str::trim), Some(MODEL.run(&sampled).trim()));
}

/// 64 clients, 1,000 streamed requests, a third of which are given up: nothing is lost or mixed up, and memory stays bounded.
#[test]
fn a_crowd_is_served() {
    const CLIENTS: usize = 64;
    const REQUESTS: usize = 1000;
    let server = serve(&["--parallel", "32", "--queue", "64"]);
    let questions = held_out(100);
    let question = |i: usize| {
        let (prompt, right) = &questions[i % questions.len()];
        (json!({ "prompt": prompt, "temperature": 0, "max_tokens": 100, "stream": true }), right)
    };
    // One client first: its speed, and the memory with everything warm.
    let started = Instant::now();
    let before = server.figure("moec_generated_tokens_total");
    for i in 0..100 {
        let (body, right) = question(i);
        assert_eq!(text_of(&server.post("/v1/completions", &body).events()).trim(), right);
    }
    let one = (server.figure("moec_generated_tokens_total") - before) / started.elapsed().as_secs_f64();
    let memory = server.memory();

    let next = AtomicUsize::new(0);
    let started = Instant::now();
    let before = server.figure("moec_generated_tokens_total");
    let mut first_tokens: Vec<Duration> = std::thread::scope(|scope| {
        let client = || {
            let mut waits = Vec::new();
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i >= REQUESTS {
                    return waits;
                }
                let (body, right) = question(i * 7);
                let asked = Instant::now();
                let mut stream = server.start("/v1/completions", &body);
                if i % 3 == 2 {
                    // Some leave at once, some in the middle.
                    let mut some = vec![0; i % 5 * 150];
                    stream.read_exact(&mut some).ok();
                    continue;
                }
                let mut first = [0; 200];
                stream.read_exact(&mut first).expect("the head and the beginning of an answer");
                waits.push(asked.elapsed());
                let mut rest = Vec::new();
                stream.read_to_end(&mut rest).expect("the rest of an answer");
                let whole = String::from_utf8([&first[..], &rest].concat()).expect("text");
                assert!(whole.starts_with("HTTP/1.1 200") && whole.contains("[DONE]"), "{whole}");
                assert_eq!(text_of(&events_of(&whole)).trim(), right, "request {i}");
            }
        };
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(client)).collect();
        clients.into_iter().flat_map(|client| client.join().expect("a client")).collect()
    });
    let seconds = started.elapsed().as_secs_f64();
    let crowd = (server.figure("moec_generated_tokens_total") - before) / seconds;
    server.until("nothing is left", || server.get("/health").ok()["requests"] == 0);
    first_tokens.sort_unstable();
    let quantile = |q: f64| first_tokens[((first_tokens.len() - 1) as f64 * q) as usize];
    println!(
        "one client: {one:.0} tokens/s; {CLIENTS} clients: {crowd:.0} tokens/s; first token after {:?} at the median, {:?} at the \
         99th percentile",
        quantile(0.5),
        quantile(0.99)
    );
    assert_eq!(first_tokens.len(), REQUESTS - REQUESTS / 3);
    let grown = server.memory().saturating_sub(memory);
    assert!(grown < 64 << 20, "{grown} bytes more after {REQUESTS} requests");
    assert_eq!(server.figure("moec_kv_pages_in_use"), server.figure("moec_kv_pages_cached"));
}

fn events_of(whole: &str) -> Vec<Value> {
    let data = whole.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]");
    data.map(|data| serde_json::from_str(data).expect("a chunk of JSON")).collect()
}

fn text_of(events: &[Value]) -> String {
    events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect()
}

/// 1,000 answers at temperature 1, of a model that was never trained on JSON: all fit the schema.
#[test]
fn a_schema_is_kept_a_thousand_times() {
    let server = serve(&["--parallel", "32", "--queue", "1000"]);
    let schema = json!({
        "type": "object",
        "properties": {
            "number": { "type": "integer", "minimum": 0, "maximum": 999_999 },
            "language": { "enum": ["en", "fr", "it", "de", "es"] },
            "parts": { "type": "array", "items": { "type": "string", "maxLength": 4 }, "maxItems": 2 },
            "even": { "type": "boolean" },
        },
        "required": ["number", "language", "parts", "even"],
        "additionalProperties": false,
    });
    let checked = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for seed in 0..20 {
            let (server, schema, checked) = (&server, &schema, &checked);
            scope.spawn(move || {
                let format = json!({ "type": "json_schema", "json_schema": { "name": "n", "schema": schema, "strict": true } });
                let body = json!({
                    "prompt": "fr 1987 =", "temperature": 1, "seed": seed * 1000, "n": 50, "max_tokens": 118, "response_format": format,
                });
                let answer = server.post("/v1/completions", &body).ok();
                for choice in answer["choices"].as_array().expect("choices") {
                    let text = choice["text"].as_str().expect("a text");
                    assert_eq!(choice["finish_reason"], "stop", "{text}");
                    let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
                    let fits = value["number"].as_u64().is_some_and(|number| number <= 999_999)
                        && schema["properties"]["language"]["enum"].as_array().is_some_and(|all| all.contains(&value["language"]))
                        && value["parts"].as_array().is_some_and(|parts| {
                            parts.len() <= 2 && parts.iter().all(|part| part.as_str().is_some_and(|s| s.chars().count() <= 4))
                        })
                        && value["even"].is_boolean()
                        && value.as_object().is_some_and(|object| object.len() == 4);
                    assert!(fits, "{text}");
                    checked.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(checked.into_inner(), 1000);
}

/// A chat model made of numerals: what its template writes is what the model reads.
#[test]
fn chats_go_through_the_models_template() {
    let directory = tempfile::TempDir::new().expect("a temporary directory");
    for file in ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(numerals().join(file), directory.path().join(file)).expect("a copy");
    }
    let text = std::fs::read_to_string(numerals().join("tokenizer_config.json")).expect("it ships with the model");
    let mut config: Value = serde_json::from_str(&text).expect("JSON");
    config["chat_template"] = "{{ bos_token }}{{ messages[-1]['content'].strip() }}".into();
    std::fs::write(directory.path().join("tokenizer_config.json"), config.to_string()).expect("a file");
    let model = build(directory.path(), "none", "f16");
    let mut command = Command::new(&model.path);
    command.args(["serve", "--port", "0"]);
    let server = Serving::start_server(command, model);
    let body = json!({ "messages": [{ "role": "user", "content": " fr 1987 = " }], "temperature": 0 });
    let answer = server.post("/v1/chat/completions", &body).ok();
    assert_eq!(answer["choices"][0]["message"]["content"], "mille neuf cent quatre-vingt-sept");
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    let streamed = read(server.start("/v1/chat/completions", &{
        let mut body = body.clone();
        body["stream"] = json!(true);
        body
    }));
    let text: String =
        streamed.events().iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, "mille neuf cent quatre-vingt-sept");
}
