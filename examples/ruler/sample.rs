//! A sample: a context with facts in it, and what is asked about them.

/// One context and its questions.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// In order, with the separator between them.
    pub context: Vec<Piece>,
    pub separator: &'static str,
    /// The task's question first; others only where they were asked for.
    pub questions: Vec<Question>,
}

/// A sentence, a fact, a word.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    pub text: String,
    /// Whether it is more than hay.
    pub fact: bool,
}

/// A question with its answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// With the words that the answer begins with.
    pub query: String,
    /// A good answer in full, for training.
    pub answer: String,
    /// What must be found in the answer.
    pub expected: Vec<String>,
}

impl Piece {
    /// Something of no matter.
    pub fn hay(text: String) -> Self {
        Self { text, fact: false }
    }

    /// Something that may be asked for.
    pub fn fact(text: String) -> Self {
        Self { text, fact: true }
    }
}

impl Sample {
    /// The context's text.
    pub fn text(&self) -> String {
        let texts: Vec<&str> = self.context.iter().map(|piece| piece.text.as_str()).collect();
        texts.join(self.separator)
    }
}

impl Question {
    /// The share of what was expected that `answer` has in it, without regard to case (RULER's
    /// `string_match_all`).
    pub fn score(&self, answer: &str) -> f64 {
        let answer = answer.to_lowercase();
        let found = self.expected.iter().filter(|expected| answer.contains(&expected.to_lowercase()));
        found.count() as f64 / self.expected.len().max(1) as f64
    }
}
