//! `serve`, over HTTP, of a compiled model whose steps are written by hand: what it answers, what it refuses and how, and what it
//! does when clients or the machine misbehave.
#![allow(missing_docs)]

mod harness;

use harness::fake::{Shape, expected_hidden, expected_logits};
use harness::http::{Serving, read};
use harness::{Model, greedy, shape, tokenizer};
use moec_runtime::logprobs::TokenLogprobs;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

fn main() -> ExitCode {
    harness::main(TESTS)
}

tests! {
    completes_texts_and_ids tells_probabilities answers_conversations streams_what_it_answers_whole embeds_texts
    tells_about_itself keeps_answers_in_form calls_tools wrong_requests_are_named keys_are_checked
    who_leaves_frees_the_place slow_readers_hold_nobody_up overload_is_429 sigterm_finishes_what_runs
    the_second_signal_and_the_time_limit_end_it slow_heads_and_ports_in_use
}

/// A running server of the model called `model`; a slow one takes 20 ms for a step.
fn start(model: &str, args: &[&str], slow: bool) -> Serving {
    let model = Model::new(model);
    let mut command = model.command(&[&["serve", "--port", "0", "--threads", "1"], args].concat());
    if slow {
        command.env("FAKE_SLOW", "1");
    }
    Serving::start_server(command, model)
}

fn serve(model: &str, args: &[&str]) -> Serving {
    start(model, args, false)
}

fn serve_slowly(model: &str, args: &[&str]) -> Serving {
    start(model, args, true)
}

fn completion(body: Value) -> Value {
    let mut whole = json!({ "prompt": "Free software", "max_tokens": 8, "temperature": 0, "ignore_eos": true });
    whole.as_object_mut().unwrap().extend(body.as_object().unwrap().clone());
    whole
}

/// What the fake model goes on with, as text after `prompt`.
fn continuation(prompt: &[u32], count: usize) -> String {
    let tokenizer = tokenizer();
    let mut stream = tokenizer.stream_after(prompt).unwrap();
    let ids = greedy(&Shape::default(), prompt, count);
    let text: String = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
    text + &stream.finish().unwrap()
}

fn completes_texts_and_ids() {
    let server = serve("fake", &[]);
    let prompt = tokenizer().encode("Free software", true).unwrap();
    let text = continuation(&prompt, 8);
    let answer = server.post("/v1/completions", &completion(json!({}))).ok();
    assert_eq!((&answer["object"], &answer["model"]), (&json!("text_completion"), &json!("fake")));
    assert_eq!(answer["choices"][0], json!({ "index": 0, "text": text, "logprobs": null, "finish_reason": "length" }));
    let usage = json!({
        "prompt_tokens": prompt.len(), "completion_tokens": 8, "total_tokens": prompt.len() + 8,
        "prompt_tokens_details": { "cached_tokens": 0 },
    });
    assert_eq!(answer["usage"], usage);
    // Several prompts of each kind, several answers to each.
    let texts = |body: Value| -> Vec<String> {
        let answer = server.post("/v1/completions", &completion(body)).ok();
        answer["choices"].as_array().unwrap().iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect()
    };
    let other = continuation(&tokenizer().encode("a", true).unwrap(), 8);
    assert_eq!(
        texts(json!({ "prompt": ["Free software", "a"], "n": 2 })),
        [&text, &text, &other, &other].map(String::as_str)
    );
    assert_eq!(texts(json!({ "prompt": prompt })), [text.as_str()]);
    assert_eq!(texts(json!({ "prompt": [prompt, [1, 2, 3]] })), [text.clone(), continuation(&[1, 2, 3], 8)]);
    assert_eq!(texts(json!({ "echo": true })), [format!("Free software{text}")]);
    assert_eq!(texts(json!({ "echo": true, "max_tokens": 0 })), ["Free software"]);
    // Stop strings end an answer before them, wherever tokens end.
    let starts: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
    let stop = &text[starts[3]..starts[5]];
    let stopped = server.post("/v1/completions", &completion(json!({ "stop": [stop, "never"] }))).ok();
    assert_eq!(stopped["choices"][0]["text"], text[..text.find(stop).unwrap()]);
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    assert!(stopped["usage"]["completion_tokens"].as_u64().unwrap() < 8, "{stopped}");
    // Seeds repeat, and each answer of several has its own.
    let hot = |seed: u64| texts(json!({ "temperature": 1.5, "seed": seed, "n": 3 }));
    assert_eq!(hot(1), hot(1));
    assert_ne!(hot(1), hot(2));
    assert!(hot(1)[0] != hot(1)[1] && hot(1)[1] != hot(1)[2]);
    assert_eq!(texts(json!({ "temperature": 1.5, "top_k": 1 })), [text.as_str()]);
    let biased = texts(json!({ "logit_bias": { "5": 100 }, "max_tokens": 3 }));
    assert_eq!(biased, [tokenizer().decode(&[5, 5, 5]).unwrap()]);
    // The model's own end.
    let ending = serve("fake-ending", &[]);
    let body = json!({ "prompt": [1, 2, 3], "temperature": 0, "max_tokens": 50 });
    let ended = ending.post("/v1/completions", &body).ok();
    assert_eq!(
        (&ended["choices"][0]["finish_reason"], &ended["usage"]["completion_tokens"]),
        (&json!("stop"), &json!(5))
    );
    assert_eq!(ended["choices"][0]["text"], continuation(&[1, 2, 3], 4));
}

