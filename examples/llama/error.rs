//! What can go wrong, each in one line.

/// A `Result` with the example's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Why the example stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something the user gave: an option, a file of the checkpoint, a list of ids.
    #[error("{argument}: {reason}")]
    Input { argument: String, reason: String },
    /// An error of the attention or the collective.
    #[error(transparent)]
    Attention(#[from] star_attention::Error),
    /// An error of the linear layers.
    #[error("candle: {}", without_backtrace(.0))]
    Candle(#[from] candle_core::Error),
    /// A thread that could not be started, or that panicked.
    #[error("rank {rank}: {reason}")]
    Rank { rank: usize, reason: String },
}

/// What candle says, without the backtrace that it adds where `RUST_BACKTRACE` asks for one.
pub fn without_backtrace(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

impl Error {
    /// Bad input called `argument`.
    pub fn input(argument: impl Into<String>, reason: impl ToString) -> Self {
        Self::Input { argument: argument.into(), reason: reason.to_string() }
    }
}
