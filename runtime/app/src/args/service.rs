//! The words of the commands that offer the model to others: `serve`, `chat`, `embed`.

use super::{Cutoffs, RunArgs, non_negative};
use clap::Args;
use std::path::PathBuf;

pub const SERVE_EXAMPLES: &str = "\
Examples:
  {bin} serve                                               on http://127.0.0.1:8080, with a web page
  {bin} serve --host 0.0.0.0 --api-key SECRET               for other machines
  curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\
       -d '{\"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}'

OpenAI's interface: /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/models; beside it /tokenize, /detokenize, \
/apply-template, /health, /metrics (Prometheus) and /openapi.json, which describes them all. Requests that run at the same \
time share the steps of the model, and prompts that begin alike are read once; neither changes an answer. SIGTERM finishes what \
runs and exits with status 0.";

pub const CHAT_EXAMPLES: &str = "\
Examples:
  {bin} chat
  {bin} chat --system \"Answer in one sentence.\" --temperature 0.7
  {bin} chat --load talk.json                               go on with a conversation that /save has kept

A line that ends with a backslash goes on in the next line; a line of three quotes (\"\"\") begins a text of several lines, and another \
one ends it. /help lists the commands. Ctrl-C stops an answer, Ctrl-D leaves.";

pub const EMBED_EXAMPLES: &str = "\
Examples:
  {bin} embed \"The cat sat on the mat\"
  {bin} embed --file lines.txt > vectors.jsonl              a vector for each line
  {bin} embed --pooling last --no-normalize TEXT

Prints one JSON array for each text: the final hidden states of the model, pooled, and scaled to length 1.";

/// `serve`
#[derive(Args, Debug)]
pub struct Serve {
    /// The address to listen on; 0.0.0.0 or :: for all of this machine's
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1")]
    pub host: String,
    /// The port to listen on; 0 for any that is free
    #[arg(long, short = 'p', value_name = "PORT", default_value_t = 8080)]
    pub port: u16,
    /// Requests that run at the same time [default: 16]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub parallel: Option<u16>,
    /// Requests that may wait for their turn; more are answered with 429
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub queue: u32,
    /// The key that requests must carry as `Authorization: Bearer KEY`
    #[arg(long, value_name = "KEY", env = "MOEC_API_KEY", hide_env_values = true, value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub api_key: Option<String>,
    /// Name of the model in requests and answers [default: the name it was built with]
    #[arg(long, value_name = "NAME")]
    pub model_name: Option<String>,
    /// Tokens of the longest request, prompt and answer [default: the model's context]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    pub context: Option<u32>,
    /// Memory for keys and values, e.g. 2GB [default: what all running requests may need, within half of the free memory]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub kv_memory: Option<u64>,
    /// Do not keep the keys and values of prompts for others that begin alike
    #[arg(long)]
    pub no_prefix_cache: bool,
    /// Largest body of a request
    #[arg(long, value_name = "SIZE", default_value = "8MB", value_parser = size)]
    pub max_body: u64,
    /// Connections at the same time; more wait
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_connections: u32,
    /// Seconds that a client may take for the head of a request
    #[arg(long, value_name = "SECONDS", default_value_t = 15, value_parser = clap::value_parser!(u64).range(1..))]
    pub header_timeout: u64,
    /// Seconds that running requests may take after SIGTERM
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub drain_timeout: u64,
    #[command(flatten)]
    pub run: RunArgs,
}

/// `chat`
#[derive(Args, Debug)]
pub struct Chat {
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Go on with a conversation that /save has kept
    #[arg(long, value_name = "FILE")]
    pub load: Option<PathBuf>,
    /// Most tokens of an answer [default: until the model ends it or the context is full]
    #[arg(long, short = 'n', value_name = "N")]
    pub max_tokens: Option<usize>,
    /// 0 takes the most probable token, larger is more adventurous
    #[arg(long, value_name = "T", default_value_t = 0.7, value_parser = non_negative)]
    pub temperature: f32,
    #[command(flatten)]
    pub cutoffs: Cutoffs,
    /// Seed of the random numbers [default: another one each time]
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
    #[command(flatten)]
    pub run: RunArgs,
}

/// Which hidden states make the vector of a text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum PoolingArg {
    /// That of the last token, which has seen all others
    Last,
    /// The mean over all tokens
    #[default]
    Mean,
}

/// `embed`
#[derive(Args, Debug)]
pub struct Embed {
    /// The texts; `-` reads one from standard input
    #[arg(required_unless_present = "file")]
    pub texts: Vec<String>,
    /// Texts from a file, one a line
    #[arg(long, value_name = "FILE", conflicts_with = "texts")]
    pub file: Option<PathBuf>,
    /// Which hidden states make the vector
    #[arg(long, value_enum, default_value_t)]
    pub pooling: PoolingArg,
    /// Leave vectors as they are, instead of scaling them to length 1
    #[arg(long)]
    pub no_normalize: bool,
    /// Do not begin the texts with what the tokenizer puts there (the bos token)
    #[arg(long)]
    pub no_bos: bool,
    #[command(flatten)]
    pub run: RunArgs,
}

/// A number of bytes: `500000`, `64kB`, `1.5GB`, `2GiB`.
fn size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.').len();
    let (number, unit) = text.split_at(digits);
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1u64,
        "k" | "kb" => 1000,
        "m" | "mb" => 1_000_000,
        "g" | "gb" => 1_000_000_000,
        "t" | "tb" => 1_000_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        _ => return Err("write a size like 500000, 64kB, 1.5GB or 2GiB".into()),
    };
    let bytes = number.parse::<f64>().map_err(|_| "write a size like 64kB or 1.5GB".to_owned())? * factor as f64;
    if bytes < u64::MAX as f64 { Ok(bytes as u64) } else { Err("that is more than a machine can have".into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        let sizes = ["0", "500000", "64kB", "1.5 GB", "2GiB", "3m"].map(|text| size(text).unwrap());
        assert_eq!(sizes, [0, 500_000, 64_000, 1_500_000_000, 2 << 30, 3_000_000]);
        assert!(["", "x", "1.5.2", "3 bananas", "99999999999999999999TB", "-1"].iter().all(|text| size(text).is_err()));
    }
}