fn tells_probabilities() {
    let server = serve("fake", &[]);
    let prompt = [1u32, 70, 300, 9];
    let ids = greedy(&Shape::default(), &prompt, 3);
    let all: Vec<u32> = prompt.iter().chain(&ids).copied().collect();
    let body = json!({ "prompt": prompt, "max_tokens": 3, "logprobs": 2, "echo": true });
    let answer = server.post("/v1/completions", &completion(body)).ok();
    let found = &answer["choices"][0]["logprobs"];
    assert_eq!(found["token_logprobs"][0], Value::Null);
    assert_eq!(found["tokens"].as_array().unwrap().len(), 7);
    for n in 1..7 {
        let expected = TokenLogprobs::new(&expected_logits(&Shape::default(), &all[..n]), all[n], 2);
        let logprob = found["token_logprobs"][n].as_f64().unwrap();
        assert!((logprob - expected.logprob).abs() < 1e-9, "{n}");
        let best =
            found["top_logprobs"][n].as_object().unwrap().values().filter_map(Value::as_f64).fold(f64::MIN, f64::max);
        assert!((best - expected.top[0].1).abs() < 1e-9, "{n}");
    }
    let chat = serve("fake-chat", &[]);
    let body = json!({
        "messages": [{ "role": "user", "content": "hello" }], "temperature": 0, "max_tokens": 3, "logprobs": true, "top_logprobs": 2,
    });
    let answer = chat.post("/v1/chat/completions", &body).ok();
    let prompt = tokenizer().encode("<s>[user] hello[assistant]", false).unwrap();
    let ids = greedy(&Shape::default(), &prompt, 3);
    let entries = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(entries.len(), 3);
    for (n, entry) in entries.iter().enumerate() {
        let before: Vec<u32> = prompt.iter().chain(&ids[..n]).copied().collect();
        let expected = TokenLogprobs::new(&expected_logits(&Shape::default(), &before), ids[n], 2);
        assert!((entry["logprob"].as_f64().unwrap() - expected.logprob).abs() < 1e-9);
        assert_eq!(entry["top_logprobs"].as_array().unwrap().len(), 2);
        assert_eq!(entry["bytes"], json!(tokenizer().token_bytes(ids[n])));
    }
}

