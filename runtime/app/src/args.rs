//! The words of the command line.

pub mod service;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The whole command line.
#[derive(Debug, Parser)]
#[command(
    name = "model",
    about = "A language model, compiled into this file",
    long_about = "A language model, compiled into this file: code and weights, nothing to install.\n\
                  Text that was asked for goes to standard output, everything else to standard error.\n\
                  Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.",
    version,
    subcommand_required = true,
    arg_required_else_help = true
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Continue a text
    #[command(after_help = GENERATE_EXAMPLES)]
    Generate(Generate),
    /// Talk with the model in the terminal
    #[command(after_help = service::CHAT_EXAMPLES)]
    Chat(service::Chat),
    /// Offer the model to programs and browsers: OpenAI's interface over HTTP, and a web page
    #[command(after_help = service::SERVE_EXAMPLES)]
    Serve(service::Serve),
    /// Print the vectors of texts as JSON
    #[command(after_help = service::EMBED_EXAMPLES)]
    Embed(service::Embed),
    /// Write the logits of every token to a safetensors file
    #[command(after_help = LOGITS_EXAMPLES)]
    Logits(LogitsArgs),
    /// Measure how well the model predicts a text (mean NLL and perplexity, as JSON)
    #[command(after_help = SCORE_EXAMPLES)]
    Score(Score),
    /// Print the token ids of a text as JSON
    Tokenize(Tokenize),
    /// Measure the speed, against what this machine can do
    #[command(after_help = BENCH_EXAMPLES)]
    Bench(Bench),
    /// Tell about the model: shapes, quantization, CPU levels, memory, weights
    Info(Info),
    /// Compute again what was recorded when the model was built, and compare every bit
    Selftest(Selftest),
}

const GENERATE_EXAMPLES: &str = "\
Examples:
  {bin} generate \"Once upon a time\" --max-tokens 100
  {bin} generate - < prompt.txt                             the prompt from standard input
  {bin} generate \"A poem:\" --temperature 0.8 --seed 7       sampled, and repeatable
  {bin} generate \"Q: 2+2? A:\" --stop \"Q:\"                   up to the next question
  {bin} generate --tokens 1,415,2936 --print-tokens         ids in, ids out

The text continues the prompt, which is not printed again. It ends where the model ends it, at a stop string, after \
--max-tokens, or when the context is full. The default, --temperature 0, always takes the most probable token, so the \
same prompt gives the same text; 0.8 is a usual choice for more variety. Filters apply in the order: repetition penalty, \
top-k, top-p, min-p, temperature. Ctrl-C ends the text after the current token, with exit status 130.";

const LOGITS_EXAMPLES: &str = "\
Examples:
  {bin} logits --tokens 1,415,2936 -o logits.safetensors
  {bin} logits --tokens 1,415,2936 -o logits.safetensors --routes

Tensor \"logits\" is f32 [T, vocab]. With --routes also, for each layer N, \"selected_experts.N\" (i64 [T, k], by falling \
weight) and \"routing_weights.N\" (f32 [T, k]).";

const SCORE_EXAMPLES: &str = "\
Examples:
  {bin} score --file book.txt --limit 4096
  {bin} score --tokens 1,415,2936 --per-token
  {bin} score --choices truthfulqa.jsonl                    multiple choice

Prints one JSON object: tokens (that were predicted), mean_nll (natural logarithm), perplexity. A text longer than the \
window is cut into windows that overlap by one token; each token but the very first is predicted exactly once, from the \
tokens before it in its window.";

const BENCH_EXAMPLES: &str = "\
Examples:
  {bin} bench
  {bin} bench --json --prompt-tokens 128 --threads 4
  {bin} bench --depth 4096                                  with 4096 tokens already in the context
  {bin} bench --sequences 8                                 eight texts decoded together

Prefill is one prompt of random tokens; decode is tokens one by one; each after --depth tokens, each the median of \
--repeat runs. In the same run the machine itself is measured: memory read by all threads from a buffer larger than the \
caches, and multiply-adds in registers. share_of_bandwidth and share_of_peak are fractions of those. share_of_limit is the \
time that the slower of the two needs for what a run must read (weights of the experts that were chosen, keys and values) \
and compute at least, over the time that it took; a model that fits into the caches can read faster than memory.";

