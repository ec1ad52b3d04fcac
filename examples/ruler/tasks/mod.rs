//! Makers of samples, one for each family of tasks.

mod needles;
mod stories;
mod variables;
mod words;

use super::language::Language;
use super::llama::random::Random;
use super::sample::{Piece, Sample};
use super::task::Task;

/// A sample of `task` with `size` units of hay (sentences, needles or words), the same for the same
/// seed: with the task's question, and up to `questions` in all if the context answers more. `None`
/// if the task needs more units.
pub fn sample(
    task: Task,
    language: &dyn Language,
    size: usize,
    questions: usize,
    seed: u64,
) -> Option<Sample> {
    let random = Random(seed).stream(task as u64 + 1);
    match task {
        Task::Vt2 => variables::sample(language, 2, size, random),
        Task::Vt3 => variables::sample(language, 3, size, random),
        Task::Vt4 => variables::sample(language, 4, size, random),
        Task::Cwe => words::common(language, size, random),
        Task::Fwe => words::frequent(language, size, random),
        Task::Qa1 => stories::sample(language, 1, size, questions, random),
        Task::Qa2 => stories::sample(language, 2, size, questions, random),
        Task::Qa3 => stories::sample(language, 3, size, questions, random),
        task => needles::sample(language, task.niah()?, size, questions, random),
    }
}

/// `opening`, then `hay` with the facts in it, in their order: fact `i` stands before the unit of
/// hay `places[i]`, places ascending.
fn hide(opening: String, hay: Vec<Piece>, facts: Vec<String>, places: &[usize]) -> Vec<Piece> {
    let mut context = Vec::with_capacity(hay.len() + facts.len() + 1);
    context.push(Piece::hay(opening));
    let mut facts = facts.into_iter().zip(places).peekable();
    for (index, piece) in hay.into_iter().enumerate() {
        while let Some((fact, _)) = facts.next_if(|&(_, &place)| place <= index) {
            context.push(Piece::fact(fact));
        }
        context.push(piece);
    }
    context.extend(facts.map(|(fact, _)| Piece::fact(fact)));
    context
}