fn answers_conversations() {
    let server = serve("fake-chat", &[]);
    let messages = json!([
        { "role": "system", "content": "be kind" },
        { "role": "user", "content": [{ "type": "text", "text": "hello" }] },
        { "role": "assistant", "content": "hi", "refusal": null },
        { "role": "user", "content": "how?" },
    ]);
    let text = "<s>[system] be kind[user] hello[assistant] hi[user] how?[assistant]";
    let prompt = tokenizer().encode(text, false).unwrap();
    let applied = server.post("/apply-template", &json!({ "messages": messages })).ok();
    assert_eq!(applied, json!({ "prompt": text, "tokens": prompt }));
    let body = json!({ "messages": messages, "temperature": 0, "max_completion_tokens": 6, "n": 2, "store": false, "user": null });
    let answer = server.post("/v1/chat/completions", &body).ok();
    let expected = tokenizer().decode(&greedy(&Shape::default(), &prompt, 6)).unwrap();
    for index in 0..2 {
        assert_eq!(
            answer["choices"][index],
            json!({ "index": index, "message": { "role": "assistant", "content": expected }, "logprobs": null, "finish_reason": "length" })
        );
    }
    assert_eq!(
        (&answer["object"], &answer["usage"]["prompt_tokens"]),
        (&json!("chat.completion"), &json!(prompt.len()))
    );
    // A long conversation is read once.
    let long = "x".repeat(300);
    let body = json!({ "messages": [{ "role": "user", "content": long }], "max_tokens": 1 });
    let cached =
        || server.post("/v1/chat/completions", &body).ok()["usage"]["prompt_tokens_details"]["cached_tokens"].clone();
    let tokens = tokenizer().encode(&format!("<s>[user] {long}[assistant]"), false).unwrap().len();
    assert_eq!((cached(), cached()), (json!(0), json!((tokens - 1) / 64 * 64)));
    // What the template refuses, in its words; and a model without one.
    let twice = json!({ "messages": [{ "role": "user", "content": "a" }, { "role": "system", "content": "b" }] });
    let (status, param, message) = server.post("/v1/chat/completions", &twice).error();
    assert_eq!((status, param.as_str()), (400, "messages"));
    assert!(message.contains("only the first message may be of the system"), "{message}");
    let (status, _, message) = serve("fake", &[]).post("/v1/chat/completions", &body).error();
    assert!(status == 400 && message.contains("no chat template"), "{message}");
}

fn streams_what_it_answers_whole() {
    let server = serve("fake-chat", &[]);
    let prompt: Vec<u32> = tokenizer().encode("Free software", true).unwrap();
    for (temperature, stop) in [(0.0, json!(null)), (1.3, json!(["zz", "Q"]))] {
        let body = json!({
            "prompt": [prompt, [1, 2, 3]], "n": 2, "seed": 5, "temperature": temperature, "stop": stop, "max_tokens": 40,
            "logprobs": 1, "echo": true,
        });
        let whole = server.post("/v1/completions", &body).ok();
        let mut streaming = body.clone();
        streaming["stream"] = json!(true);
        streaming["stream_options"] = json!({ "include_usage": true });
        let reply = server.post("/v1/completions", &streaming);
        assert_eq!(reply.header("content-type"), Some("text/event-stream"));
        let mut events = reply.events();
        let last = events.pop().unwrap();
        assert_eq!((&last["usage"]["total_tokens"], &last["choices"]), (&whole["usage"]["total_tokens"], &json!([])));
        for (index, choice) in whole["choices"].as_array().unwrap().iter().enumerate() {
            let mine: Vec<&Value> = events.iter().map(|e| &e["choices"][0]).filter(|c| c["index"] == index).collect();
            let text: String = mine.iter().map(|c| c["text"].as_str().unwrap()).collect();
            assert_eq!(choice["text"], text);
            for key in ["tokens", "token_logprobs", "text_offset"] {
                let lists = mine.iter().flat_map(|c| c["logprobs"][key].as_array().unwrap().clone());
                assert_eq!(choice["logprobs"][key], lists.collect::<Value>(), "{key}");
            }
            let reasons: Vec<&Value> = mine.iter().map(|c| &c["finish_reason"]).filter(|r| !r.is_null()).collect();
            assert_eq!(reasons, [&choice["finish_reason"]]);
        }
    }
    let body =
        json!({ "messages": [{ "role": "user", "content": "hello" }], "temperature": 0, "max_tokens": 20, "n": 2 });
    let whole = server.post("/v1/chat/completions", &body).ok();
    let mut streaming = body.clone();
    streaming["stream"] = json!(true);
    let events = server.post("/v1/chat/completions", &streaming).events();
    for index in 0..2 {
        let mine: Vec<&Value> = events.iter().map(|e| &e["choices"][0]).filter(|c| c["index"] == index).collect();
        assert_eq!(mine[0]["delta"], json!({ "role": "assistant", "content": "" }));
        let text: String = mine.iter().filter_map(|c| c["delta"]["content"].as_str()).collect();
        assert_eq!(whole["choices"][index]["message"]["content"], text);
        assert_eq!(mine.last().unwrap()["finish_reason"], "length");
    }
}

