//! Chat templates: how an instruction-tuned model is told who speaks.

use super::llama::error::{Error, Result};
use super::llama::tokenizer::Tokenizer;

/// One turn of the user, and the start of the assistant's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Chat {
    /// Before what the user says.
    pub user: &'static str,
    /// The token that ends a turn.
    pub end: &'static str,
    /// Behind that token, before what the assistant says.
    pub assistant: &'static str,
}

/// The templates by the token that only a vocabulary of theirs has.
const CHATS: [(&str, Chat); 4] = [
    // ChatML: SmolLM2, Qwen.
    (
        "<|im_start|>",
        Chat { user: "<|im_start|>user\n", end: "<|im_end|>", assistant: "\n<|im_start|>assistant\n" },
    ),
    // Llama 3.
    (
        "<|start_header_id|>",
        Chat {
            user: "<|start_header_id|>user<|end_header_id|>\n\n",
            end: "<|eot_id|>",
            assistant: "<|start_header_id|>assistant<|end_header_id|>\n\n",
        },
    ),
    // Gemma.
    (
        "<start_of_turn>",
        Chat { user: "<start_of_turn>user\n", end: "<end_of_turn>", assistant: "\n<start_of_turn>model\n" },
    ),
    // Phi-3.
    ("<|assistant|>", Chat { user: "<|user|>\n", end: "<|end|>", assistant: "\n<|assistant|>\n" }),
];

impl Chat {
    /// The template of a model, by its vocabulary.
    ///
    /// # Errors
    /// [`Error::Input`] for a vocabulary without the tokens of any.
    pub fn of(tokenizer: &Tokenizer) -> Result<Self> {
        let known = |token: &str| tokenizer.id(token).is_some();
        let found = CHATS.iter().find(|(marker, chat)| known(marker) && known(chat.end));
        found.map(|&(_, chat)| chat).ok_or_else(|| {
            let markers = CHATS.map(|(marker, _)| marker);
            Error::input("--chat", format!("expected a vocabulary with one of {markers:?}"))
        })
    }
}
