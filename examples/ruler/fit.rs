//! Samples of a given length in tokens.

use super::language::Language;
use super::sample::Sample;
use super::task::Task;
use super::tasks::sample;

/// What a sample is to be.
#[derive(Clone, Copy, Debug)]
pub struct Fit {
    pub task: Task,
    /// Tokens of context, first question and answer at most.
    pub len: usize,
    /// Tokens that are left for the answer.
    pub answer_len: usize,
    /// Questions at most; those behind the first have no room reserved.
    pub questions: usize,
    pub seed: u64,
}

/// Units of hay by which tokens per unit are estimated.
const PROBE: [usize; 2] = [128, 256];

impl Fit {
    /// The sample with the most hay that fits, where `tokens` counts those of a text. `None` if
    /// even the least does not.
    pub fn sample(&self, language: &dyn Language, tokens: &dyn Fn(&str) -> usize) -> Option<Sample> {
        let draw = |size| sample(self.task, language, size, self.questions, self.seed);
        let len =
            |sample: &Sample| tokens(&sample.text()) + tokens(&sample.questions[0].query) + self.answer_len;
        // More units than could fit; a unit has a token at least.
        let [few, more] = PROBE.map(|size| draw(size).map(|sample| len(&sample)));
        let per_unit = match (few, more) {
            (Some(few), Some(more)) => (more.saturating_sub(few) / (PROBE[1] - PROBE[0])).max(1),
            _ => 1,
        };
        let mut above = self.len / per_unit * 3 / 2 + PROBE[1];
        let (mut below, mut best) = (0, None);
        while below < above {
            let size = below + (above - below) / 2;
            match draw(size) {
                // Too little hay for the facts.
                None => below = size + 1,
                Some(sample) if len(&sample) <= self.len => (below, best) = (size + 1, Some(sample)),
                Some(_) => above = size,
            }
        }
        best
    }
}