fn embeds_texts() {
    let server = serve("fake", &[]);
    let ids = tokenizer().encode("Free software", true).unwrap();
    let last = expected_hidden(&Shape::default(), &ids);
    let vectors = |body: Value| -> Vec<Vec<f32>> {
        let answer = server.post("/v1/embeddings", &body).ok();
        let vector = |entry: &Value| serde_json::from_value(entry["embedding"].clone()).unwrap();
        answer["data"].as_array().unwrap().iter().map(vector).collect()
    };
    let plain = json!({ "input": "Free software", "pooling": "last", "normalize": false });
    assert_eq!(vectors(plain), std::slice::from_ref(&last));
    let lists = json!({ "input": [ids, [1, 5]], "pooling": "last", "normalize": false, "dimensions": 32 });
    assert_eq!(vectors(lists), [last, expected_hidden(&Shape::default(), &[1, 5])]);
    // The same as on the command line, and as base64.
    let normal = vectors(json!({ "input": ["Free software"] })).remove(0);
    let line = Model::new("fake").stdout(&["embed", "Free software"]);
    assert_eq!(normal, serde_json::from_str::<Vec<f32>>(&line).unwrap());
    let answer = server.post("/v1/embeddings", &json!({ "input": "Free software", "encoding_format": "base64" })).ok();
    use base64::Engine;
    let bytes =
        base64::engine::general_purpose::STANDARD.decode(answer["data"][0]["embedding"].as_str().unwrap()).unwrap();
    let values: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    assert_eq!(values, normal);
    assert_eq!(answer["usage"], json!({ "prompt_tokens": 12, "completion_tokens": 0, "total_tokens": 12 }));
}

fn tells_about_itself() {
    let server = serve("fake-chat", &["--model-name", "teller", "--context", "500"]);
    let models = server.get("/v1/models").ok();
    assert_eq!((&models["data"][0]["id"], &models["data"][0]["max_model_len"]), (&json!("teller"), &json!(500)));
    assert_eq!(server.get("/v1/models/teller").ok()["id"], "teller");
    assert_eq!(server.get("/v1/models/other").error().0, 404);
    assert_eq!(server.get("/health").ok()["status"], "ok");
    let tokens = server.post("/tokenize", &json!({ "content": "é" })).ok();
    assert_eq!(tokens, json!({ "tokens": [1, 333, 198, 172], "count": 4, "max_model_len": 500 }));
    let plain = server.post("/tokenize", &json!({ "text": "é", "add_special_tokens": false })).ok();
    assert_eq!(server.post("/detokenize", &json!({ "tokens": plain["tokens"] })).ok()["content"], "é");
    let page = server.get("/");
    assert_eq!((page.status, page.header("content-type")), (200, Some("text/html; charset=utf-8")));
    assert!(page.body.contains("v1/chat/completions") && !page.body.contains("http://") | page.body.contains("w3.org"));
    server.post("/v1/completions", &completion(json!({ "prompt": "a", "max_tokens": 5 }))).ok();
    server.until("the figures are brought up to date", || server.figure("moec_requests_running") == 0.0);
    assert_eq!(server.figure("moec_generated_tokens_total"), 5.0);
    assert_eq!(server.figure("moec_time_to_first_token_seconds_count"), 1.0);
    assert_eq!(server.figure("moec_time_per_token_seconds_count"), 4.0);
    assert_eq!(server.figure("moec_requests_total{endpoint=\"/v1/completions\",status=\"200\"}"), 1.0);
    // Every path of the description answers, if only with an error of its own.
    let description = server.get("/openapi.json").ok();
    let paths = description["paths"].as_object().unwrap();
    assert!(paths.len() >= 10, "{paths:?}");
    for (path, methods) in paths {
        let path = path.replace("{id}", "teller");
        let reply = match methods.get("post") {
            Some(_) => server.post(&path, &json!({})),
            None => server.get(&path),
        };
        assert!(reply.status == 200 || reply.error().0 == 400, "{path}: {}", reply.body);
    }
}

