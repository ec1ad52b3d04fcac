//! Variable tracking (RULER, section 3.2): one chain of assignments in noise.

use super::super::language::Language;
use super::super::llama::random::Random;
use super::super::sample::{Piece, Question, Sample};
use super::super::task::{Haystack, Kind};
use super::hide;

pub fn sample(language: &dyn Language, hops: usize, size: usize, mut random: Random) -> Option<Sample> {
    if size < hops + 1 {
        return None;
    }
    let chain = language.variables(hops + 1, &mut random);
    let value = language.item(Kind::Number, &mut random);
    let mut facts = vec![language.assign_value(&chain[0], &value)];
    facts.extend(chain.windows(2).map(|pair| language.assign_variable(&pair[1], &pair[0])));
    let mut sentence = language.noise(random.stream(1));
    let hay = (0..size).map(|_| Piece::hay(sentence())).collect();
    let places = random.ascending(0..size, facts.len());
    Some(Sample {
        context: hide(language.variables_are_assigned(), hay, facts, &places),
        separator: language.separator(Haystack::Noise),
        questions: vec![Question {
            query: language.ask_variables(&value, chain.len()),
            answer: chain.join(" "),
            expected: chain,
        }],
    })
}