/// Token ids on the command line.
#[derive(Clone, Debug, PartialEq)]
pub enum Ids {
    /// As given.
    List(Vec<u32>),
    /// To be read from standard input; a command line has a limit.
    Stdin,
}

impl Ids {
    /// Reads a list as `tokenize` and `--print-tokens` write it, with or without brackets.
    pub fn parse_list(text: &str) -> Result<Vec<u32>, String> {
        let text = text.trim();
        let text = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
        if text.trim().is_empty() {
            return Ok(Vec::new());
        }
        text.split(',').map(|id| id.trim().parse().map_err(|_| format!("`{}` is no token id", id.trim()))).collect()
    }
}

impl std::str::FromStr for Ids {
    type Err = String;
    fn from_str(text: &str) -> Result<Ids, String> {
        if text == "-" { Ok(Ids::Stdin) } else { Ids::parse_list(text).map(Ids::List) }
    }
}

/// How to run the model; common to all commands that do.
#[derive(Args, Clone, Debug, Default)]
pub struct RunArgs {
    /// Threads [default: the physical cores that this process may use]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Tokens that go through the model at once (changes the speed, never the result) [default: the model's limit]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub chunk: Option<u32>,
    /// Run the code of this CPU level, e.g. x86-64-v3 [default: the best that this CPU can run]
    #[arg(long, value_name = "NAME")]
    pub level: Option<String>,
    /// Run even if the weights are larger than the memory, reading them from the disk again and again
    #[arg(long)]
    pub low_memory: bool,
    /// Count how often each expert is chosen, and write it here as JSON at the end, for `moec build --expert-profile`
    #[arg(long, value_name = "FILE")]
    pub expert_stats: Option<PathBuf>,
}

/// Which tokens are left to draw from.
#[derive(Args, Debug)]
pub struct Cutoffs {
    /// Draw only from the K most probable tokens; 0 for all
    #[arg(long, value_name = "K", default_value_t = 40)]
    pub top_k: usize,
    /// Draw only from the most probable tokens that together reach probability P; 1 for all
    #[arg(long, value_name = "P", default_value_t = 0.95, value_parser = probability)]
    pub top_p: f32,
    /// Draw only from tokens at least P times as probable as the best; 0 for all
    #[arg(long, value_name = "P", default_value_t = 0.05, value_parser = probability)]
    pub min_p: f32,
}

/// `generate`
#[derive(Args, Debug)]
pub struct Generate {
    /// The text to continue; `-` reads it from standard input
    #[arg(required_unless_present = "tokens", conflicts_with = "tokens")]
    pub prompt: Option<String>,
    /// Token ids to continue, instead of a text: 1,2,3 or a JSON array, or `-` for standard input. Nothing is added to them
    #[arg(long, value_name = "IDS")]
    pub tokens: Option<Ids>,
    /// Most tokens to generate [default: until the model ends the text or the context is full]
    #[arg(long, short = 'n', value_name = "N")]
    pub max_tokens: Option<usize>,
    /// 0 takes the most probable token, larger is more adventurous
    #[arg(long, value_name = "T", default_value_t = 0.0, value_parser = non_negative)]
    pub temperature: f32,
    #[command(flatten)]
    pub cutoffs: Cutoffs,
    /// Make tokens that occurred lately less probable; 1 for no change
    #[arg(long, value_name = "R", default_value_t = 1.0, value_parser = positive)]
    pub repeat_penalty: f32,
    /// How many of the last tokens count for --repeat-penalty
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub repeat_last: usize,
    /// Seed of the random numbers [default: another one each time]
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
    /// End before this text; may be given several times
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub stop: Vec<String>,
    /// Print the ids as a JSON array, the end-of-text token included, instead of the text
    #[arg(long)]
    pub print_tokens: bool,
    /// Print what it took to standard error
    #[arg(long)]
    pub stats: bool,
    #[command(flatten)]
    pub run: RunArgs,
}

