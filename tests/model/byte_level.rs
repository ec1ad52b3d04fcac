//! A byte-level BPE `tokenizer.json`, as those of Llama 3 and Qwen2 are, only small.

use serde_json::{Map, Value, json};

/// The id of `he`, the one merge; ids below are bytes.
pub const HE: u32 = 256;
/// Put before a text.
pub const BOS: u32 = 257;
/// Put behind a text.
pub const EOS: u32 = 258;

/// The file's content.
pub fn tokenizer() -> Value {
    let mut vocab: Map<String, Value> =
        (0..=255u8).map(|byte| (symbol(byte).to_string(), byte.into())).collect();
    vocab.insert("he".into(), HE.into());
    let special = |id: u32, content: &str| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true
        })
    };
    let byte_level =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    let framed = |sequence: &str| json!({ "Sequence": { "id": sequence, "type_id": 0 } });
    let marker = |token: &str| json!({ "SpecialToken": { "id": token, "type_id": 0 } });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [special(BOS, "<s>"), special(EOS, "</s>")],
        "pre_tokenizer": byte_level, "decoder": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [marker("<s>"), framed("A"), marker("</s>")],
            "pair": [marker("<s>"), framed("A"), framed("B"), marker("</s>")],
            "special_tokens": {
                "<s>": { "id": "<s>", "ids": [BOS], "tokens": ["<s>"] },
                "</s>": { "id": "</s>", "ids": [EOS], "tokens": ["</s>"] }
            }
        },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab,
            "merges": ["h e"]
        }
    })
}

/// The character that stands for a byte: itself where it is printable, and one above 255 for each
/// of the rest.
pub fn symbol(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    match printable(byte) {
        true => byte.into(),
        false => char::from_u32(256 + (0..byte).filter(|&byte| !printable(byte)).count() as u32).unwrap(),
    }
}
