//! Conversations to the text that a model was trained on: the model's own chat template, a Jinja program.
//!
//! Templates are written for the environment that transformers gives them (`apply_chat_template` in
//! `transformers/utils/chat_template_utils.py`): Jinja2 with `trim_blocks`, `lstrip_blocks` and loop controls, Python's string
//! and list methods, `raise_exception`, `strftime_now`, a `tojson` that escapes nothing for HTML, and values printed as Python
//! prints them. This module is that environment around the crate `minijinja`.
//!
//! Deliberately absent: token ids. The text already has the special tokens in it, so it is encoded without adding any
//! ([`Tokenizer::encode`](crate::Tokenizer::encode) with `special` false).

use crate::error::{Error, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, ValueKind};
use minijinja::{AutoEscape, Environment, ErrorKind, Output, State, UndefinedBehavior, Value};
use serde::{Deserialize, Serialize};
use std::fmt::Write;

/// One turn of a conversation, as most templates want it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: content.into() }
    }
}

/// A compiled chat template with the model's special tokens.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: Option<String>,
    eos_token: Option<String>,
}

/// Steps that a template may take: more than any conversation needs, and an end to a template that loops for ever.
const FUEL: u64 = 10_000_000;

/// Calls within calls that a template may make: a caller's thread may have a small stack.
const DEPTH: usize = 100;

const NAME: &str = "chat template";

impl ChatTemplate {
    /// Compiles the Jinja `source`. The tokens are the texts of the special tokens that it may name.
    ///
    /// # Errors
    /// When the source is not Jinja, with the line.
    pub fn new(source: &str, bos_token: Option<&str>, eos_token: Option<&str>) -> Result<ChatTemplate> {
        let mut environment = Environment::new();
        let mut syntax = SyntaxConfig::builder();
        syntax.trim_blocks(true).lstrip_blocks(true).keep_trailing_newline(false);
        environment.set_syntax(syntax.build().expect("Jinja's own delimiters"));
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(DEPTH);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(print_as_python);
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_template_owned(NAME, without_generation_blocks(source)).map_err(|error| failed(&error))?;
        Ok(ChatTemplate {
            environment,
            bos_token: bos_token.map(str::to_owned),
            eos_token: eos_token.map(str::to_owned),
        })
    }

    /// The text of a conversation of plain messages. With `add_generation_prompt` it ends where the assistant's answer begins.
    ///
    /// # Errors
    /// What the template refuses, in its own words.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        self.render_with(messages, add_generation_prompt, &serde_json::Map::new())
    }

    /// As [`render`](ChatTemplate::render), for messages of any form that the template knows (an array of objects), and with `more`
    /// variables, such as `tools`; they go before our own names of equal spelling.
    ///
    /// # Errors
    /// What the template refuses, in its own words.
    pub fn render_with(
        &self,
        messages: impl Serialize,
        add_generation_prompt: bool,
        more: &serde_json::Map<String, serde_json::Value>,
    ) -> Result<String> {
        let own =
            [("messages", Value::from(Serde(messages))), ("add_generation_prompt", Value::from(add_generation_prompt))];
        let tokens = [("bos_token", &self.bos_token), ("eos_token", &self.eos_token)];
        // Jinja's `none`, and not undefined, as in transformers: a template that tests for tools compares with it.
        let absent = ["tools", "documents"].map(|name| (name, Value::from(())));
        let own = own.into_iter().chain(absent).map(|(name, value)| (name.to_owned(), value));
        let tokens =
            tokens.into_iter().filter_map(|(name, text)| Some((name.to_owned(), Value::from(text.as_deref()?))));
        let more = more.iter().map(|(name, value)| (name.clone(), Value::from(Serde(value))));
        let context: Value = own.chain(tokens).chain(more).collect::<std::collections::BTreeMap<_, _>>().into();
        let template = self.environment.get_template(NAME).map_err(|error| failed(&error))?;
        template.render(context).map_err(|error| failed(&error))
    }
}

/// What went wrong, without the chain of places that a person who chats cannot use.
fn failed(error: &minijinja::Error) -> Error {
    let mut what = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    // What a template says by `raise_exception` is a sentence for the user; the rest is for its author.
    if error.kind() != ErrorKind::InvalidOperation || !what.starts_with(REFUSED) {
        if let Some(line) = error.line() {
            write!(what, " (line {line})").expect("a string can be written to");
        }
        return Error::ChatTemplate { what };
    }
    Error::ChatRefused { what: what[REFUSED.len()..].to_owned() }
}

/// Marks the errors that the template itself raises.
const REFUSED: &str = "\u{1}refused: ";

fn raise_exception(message: String) -> std::result::Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, format!("{REFUSED}{message}")))
}

