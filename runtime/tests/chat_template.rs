//! Chat templates render as Jinja2 renders them under transformers: the texts in `data/chat/golden.json` are Jinja2's.

use moec_runtime::{ChatTemplate, Error, Message};
use serde_json::{Map, Value};
use std::path::Path;

fn data(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/chat").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn templates_render_as_jinja2_does() {
    let cases: Vec<Value> = serde_json::from_str(&data("golden.json")).unwrap();
    assert!(cases.len() > 40);
    for case in &cases {
        let name = case["template"].as_str().unwrap();
        let template = ChatTemplate::new(&data(name), Some("<s>"), Some("</s>")).unwrap();
        let mut more = Map::new();
        if !case["tools"].is_null() {
            more.insert("tools".into(), case["tools"].clone());
        }
        let prompt = case["add_generation_prompt"].as_bool().unwrap();
        let found = template.render_with(&case["messages"], prompt, &more);
        match (found, case["text"].as_str()) {
            (Ok(found), Some(expected)) => assert_eq!(found, expected, "{name} {}", case["messages"]),
            (Err(Error::ChatRefused { what }), None) => assert_eq!(what, case["refused"].as_str().unwrap()),
            (found, expected) => panic!("{name} {}: {found:?}, not {expected:?}", case["messages"]),
        }
    }
}

#[test]
fn plain_messages() {
    let template = ChatTemplate::new(&data("instruct.jinja"), Some("<s>"), Some("</s>")).unwrap();
    let messages = [Message::new("user", "Hi"), Message::new("assistant", "Hello!"), Message::new("user", "Bye")];
    assert_eq!(template.render(&messages, true).unwrap(), "<s>[INST] Hi [/INST]Hello!</s>[INST] Bye [/INST]");
    let error = template.render(&messages[1..], true).unwrap_err().to_string();
    assert_eq!(
        error,
        "the model's chat template refuses this conversation: Conversation roles must alternate \
         user/assistant/user/assistant/..."
    );
}

#[test]
fn a_broken_template_says_where() {
    let error = ChatTemplate::new("{% for m in messages %}\n{{ m.content }", None, None).err().unwrap().to_string();
    assert!(error.starts_with("the model's chat template failed: ") && error.contains("line 2"), "{error}");
    let template = ChatTemplate::new("\n\n{{ messages.frobnicate() }}", None, None).unwrap();
    let error = template.render(&[], false).unwrap_err().to_string();
    assert!(error.contains("frobnicate") && error.contains("line 3"), "{error}");
    let template = ChatTemplate::new("{{ 1 | tojson(colour='red') }}", None, None).unwrap();
    assert!(matches!(template.render(&[], false), Err(Error::ChatTemplate { .. })));
}

#[test]
fn a_template_cannot_run_for_ever() {
    let endless = "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}";
    let loops = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}";
    for source in [endless, loops] {
        let template = ChatTemplate::new(source, None, None).unwrap();
        assert!(matches!(template.render(&[], false), Err(Error::ChatTemplate { .. })));
    }
}

#[test]
fn the_date_is_local_and_its_format_is_checked() {
    let date = |format: &str| {
        ChatTemplate::new(&format!("{{{{ strftime_now('{format}') }}}}"), None, None).unwrap().render(&[], false)
    };
    let year: i32 = date("%Y").unwrap().parse().unwrap();
    assert!((2024..3000).contains(&year), "{year}");
    assert!(matches!(date("%!"), Err(Error::ChatTemplate { .. })));
}
