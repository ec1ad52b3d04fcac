//! Samples in the small model's tokens, as JSON lines: what it is trained on.

use super::fit::Fit;
use super::language::Language;
use super::sample::Sample;
use super::small::Small;
use super::task::Task;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::io::Write;

/// Which samples to write.
#[derive(clap::Args, Clone, Debug)]
pub struct Samples {
    /// Tasks that samples are drawn from, each as often as it is named [default: all]
    #[arg(long, value_enum, value_delimiter = ',')]
    pub tasks: Vec<Task>,
    /// Tokens of a context with its first question and answer at most
    #[arg(long, default_value_t = 512, value_name = "L")]
    pub len: usize,
    /// Samples
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub count: usize,
    /// Seed of the first sample; the next has the next
    #[arg(long, default_value_t = 0, value_name = "S")]
    pub seed: u64,
    /// Questions on one context at most
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub questions: usize,
}

/// Writes a line for each sample: `{"task", "context", "facts", "questions": [{"query",
/// "answer"}]}` in token ids, where `facts` are the half-open ranges of context tokens that belong
/// together.
///
/// # Errors
/// Those of `to`; and of a task that has no sample of the length.
pub fn write(args: &Samples, to: &mut dyn Write) -> std::io::Result<()> {
    let words = Small::vocabulary();
    let ids: HashMap<&str, u32> = words.iter().map(String::as_str).zip(0..).collect();
    let tasks = if args.tasks.is_empty() { &Task::ALL[..] } else { &args.tasks };
    for index in 0..args.count {
        let (task, seed) = (tasks[index % tasks.len()], args.seed.wrapping_add(index as u64));
        let answer_len = small_answer_len(task);
        let fit = Fit { task, len: args.len, answer_len, questions: args.questions, seed };
        let Some(sample) = fit.sample(&Small, &count_words) else {
            let reason = format!("--len: {} has no sample of {} tokens", task.name(), args.len);
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, reason));
        };
        writeln!(to, "{}", line(task, &sample, &ids))?;
    }
    Ok(())
}

/// Words of a text: the small model's tokens.
pub fn count_words(text: &str) -> usize {
    text.split_whitespace().count()
}

/// Tokens of the small model's longest answer, with its end.
pub fn small_answer_len(task: Task) -> usize {
    match task {
        Task::NiahMultivalue | Task::NiahMultiquery => 4 * (2 + 2) + 1,
        Task::NiahSingle3 | Task::NiahMultikey3 => 3 + 1,
        Task::Vt2 => 3 + 1,
        Task::Vt3 => 4 + 1,
        Task::Vt4 => 5 + 1,
        Task::Cwe => 10 + 1,
        Task::Fwe => 3 + 1,
        Task::Qa1 => 1 + 1,
        _ => 2 + 1,
    }
}

fn line(task: Task, sample: &Sample, ids: &HashMap<&str, u32>) -> Value {
    let encode =
        |text: &str| text.split_whitespace().map(|word| ids.get(word).copied()).collect::<Option<Vec<u32>>>();
    let mut context = Vec::new();
    let mut facts = Vec::new();
    for piece in &sample.context {
        let start = context.len();
        context.extend(encode(&piece.text).expect("words of the vocabulary"));
        if piece.fact {
            facts.push([start, context.len()]);
        }
    }
    let questions = sample.questions.iter().map(|question| {
        let answer = format!("{} {}", question.answer, Small.end());
        json!({ "query": encode(&question.query), "answer": encode(&answer) })
    });
    json!({ "task": task.name(), "context": context, "facts": facts, "questions": questions.collect::<Vec<_>>() })
}