fn keeps_answers_in_form() {
    let server = serve("fake-chat", &[]);
    let schema = json!({
        "type": "object",
        "properties": { "name": { "type": "string", "maxLength": 8 }, "age": { "type": "integer", "minimum": 0, "maximum": 99 } },
        "required": ["name", "age"], "additionalProperties": false,
    });
    let ask = |format: Value, seed: u64| {
        let body = json!({
            "messages": [{ "role": "user", "content": "who?" }], "seed": seed, "temperature": 1, "max_tokens": 200, "response_format": format,
        });
        let answer = server.post("/v1/chat/completions", &body).ok();
        let choice = &answer["choices"][0];
        assert_eq!(choice["finish_reason"], "stop", "{answer}");
        choice["message"]["content"].as_str().unwrap().to_owned()
    };
    for seed in 0..20 {
        let text = ask(
            json!({ "type": "json_schema", "json_schema": { "name": "person", "schema": schema, "strict": true } }),
            seed,
        );
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        assert!(value["name"].as_str().unwrap().chars().count() <= 8, "{text}");
        assert!(value["age"].as_u64().unwrap() <= 99 && value.as_object().unwrap().len() == 2, "{text}");
    }
    let body =
        completion(json!({ "temperature": 1, "ignore_eos": false, "grammar": "start: (\"ab\" | \"cd\") \"!\"" }));
    let answer = server.post("/v1/completions", &body).ok();
    assert!(["ab!", "cd!"].contains(&answer["choices"][0]["text"].as_str().unwrap()), "{answer}");
    let wrong =
        server.post("/v1/completions", &completion(json!({ "ignore_eos": false, "grammar": "start: (" }))).error();
    assert_eq!((wrong.0, wrong.1.as_str()), (400, "grammar"));
    let format = json!({ "type": "json_schema", "json_schema": { "schema": { "type": "number", "multipleOf": "x" } } });
    let wrong =
        server.post("/v1/completions", &completion(json!({ "ignore_eos": false, "response_format": format }))).error();
    assert_eq!((wrong.0, wrong.1.as_str()), (400, "response_format"), "{}", wrong.2);
}

fn calls_tools() {
    let server = serve("fake-tools", &[]);
    let parameters = json!({
        "type": "object", "properties": { "digit": { "type": "integer", "minimum": 0, "maximum": 9 } }, "required": ["digit"],
        "additionalProperties": false,
    });
    let tool = json!({ "type": "function", "function": { "name": "press", "parameters": parameters } });
    let messages = json!([{ "role": "user", "content": "go" }]);
    let applied = server.post("/apply-template", &json!({ "messages": messages, "tools": [tool] })).ok();
    assert!(applied["prompt"].as_str().unwrap().starts_with("<s>[tools] [{\"type\": \"function\""), "{applied}");
    let body =
        json!({ "messages": messages, "tools": [tool], "tool_choice": "required", "max_tokens": 300, "seed": 1 });
    let check = |call: &Value| {
        assert_eq!((&call["type"], &call["function"]["name"]), (&json!("function"), &json!("press")));
        let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
        assert!(arguments["digit"].as_u64().unwrap() <= 9, "{call}");
    };
    let answer = server.post("/v1/chat/completions", &body).ok();
    let choice = &answer["choices"][0];
    assert_eq!(
        (&choice["finish_reason"], &choice["message"]["content"]),
        (&json!("tool_calls"), &Value::Null),
        "{answer}"
    );
    check(&choice["message"]["tool_calls"][0]);
    let mut streaming = body.clone();
    streaming["stream"] = json!(true);
    let events = server.post("/v1/chat/completions", &streaming).events();
    let deltas: Vec<&Value> = events.iter().map(|event| &event["choices"][0]["delta"]).collect();
    assert!(deltas.iter().all(|delta| delta["content"].as_str().is_none_or(str::is_empty)), "{deltas:?}");
    check(&deltas.iter().find(|delta| delta["tool_calls"].is_array()).unwrap()["tool_calls"][0]);
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
    // The call and what came of it go back to the model.
    let mut more = messages.as_array().unwrap().clone();
    more.push(choice["message"].clone());
    more.push(json!({ "role": "tool", "content": "done", "tool_call_id": choice["message"]["tool_calls"][0]["id"] }));
    let applied = server.post("/apply-template", &json!({ "messages": more, "tools": [tool] })).ok();
    assert!(applied["prompt"].as_str().unwrap().ends_with("[tool] done[assistant]"), "{applied}");
}