/// `logits`
#[derive(Args, Debug)]
pub struct LogitsArgs {
    /// Token ids: 1,2,3 or a JSON array, or `-` for standard input
    #[arg(long, value_name = "IDS")]
    pub tokens: Ids,
    /// The file to write
    #[arg(long, short = 'o', value_name = "FILE")]
    pub output: PathBuf,
    /// Also write which experts each token was sent to
    #[arg(long)]
    pub routes: bool,
    #[command(flatten)]
    pub run: RunArgs,
}

/// `score`
#[derive(Args, Debug)]
pub struct Score {
    /// The text, UTF-8
    #[arg(long, value_name = "FILE", required_unless_present_any = ["tokens", "answers", "choices"], conflicts_with = "tokens")]
    pub file: Option<PathBuf>,
    /// Questions instead of a text, one JSON object a line: {"prompt": "fr 12 =", "answer": "douze"}. Counts the prompts whose
    /// greedy continuation is the answer, spaces around it aside
    #[arg(long, value_name = "FILE", conflicts_with_all = ["tokens", "file", "context", "per_token"])]
    pub answers: Option<PathBuf>,
    /// Multiple choice instead of a text, one JSON object a line: {"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1}, with
    /// "context" before the question if need be. Counts the questions whose right choice the model finds the most likely,
    /// plainly and per byte
    #[arg(long, value_name = "FILE", conflicts_with_all = ["tokens", "file", "answers", "context", "per_token"])]
    pub choices: Option<PathBuf>,
    /// Token ids instead of a text: 1,2,3 or a JSON array, or `-` for standard input. Nothing is added to them
    #[arg(long, value_name = "IDS")]
    pub tokens: Option<Ids>,
    /// Do not begin the text with what the tokenizer puts there (the bos token)
    #[arg(long, conflicts_with = "tokens")]
    pub no_bos: bool,
    /// Use the first N tokens (or questions) only
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// Window in tokens [default: the model's context]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    pub context: Option<u32>,
    /// Also print the NLL of each token
    #[arg(long)]
    pub per_token: bool,
    #[command(flatten)]
    pub run: RunArgs,
}

/// `tokenize`
#[derive(Args, Debug)]
pub struct Tokenize {
    /// The text; `-` reads it from standard input
    #[arg(allow_hyphen_values = true)]
    pub text: String,
    /// Leave out what the tokenizer puts around a text (the bos token)
    #[arg(long)]
    pub no_bos: bool,
}

/// `bench`
#[derive(Args, Debug)]
pub struct Bench {
    /// Tokens of the prompt [default: 512, or what the context holds]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub prompt_tokens: Option<u32>,
    /// Tokens to decode [default: 64, or what the context holds]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub new_tokens: Option<u32>,
    /// Tokens in the context before each measurement; more than 0 also measures what reading their keys and values costs
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub depth: u32,
    /// Texts that are decoded together, a token of each in a step
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub sequences: u32,
    /// Runs, of which the median counts
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub repeat: u32,
    /// Show where the time goes, stage by stage, in one more run of each
    #[arg(long)]
    pub profile: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub run: RunArgs,
}

/// `info`
#[derive(Args, Debug)]
pub struct Info {
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `selftest`
#[derive(Args, Debug)]
pub struct Selftest {
    /// Print the values to record, as JSON
    #[arg(long, hide = true)]
    pub record: bool,
    #[command(flatten)]
    pub run: RunArgs,
}

/// Reads the command line; the first argument is the program's name.
pub fn parse(args: Vec<OsString>) -> Result<Cli, clap::Error> {
    let program = args.first().map_or_else(|| "model".into(), |arg| shown_name(Path::new(arg)));
    let mut command = Cli::command().bin_name(&program).mut_subcommands(|sub| {
        // `--threads -1` is a wrong number, not an unknown flag.
        let sub = sub.mut_args(|arg| match arg.get_action().takes_values() && !arg.is_positional() {
            true => arg.allow_negative_numbers(true),
            false => arg,
        });
        let help = sub.get_after_help().map(|text| text.to_string().replace("{bin}", &program));
        match help {
            Some(help) => sub.after_help(help),
            None => sub,
        }
    });
    command = command.after_help(format!(
        "Examples:\n  {program} generate \"Once upon a time\"\n  {program} info\n  {program} bench\n\n\
         `{program} generate --help` tells all about a command."
    ));
    let args = if args.is_empty() { vec![program.into()] } else { args };
    let matches = command.try_get_matches_from_mut(args)?;
    Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut command))
}

