//! What is asked: of a haystack, of a text, or of token ids.

use super::args::Args;
use super::chat::Chat;
use super::haystack::{ANSWER_LEN, Haystack, NEEDLE, QUERY};
use super::llama::checkpoint::Checkpoint;
use super::llama::error::{Error, Result};
use super::llama::model::Llama;
use super::llama::tokenizer::Tokenizer;
use std::io::Read;
use std::path::Path;

/// A context and what is asked about it.
pub struct Task {
    pub context: Vec<u32>,
    pub queries: Vec<Vec<u32>>,
    /// For each query the right answer, where it is known.
    pub expected: Vec<Option<[u32; ANSWER_LEN]>>,
    /// Tokens that end an answer.
    pub stop: Vec<u32>,
}

/// What the options ask: a text, ids, or haystacks.
///
/// # Errors
/// [`Error::Input`] naming the option.
pub fn tasks(
    args: &Args,
    checkpoint: &Checkpoint,
    model: &Llama,
    tokenizer: Option<&Tokenizer>,
) -> Result<Vec<Task>> {
    if let (Some(context), Some(query)) = (&args.context, &args.query) {
        let tokenizer =
            tokenizer.ok_or_else(|| Error::input("--model", "text takes a tokenizer, and there is none"))?;
        let (mut text, mut query, mut stop) = (read_text(context)?, query.clone(), checkpoint.eos_ids()?);
        if args.chat {
            let chat = Chat::of(tokenizer)?;
            text = format!("{}{text}", chat.user);
            query = format!("\n\n{query}{}{}", chat.end, chat.assistant);
            stop.extend(tokenizer.id(chat.end));
        }
        let (context, query) = (tokenizer.context(&text)?, tokenizer.query(&query)?);
        model.check_ids("--context", &context)?;
        model.check_ids("--query", &query)?;
        if query.is_empty() {
            return Err(Error::input("--query", "expected at least 1 token, got none"));
        }
        return Ok(vec![Task { context, queries: vec![query], expected: vec![None], stop }]);
    }
    if let (Some(context), Some(query)) = (&args.context_ids, &args.query_ids) {
        let (context, query) =
            (read_ids(model, "--context-ids", context)?, read_ids(model, "--query-ids", query)?);
        if query.is_empty() {
            return Err(Error::input("--query-ids", "expected at least 1 id, got none"));
        }
        return Ok(vec![Task { context, queries: vec![query], expected: vec![None], stop: Vec::new() }]);
    }
    let word = |id| tokenizer.and_then(|tokenizer| tokenizer.word(id));
    if word(NEEDLE).as_deref() != Some("<needle>") || word(QUERY).as_deref() != Some("<query>") {
        let reason = "a haystack is written in the retrieval Llama's words; give --context and --query, or --context-ids and --query-ids";
        return Err(Error::input("--model", reason));
    }
    let mut left = args.queries.unwrap_or(args.needles);
    let mut tasks = Vec::new();
    while tasks.is_empty() || left > 0 {
        let seed = args.seed.wrapping_add(tasks.len() as u64);
        let haystack = Haystack::new(args.context_len, args.needles, seed)?;
        let asked = &haystack.needles[..left.min(args.needles)];
        left -= asked.len();
        tasks.push(Task {
            queries: asked.iter().map(|needle| needle.query()).collect(),
            expected: asked.iter().map(|needle| Some(needle.values)).collect(),
            context: haystack.context,
            stop: Vec::new(),
        });
    }
    Ok(tasks)
}

/// The text of a file or of standard input.
fn read_text(path: &Path) -> Result<String> {
    let mut text = String::new();
    let read = if path == Path::new("-") {
        std::io::stdin().read_to_string(&mut text)
    } else {
        std::fs::File::open(path).and_then(|mut file| file.read_to_string(&mut text))
    };
    read.map_err(|error| Error::input("--context", format!("{}: {error}", path.display())))?;
    Ok(text)
}

fn read_ids(model: &Llama, argument: &str, path: &Path) -> Result<Vec<u32>> {
    let refuse = |reason: String| Error::input(argument, format!("{}: {reason}", path.display()));
    let text = std::fs::read(path).map_err(|error| refuse(error.to_string()))?;
    let ids: Vec<u32> = serde_json::from_slice(&text).map_err(|error| refuse(error.to_string()))?;
    model.check_ids(argument, &ids)?;
    Ok(ids)
}