/// The local time in the format of C's `strftime`, as in `datetime.now().strftime(format)`.
fn strftime_now(format: String) -> std::result::Result<String, minijinja::Error> {
    let mut text = String::new();
    write!(text, "{}", chrono::Local::now().format(&format)).map_err(|_| {
        let what = format!("strftime_now: {format:?} is no format of a date");
        minijinja::Error::new(ErrorKind::InvalidOperation, what)
    })?;
    Ok(text)
}

/// `json.dumps(value, ensure_ascii=False, indent=…)`.
fn tojson(value: &Value, kwargs: Kwargs) -> std::result::Result<Value, minijinja::Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    // Which separators and escapes a template asks for beyond that is the default of all that are in use.
    for known in ["ensure_ascii", "separators", "sort_keys"] {
        let _: Option<Value> = kwargs.get(known)?;
    }
    kwargs.assert_all_used()?;
    let mut bytes = Vec::new();
    let written = value.serialize(&mut serde_json::Serializer::with_formatter(
        &mut bytes,
        PythonJson { indent: indent.map(|n| " ".repeat(n.min(16))), depth: 0, empty: true },
    ));
    written.map_err(|error| minijinja::Error::new(ErrorKind::BadSerialization, format!("tojson: {error}")))?;
    Ok(Value::from(String::from_utf8(bytes).expect("JSON is UTF-8")))
}

/// JSON with Python's spaces: `{"a": 1, "b": [1, 2]}`, or indented.
struct PythonJson {
    indent: Option<String>,
    depth: usize,
    /// Nothing has been written since the last bracket was opened.
    empty: bool,
}

impl PythonJson {
    fn open<W: ?Sized + std::io::Write>(&mut self, to: &mut W, bracket: &[u8]) -> std::io::Result<()> {
        self.depth += 1;
        self.empty = true;
        to.write_all(bracket)
    }

    fn close<W: ?Sized + std::io::Write>(&mut self, to: &mut W, bracket: &[u8]) -> std::io::Result<()> {
        self.depth -= 1;
        if !self.empty {
            self.new_line(to)?;
        }
        self.empty = false;
        to.write_all(bracket)
    }

    fn next<W: ?Sized + std::io::Write>(&mut self, to: &mut W, first: bool) -> std::io::Result<()> {
        if !first {
            to.write_all(if self.indent.is_some() { b"," } else { b", " })?;
        }
        self.empty = false;
        self.new_line(to)
    }

    fn new_line<W: ?Sized + std::io::Write>(&self, to: &mut W) -> std::io::Result<()> {
        let Some(indent) = &self.indent else { return Ok(()) };
        to.write_all(b"\n")?;
        (0..self.depth).try_for_each(|_| to.write_all(indent.as_bytes()))
    }
}

impl serde_json::ser::Formatter for PythonJson {
    fn begin_array<W: ?Sized + std::io::Write>(&mut self, to: &mut W) -> std::io::Result<()> {
        self.open(to, b"[")
    }

    fn end_array<W: ?Sized + std::io::Write>(&mut self, to: &mut W) -> std::io::Result<()> {
        self.close(to, b"]")
    }

    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, to: &mut W, first: bool) -> std::io::Result<()> {
        self.next(to, first)
    }

    fn begin_object<W: ?Sized + std::io::Write>(&mut self, to: &mut W) -> std::io::Result<()> {
        self.open(to, b"{")
    }

    fn end_object<W: ?Sized + std::io::Write>(&mut self, to: &mut W) -> std::io::Result<()> {
        self.close(to, b"}")
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, to: &mut W, first: bool) -> std::io::Result<()> {
        self.next(to, first)
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, to: &mut W) -> std::io::Result<()> {
        to.write_all(b": ")
    }
}

/// Prints a value as Python's `str` does where Jinja's own ways differ: `None`, `True`, `False`.
fn print_as_python(out: &mut Output, state: &mut State, value: &Value) -> std::result::Result<(), minijinja::Error> {
    match value.kind() {
        ValueKind::None => out.write_str("None").map_err(minijinja::Error::from),
        ValueKind::Bool => {
            out.write_str(if value.is_true() { "True" } else { "False" }).map_err(minijinja::Error::from)
        }
        _ => minijinja::escape_formatter(out, state, value),
    }
}

/// Templates mark what the assistant said with `{% generation %}`, for training. The tags have no effect here; a condition that
/// always holds keeps their blanks as they are.
fn without_generation_blocks(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let tag = &rest[start + 2..start + length];
        let name = tag.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        let replacement = match name {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        text.push_str(&rest[..start + 2]);
        match replacement {
            Some(replacement) => text.push_str(&tag.replacen(name, &format!(" {replacement} "), 1)),
            None => text.push_str(tag),
        }
        text.push_str("%}");
        rest = &rest[start + length + 2..];
    }
    text.push_str(rest);
    text
}