fn wrong_requests_are_named() {
    let server = serve("fake", &["--max-body", "2kB", "--context", "100"]);
    let json_type = "Content-Type: application/json\r\n";
    let raw = |body: &str| read(server.send("POST", "/v1/completions", json_type, body)).error();
    assert!(raw("{\"prompt\": ").2.contains("not JSON"));
    assert!(raw("[1]").2.contains("JSON object"));
    assert!(raw("").2.contains("not JSON"));
    assert!(raw("{\"prompt\": \"\u{0}\"}").2.contains("not JSON"));
    let deep = "[".repeat(900);
    assert_eq!(raw(&format!("{{\"prompt\": {deep}")).0, 400);
    assert_eq!(raw(&json!({ "prompt": "x".repeat(3000) }).to_string()).0, 413);
    for (body, status, param) in [
        (json!({}), 400, "prompt"),
        (json!({ "prompt": 5 }), 400, "prompt"),
        (json!({ "prompt": [] }), 400, "prompt"),
        (json!({ "prompt": [[]] }), 400, "prompt"),
        (json!({ "prompt": [-1] }), 400, "prompt"),
        (json!({ "prompt": "x", "model": "gpt-9" }), 404, "model"),
        (json!({ "prompt": "x", "model": 3 }), 400, "model"),
        (json!({ "prompt": "x", "temperature": "hot" }), 400, "temperature"),
        (json!({ "prompt": "x", "temperature": -1 }), 400, "temperature"),
        (json!({ "prompt": "x", "max_tokens": 0 }), 400, "max_tokens"),
        (json!({ "prompt": "x", "max_tokens": 1.5 }), 400, "max_tokens"),
        (json!({ "prompt": "x", "frobnicate": true }), 400, "frobnicate"),
        (json!({ "prompt": "x", "best_of": 3 }), 400, "best_of"),
        (json!({ "prompt": "x", "suffix": "y" }), 400, "suffix"),
        (json!({ "prompt": "x", "logprobs": 21 }), 400, "logprobs"),
        (json!({ "prompt": "x", "logit_bias": { "384": 1 } }), 400, "logit_bias"),
        (json!({ "prompt": "x", "stream_options": { "include_usage": true } }), 400, "stream_options"),
        (json!({ "prompt": "x", "response_format": { "type": "xml" } }), 400, "response_format.type"),
    ] {
        let (found, name, message) = server.post("/v1/completions", &body).error();
        assert_eq!((found, name.as_str()), (status, param), "{body}: {message}");
        assert!(message.contains(param) || param == "model", "{body}: {message}");
    }
    let (status, _, message) = server.post("/v1/completions", &json!({ "prompt": [9999] })).error();
    assert!(status == 400 && message.contains("9999"), "{message}");
    let long = json!({ "prompt": vec![5; 90], "max_tokens": 11 });
    let reply = server.post("/v1/completions", &long);
    assert_eq!(reply.json()["error"]["code"], "context_length_exceeded", "{}", reply.body);
    assert!(reply.error().2.contains("101"), "{}", reply.body);
    server.post("/v1/completions", &json!({ "prompt": vec![5; 90], "max_tokens": 10 })).ok();
    for (body, param) in [
        (json!({ "input": "x", "dimensions": 5 }), "dimensions"),
        (json!({ "input": "x", "encoding_format": "hex" }), "encoding_format"),
        (json!({ "input": { "a": 1 } }), "input"),
    ] {
        assert_eq!(server.post("/v1/embeddings", &body).error().1, param, "{body}");
    }
    let chat = serve("fake-chat", &[]);
    let tool = json!({ "type": "function", "function": { "name": "f" } });
    for (body, param) in [
        (json!({}), "messages"),
        (json!({ "messages": "hi" }), "messages"),
        (json!({ "messages": [{ "role": "user", "content": "x" }], "top_logprobs": 2 }), "top_logprobs"),
        (json!({ "messages": [{ "role": "user", "content": "x" }], "tools": [tool] }), "tools"),
        (json!({ "messages": [{ "role": "user", "content": "x" }], "max_tokens": 0 }), "max_tokens"),
        (json!({ "messages": [{ "role": "user", "content": "x" }], "audio": { "voice": "a" } }), "audio"),
        (
            json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url", "image_url": {} }] }] }),
            "messages[0].content[0]",
        ),
    ] {
        assert_eq!(chat.post("/v1/chat/completions", &body).error().1, param, "{body}");
    }
    assert_eq!(server.get("/nowhere").error().0, 404);
    assert_eq!(server.get("/v1/completions").error().0, 405);
    assert_eq!(read(server.send("POST", "/v1/completions", "Content-Type: text/plain\r\n", "{}")).error().0, 415);
    // After all that it still answers.
    server.post("/v1/completions", &json!({ "prompt": "x" })).ok();
}

