//! `tokenize`: the ids of a text.

use super::{Context, text_argument};
use crate::args::Tokenize;
use crate::failure::Result;
use crate::output;
use moec_runtime::{Error, Payload, Tokenizer};

pub(super) fn run(context: &Context, args: &Tokenize) -> Result<()> {
    // Neither threads nor working memory are needed, and any CPU will do.
    let payload = Payload::open(&context.payload, context.descriptor.payload())?;
    let tokenizer = Tokenizer::new(payload.tokenizer().ok_or(Error::NoTokenizer)?)?;
    let ids = tokenizer.encode(&text_argument(&args.text)?, !args.no_bos)?;
    output::print_line(&serde_json::json!(ids).to_string())
}
