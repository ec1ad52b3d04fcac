//! A GGUF file's byte-level BPE as a `tokenizer.json`.

use super::super::error::Result;
use super::metadata::Metadata;
use super::tensors::EMBEDDING;
use serde_json::{Map, Value, json};

const TOKENS: &str = "tokenizer.ggml.tokens";
/// The `token_type` of special tokens.
const CONTROL: u64 = 3;
/// The `token_type` of other tokens that are found in a text before it is cut.
const USER_DEFINED: u64 = 4;

/// How a text is cut before merges, by `tokenizer.ggml.pre`.
struct Cut {
    pre_tokenizer: Value,
    normalizer: Value,
    /// Whether a piece that is a token is taken whole.
    ignore_merges: bool,
    /// Whether a text begins with the token `bos`, where the file does not tell.
    add_bos: bool,
}

/// What a `tokenizer.json` says of the same vocabulary, which has one token for each of the `rows`
/// of the embeddings; none if the file has no vocabulary.
pub fn tokenizer(metadata: &Metadata<'_>, rows: Option<usize>) -> Result<Option<Value>> {
    let Some(tokens) = metadata.texts(TOKENS)? else { return Ok(None) };
    if metadata.text("tokenizer.ggml.model")? != Some("gpt2") {
        return Err(metadata.unexpected("tokenizer.ggml.model", r#""gpt2""#));
    }
    if rows.is_some_and(|rows| rows != tokens.len()) {
        let expected = format!("a token for each of the {} rows of {EMBEDDING}", rows.unwrap_or(0));
        return Err(metadata.unexpected(TOKENS, &expected));
    }
    let vocab: Map<String, Value> =
        tokens.iter().zip(0u32..).map(|(&token, id)| (token.to_owned(), id.into())).collect();
    if vocab.len() != tokens.len() {
        return Err(metadata.unexpected(TOKENS, "tokens that differ"));
    }
    let merges_key = "tokenizer.ggml.merges";
    let merges = metadata.texts(merges_key)?.ok_or_else(|| metadata.missing(merges_key))?;
    let cut = Cut::of(metadata)?;
    let add_bos = metadata.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(cut.add_bos);
    let bos_key = "tokenizer.ggml.bos_token_id";
    let bos = id(metadata, bos_key, tokens.len())?;
    let post_processor = match bos.filter(|_| add_bos) {
        Some(bos) => begins_with(tokens[bos as usize], bos),
        None if add_bos => return Err(metadata.missing(bos_key)),
        None => Value::Null,
    };
    Ok(Some(json!({
        "version": "1.0",
        "added_tokens": added_tokens(metadata, &tokens)?,
        "normalizer": cut.normalizer,
        "pre_tokenizer": cut.pre_tokenizer,
        "post_processor": post_processor,
        "decoder": byte_level(true),
        "model": {
            "type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": cut.ignore_merges
        }
    })))
}

/// The tokens that end an answer, a sequence, or a turn.
pub fn eos_ids(metadata: &Metadata<'_>) -> Result<Vec<u32>> {
    let tokens = metadata.texts(TOKENS)?.map_or(u32::MAX as usize, |tokens| tokens.len());
    let keys = ["eos", "eot", "eom"].map(|name| format!("tokenizer.ggml.{name}_token_id"));
    let ids = keys.iter().map(|key| id(metadata, key, tokens)).collect::<Result<Vec<_>>>()?;
    Ok(ids.into_iter().flatten().collect())
}

/// The id of a token, one of so many.
fn id(metadata: &Metadata<'_>, key: &str, tokens: usize) -> Result<Option<u32>> {
    match metadata.whole(key)? {
        Some(id) if id >= tokens as u64 => Err(metadata.unexpected(key, &format!("one of {tokens} tokens"))),
        id => Ok(id.map(|id| id as u32)),
    }
}

impl Cut {
    fn of(metadata: &Metadata<'_>) -> Result<Self> {
        const LETTERS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+";
        const REST: &str = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
        // The byte-level cut by another expression than GPT-2's.
        let by = |digits: &str| {
            let split = json!({
                "type": "Split", "pattern": { "Regex": format!("{LETTERS}|{digits}|{REST}") },
                "behavior": "Isolated", "invert": false
            });
            json!({ "type": "Sequence", "pretokenizers": [split, byte_level(false)] })
        };
        let digits = json!({ "type": "Digits", "individual_digits": true });
        let key = "tokenizer.ggml.pre";
        let plain = |pre_tokenizer| Self {
            pre_tokenizer,
            normalizer: Value::Null,
            ignore_merges: false,
            add_bos: false,
        };
        Ok(match metadata.text(key)? {
            Some("gpt-2") => plain(byte_level(true)),
            Some("smollm") => {
                plain(json!({ "type": "Sequence", "pretokenizers": [digits, byte_level(true)] }))
            }
            Some("llama-bpe") => Self { ignore_merges: true, add_bos: true, ..plain(by(r"\p{N}{1,3}")) },
            Some("qwen2") => Self { normalizer: json!({ "type": "NFC" }), ..plain(by(r"\p{N}")) },
            _ => {
                let expected = r#"one of "gpt-2", "smollm", "llama-bpe" and "qwen2""#;
                return Err(metadata.unexpected(key, expected));
            }
        })
    }
}

/// Bytes as characters; with GPT-2's expression to cut by, or as the text is cut already.
fn byte_level(use_regex: bool) -> Value {
    json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex
    })
}

/// A special token before each text.
fn begins_with(token: &str, id: u32) -> Value {
    let special = json!({ "SpecialToken": { "id": token, "type_id": 0 } });
    let text = |name: &str| json!({ "Sequence": { "id": name, "type_id": 0 } });
    json!({
        "type": "TemplateProcessing",
        "single": [special, text("A")],
        "pair": [special, text("A"), text("B")],
        "special_tokens": { token: { "id": token, "ids": [id], "tokens": [token] } }
    })
}

/// Tokens that are not cut, by their types.
fn added_tokens(metadata: &Metadata<'_>, tokens: &[&str]) -> Result<Vec<Value>> {
    let key = "tokenizer.ggml.token_type";
    let types = metadata.wholes(key)?.unwrap_or_else(|| vec![1; tokens.len()]);
    if types.len() != tokens.len() {
        return Err(metadata.unexpected(key, &format!("the type of each of {} tokens", tokens.len())));
    }
    let added = tokens.iter().zip(types).zip(0u32..);
    let added = added.filter(|&((_, kind), _)| [CONTROL, USER_DEFINED].contains(&kind));
    let token = |((token, kind), id)| {
        json!({
            "id": id, "content": token, "special": kind == CONTROL, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false
        })
    };
    Ok(added.map(token).collect())
}