fn keys_are_checked() {
    let server = serve("fake", &["--api-key", "secret"]);
    let with = |header: &str| read(server.send("GET", "/v1/models", header, "")).status;
    assert_eq!(with(""), 401);
    assert_eq!(with("Authorization: Bearer wrong\r\n"), 401);
    assert_eq!(with("Authorization: Bearer secrets\r\n"), 401);
    assert_eq!(with("Authorization: Bearer secret\r\n"), 200);
    assert_eq!(server.get("/metrics").error().0, 401);
    // What a load balancer and a browser need to begin with.
    assert_eq!((server.get("/health").status, server.get("/").status), (200, 200));
}

fn who_leaves_frees_the_place() {
    let server = serve_slowly("fake", &["--parallel", "1"]);
    // A stream, and an answer in one piece: both are given up when their clients leave.
    for stream in [true, false] {
        let before = server.figure("moec_generated_tokens_total");
        let body = completion(json!({ "max_tokens": 900, "stream": stream }));
        let mut running = server.start("/v1/completions", &body);
        if stream {
            running.read_exact(&mut [0; 400]).unwrap();
        } else {
            server.until("it runs", || server.figure("moec_generated_tokens_total") > before);
        }
        let waiting = server.start("/v1/completions", &body);
        server.until("the second waits", || server.get("/health").ok()["requests"] == 2);
        drop(waiting);
        drop(running);
        let started = Instant::now();
        server.post("/v1/completions", &completion(json!({ "max_tokens": 2 }))).ok();
        // 900 tokens would take 18 s.
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
        server.until("nothing is left", || server.get("/health").ok()["requests"] == 0);
        assert!(server.figure("moec_generated_tokens_total") - before < 300.0);
    }
}

fn slow_readers_hold_nobody_up() {
    let server = serve("fake", &["--parallel", "8"]);
    // Streams whose clients read nothing at all, in answers larger than any socket's buffer is sure to hold.
    let body = completion(json!({ "max_tokens": 900, "stream": true, "logprobs": 20, "n": 2 }));
    let idle: Vec<_> = (0..3).map(|_| server.start("/v1/completions", &body)).collect();
    let whole = server.post("/v1/completions", &body);
    assert!(whole.body.len() > 1_000_000, "{}", whole.body.len());
    for _ in 0..5 {
        server.post("/v1/completions", &completion(json!({ "max_tokens": 20 }))).ok();
    }
    // They get all of it when they read at last.
    for late in idle {
        let count = |body: &str| body.matches("finish_reason\":\"length").count();
        assert_eq!(count(&read(late).body), count(&whole.body));
    }
}

