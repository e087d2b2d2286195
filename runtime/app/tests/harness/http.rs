//! A server under test and a client of few words.

use serde_json::Value;
use std::any::Any;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);

/// A running server; ended when dropped.
pub struct Serving {
    child: Child,
    stderr: BufReader<ChildStderr>,
    pub address: String,
    /// What must live as long as the server.
    _kept: Box<dyn Any + Send + Sync>,
}

/// An answer.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// The JSON of an answer that must be a success.
    pub fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        self.json()
    }

    /// Status, parameter and message of an error in OpenAI's shape.
    pub fn error(&self) -> (u16, String, String) {
        let value = self.json();
        let error = &value["error"];
        assert!(self.status >= 400 && error["type"].is_string() && error.get("code").is_some(), "{}", self.body);
        let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
        (self.status, text("param"), text("message"))
    }

    /// The objects of a stream, which must be complete.
    pub fn events(&self) -> Vec<Value> {
        let mut data: Vec<&str> = self.body.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{}", self.body);
        data.iter().map(|data| serde_json::from_str(data).unwrap()).collect()
    }
}

impl Serving {
    /// Starts `command`, which serves on a port of its choice, and waits until it does.
    pub fn start_server(mut command: Command, kept: impl Any + Send + Sync) -> Serving {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        // It owns the process from here on, and ends it when it goes.
        let mut serving = Serving { address: String::new(), child, stderr, _kept: Box::new(kept) };
        let mut line = String::new();
        while serving.address.is_empty() {
            line.clear();
            assert!(serving.stderr.read_line(&mut line).unwrap() > 0, "the server ended");
            if let Some((_, address)) = line.trim().split_once("http://") {
                serving.address = address.to_owned();
            }
        }
        serving
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Sends a request and does not wait.
    pub fn send(&self, method: &str, path: &str, headers: &str, body: &str) -> TcpStream {
        let mut stream = self.connect();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n",
            self.address,
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        // A server may refuse a body before it has all of it.
        stream.write_all(body.as_bytes()).ok();
        stream
    }

    pub fn get(&self, path: &str) -> Reply {
        read(self.send("GET", path, "", ""))
    }

    pub fn post(&self, path: &str, body: &Value) -> Reply {
        read(self.start(path, body))
    }

    /// Sends a request and does not wait.
    pub fn start(&self, path: &str, body: &Value) -> TcpStream {
        self.send("POST", path, "Content-Type: application/json\r\n", &body.to_string())
    }

    /// A figure of `/metrics`.
    pub fn figure(&self, name: &str) -> f64 {
        let text = self.get("/metrics").body;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no figure {name}")).parse().unwrap()
    }

    /// Waits until `true_now`.
    pub fn until(&self, what: &str, true_now: impl Fn() -> bool) {
        let started = Instant::now();
        while !true_now() {
            assert!(started.elapsed() < PATIENCE, "{what}: it does not happen");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: sends a signal to a child that has not been waited for.
        unsafe { libc::kill(self.child.id() as i32, signal) };
    }

    /// Resident memory in bytes.
    pub fn memory(&self) -> usize {
        let pages = std::fs::read_to_string(format!("/proc/{}/statm", self.child.id())).unwrap();
        pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
    }

    /// Exit status, and what was said after the first line.
    pub fn wait_for_end(mut self) -> (Option<i32>, String) {
        let status = self.child.wait().unwrap();
        let mut rest = String::new();
        self.stderr.read_to_string(&mut rest).unwrap();
        (status.code(), rest)
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Reads an answer to its end.
pub fn read(mut stream: TcpStream) -> Reply {
    let mut bytes = Vec::new();
    // A server that refuses a body may reset the connection after its answer.
    if let Err(error) = stream.read_to_end(&mut bytes) {
        assert!(!bytes.is_empty(), "no answer: {error}");
    }
    let text = String::from_utf8(bytes).unwrap();
    let (head, rest) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {text:?}"));
    let mut lines = head.lines();
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let header = |line: &str| line.split_once(": ").map(|(key, value)| (key.to_lowercase(), value.to_owned()));
    let headers: Vec<(String, String)> = lines.filter_map(header).collect();
    let chunked = headers.iter().any(|(key, value)| key == "transfer-encoding" && value == "chunked");
    let body = if chunked { unchunk(rest) } else { rest.to_owned() };
    Reply { status, headers, body }
}

fn unchunk(mut rest: &str) -> String {
    let mut body = String::new();
    while let Some((size, after)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        if size == 0 {
            break;
        }
        body += &after[..size];
        rest = &after[size + 2..];
    }
    body
}