/// The program as one would type it.
fn shown_name(path: &Path) -> String {
    let name = path.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned());
    if path.components().count() > 1 { format!("./{name}") } else { name }
}

fn number(text: &str) -> Result<f32, String> {
    let value: f32 = text.parse().map_err(|_| "not a number".to_owned())?;
    if value.is_finite() { Ok(value) } else { Err("not a finite number".into()) }
}

fn non_negative(text: &str) -> Result<f32, String> {
    number(text).and_then(|value| if value >= 0.0 { Ok(value) } else { Err("must not be negative".into()) })
}

fn positive(text: &str) -> Result<f32, String> {
    number(text).and_then(|value| if value > 0.0 { Ok(value) } else { Err("must be greater than 0".into()) })
}

fn probability(text: &str) -> Result<f32, String> {
    number(text)
        .and_then(|value| if (0.0..=1.0).contains(&value) { Ok(value) } else { Err("must be between 0 and 1".into()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_words(words: &[&str]) -> Result<Cli, clap::Error> {
        parse(words.iter().map(OsString::from).collect())
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn wrong_usage_is_status_2_and_help_is_0() {
        for words in [
            &["m"][..],
            &["m", "fly"],
            &["m", "generate"],
            &["m", "generate", "x", "--tokens", "1"],
            &["m", "generate", "x", "--temperature", "-1"],
            &["m", "generate", "x", "--top-p", "1.5"],
            &["m", "generate", "--tokens", "1,a"],
            &["m", "generate", "x", "--threads", "0"],
            &["m", "generate", "x", "--threads", "-1"],
            &["m", "logits", "--tokens", "1"],
            &["m", "score"],
            &["m", "tokenize"],
            &["m", "bench", "--repeat", "0"],
        ] {
            assert_eq!(parse_words(words).unwrap_err().exit_code(), 2, "{words:?}");
        }
        for words in [&["m", "--help"][..], &["m", "--version"], &["m", "generate", "--help"]] {
            assert_eq!(parse_words(words).unwrap_err().exit_code(), 0, "{words:?}");
        }
    }

    #[test]
    fn a_negative_number_is_a_wrong_value() {
        let error = parse_words(&["m", "generate", "x", "--threads", "-1"]).unwrap_err().to_string();
        assert!(error.contains("'-1'") && error.contains("--threads"), "{error}");
    }

    #[test]
    fn examples_name_the_program() {
        let help = parse_words(&["/tmp/mixtral", "generate", "--help"]).unwrap_err().to_string();
        assert!(help.contains("./mixtral generate \"Once upon a time\""), "{help}");
        assert!(!help.contains("{bin}"), "{help}");
    }

    #[test]
    fn ids_are_a_list() {
        let cli = parse_words(&["m", "generate", "--tokens", "1,2,3", "--stop", "--", "--stop", "b"]).unwrap();
        let Command::Generate(generate) = cli.command else { panic!("not generate") };
        assert_eq!(generate.tokens, Some(Ids::List(vec![1, 2, 3])));
        assert_eq!("[1, 2,3]".parse(), Ok(Ids::List(vec![1, 2, 3])));
        assert_eq!(("[]".parse(), "-".parse()), (Ok(Ids::List(vec![])), Ok(Ids::Stdin)));
        assert_eq!("1,,2".parse::<Ids>(), Err("`` is no token id".into()));
        assert_eq!(generate.stop, ["--", "b"]);
        assert_eq!(generate.temperature, 0.0);
    }
}