fn overload_is_429() {
    let server = serve_slowly("fake", &["--parallel", "1", "--queue", "1"]);
    let body = completion(json!({ "max_tokens": 60 }));
    let first = server.start("/v1/completions", &body);
    let second = server.start("/v1/completions", &body);
    server.until("one runs and one waits", || server.get("/health").ok()["requests"] == 2);
    let refused = server.post("/v1/completions", &body);
    let retry_after = |reply: &harness::http::Reply| reply.header("retry-after").unwrap().parse::<u64>().unwrap();
    assert_eq!(refused.error().0, 429);
    assert!((1..=60).contains(&retry_after(&refused)));
    assert_eq!(server.post("/v1/embeddings", &json!({ "input": "x" })).error().0, 429);
    let whole = |reply: harness::http::Reply| reply.ok()["usage"]["completion_tokens"].clone();
    assert_eq!((whole(read(first)), whole(read(second))), (json!(60), json!(60)));
    // Of several answers all are taken or none.
    let refused = server.post("/v1/completions", &completion(json!({ "n": 3 })));
    assert_eq!(refused.error().0, 429);
    assert!((2..=60).contains(&retry_after(&refused)), "60 steps of 20 ms for each of those that ended");
    server.until("nothing is left", || server.get("/health").ok()["requests"] == 0);
    assert_eq!(server.post("/v1/completions", &completion(json!({ "n": 2, "max_tokens": 1 }))).status, 200);
}

fn sigterm_finishes_what_runs() {
    let server = serve_slowly("fake", &["--parallel", "1"]);
    let body = completion(json!({ "max_tokens": 30, "stream": true }));
    let mut running = server.start("/v1/completions", &body);
    running.read_exact(&mut [0; 100]).unwrap();
    let waiting = server.start("/v1/completions", &completion(json!({ "max_tokens": 10 })));
    server.until("the second waits", || server.get("/health").ok()["requests"] == 2);
    // A connection that is open and idle does not keep it.
    let idle = server.connect();
    server.signal(libc::SIGTERM);
    let mut rest = String::new();
    running.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\"finish_reason\":\"length\"") && rest.contains("[DONE]"), "{rest}");
    assert_eq!(read(waiting).ok()["usage"]["completion_tokens"], 10);
    let (status, said) = server.wait_for_end();
    assert_eq!(status, Some(0), "{said}");
    assert!(said.contains("finishing 2 requests"), "{said}");
    drop(idle);
}

fn the_second_signal_and_the_time_limit_end_it() {
    let begin = |args: &[&str]| {
        let server = serve_slowly("fake", args);
        let mut running = server.start("/v1/completions", &completion(json!({ "max_tokens": 900, "stream": true })));
        running.read_exact(&mut [0; 100]).unwrap();
        (server, running)
    };
    let (server, running) = begin(&[]);
    server.signal(libc::SIGINT);
    std::thread::sleep(Duration::from_millis(300));
    server.signal(libc::SIGINT);
    assert_eq!(server.wait_for_end().0, Some(130));
    drop(running);
    // A client is told why its answer ends early.
    let (server, mut running) = begin(&["--drain-timeout", "0"]);
    server.signal(libc::SIGTERM);
    let mut rest = String::new();
    running.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("shutting down") && !rest.contains("[DONE]"), "{rest}");
    assert_eq!(server.wait_for_end().0, Some(0));
}

fn slow_heads_and_ports_in_use() {
    let server = serve("fake", &["--header-timeout", "1"]);
    let mut slow = server.connect();
    slow.write_all(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n").unwrap();
    let started = Instant::now();
    let mut answer = Vec::new();
    slow.read_to_end(&mut answer).ok();
    assert!(started.elapsed() < Duration::from_secs(10), "the head's time is limited");
    let port = server.address.rsplit_once(':').unwrap().1.to_owned();
    let error = Model::new("fake").failure(1, &["serve", "--port", &port]);
    assert!(error.contains(&format!("cannot listen on 127.0.0.1:{port}")) && error.contains("--port"), "{error}");
    let error = Model::new("fake").failure(1, &["serve", "--host", "203.0.113.7"]);
    assert!(error.contains("cannot listen on 203.0.113.7"), "{error}");
    assert_eq!(shape("fake").context, 1000);
}
