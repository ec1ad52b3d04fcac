//! What was run, what was answered, and what it cost.

use super::engine::Engine;
use super::llama::error::Result;
use super::llama::model::Llama;
use super::llama::run::{Answer, Scheme};
use super::llama::table::{bytes, table, time};
use super::llama::threads::threads_per_rank;
use super::llama::tokenizer::Tokenizer;
use super::task::Task;
use star_attention::GeneratedKv;
use star_attention::comm::{AnchorKv, Traffic};
use std::time::Duration;

/// All tasks of one mode together.
pub struct Total {
    pub answers: Vec<Answer>,
    /// Of one context, on average.
    pub encode_time: Duration,
    pub query_time: Duration,
    pub kv_bytes: Vec<usize>,
    pub traffic: Traffic,
    /// Of the bits of all merged outputs: the same on every rank.
    pub checksum: u64,
}

/// What is run.
pub fn headline(model: &Llama, tasks: &[Task], scheme: &Scheme) -> String {
    let (config, layout) = (&model.config, scheme.layout);
    format!(
        "Llama of {} layers, {}/{} heads of {}, {:?} | {} context of {} tokens | star: {} ranks, blocks of {}, anchor of {}, {}; new KV {}",
        config.layers,
        config.heads,
        config.kv_heads,
        config.head_dim,
        model.dtype,
        tasks.len(),
        layout.context_len(),
        layout.ranks(),
        layout.block_len(),
        layout.anchor_len(),
        match scheme.anchor {
            AnchorKv::Encoded => "encoded by each",
            AnchorKv::Received => "received from rank 0",
        },
        match scheme.layout.generated() {
            GeneratedKv::QueryRank => "on the query rank",
            _ => "dealt to all",
        },
    )
}

/// The first queries with the answers of all modes.
///
/// # Errors
/// Errors of the tokenizer.
pub fn answers(
    tokenizer: Option<&Tokenizer>,
    tasks: &[Task],
    results: &[(&'static str, Total)],
) -> Result<String> {
    let heading = ["query", "expected"].into_iter().chain(results.iter().map(|&(name, _)| name));
    let mut rows = vec![heading.map(str::to_owned).collect::<Vec<_>>()];
    let asked = tasks.iter().flat_map(|task| task.queries.iter().zip(&task.expected));
    let (count, shown) = (asked.clone().count(), 16);
    for (index, (query, expected)) in asked.enumerate().take(shown) {
        // A long query is known by its end.
        let end = &query[query.len().saturating_sub(8)..];
        let known = expected.map_or_else(|| Ok("not known".to_owned()), |values| text(tokenizer, &values))?;
        let mut row = vec![text(tokenizer, end)?, known];
        for (_, total) in results {
            let answer = &total.answers[index];
            let verdict = match expected.map(|expected| score(answer, &expected)) {
                Some((right, of)) if right == of => " (right)",
                Some(_) => " (wrong)",
                None => "",
            };
            row.push(text(tokenizer, &answer.tokens)? + verdict);
        }
        rows.push(row);
    }
    if count > shown {
        rows.push(vec![format!("and {} more", count - shown)]);
    }
    Ok(table(&rows))
}

/// The answer of each mode to one query, in full.
///
/// # Errors
/// Errors of the tokenizer.
pub fn texts(tokenizer: &Tokenizer, results: &[(&'static str, Total)]) -> Result<String> {
    let mut text = String::new();
    for (name, total) in results {
        for answer in &total.answers {
            text += &format!("{name}: {}\n", tokenizer.text(&answer.tokens, true)?.trim());
        }
    }
    Ok(text)
}

/// The text of `ids` in one line; without a tokenizer the ids themselves.
fn text(tokenizer: Option<&Tokenizer>, ids: &[u32]) -> Result<String> {
    let Some(tokenizer) = tokenizer else {
        return Ok(ids.iter().map(|id| format!("#{id}")).collect::<Vec<_>>().join(" "));
    };
    let line = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    Ok(tokenizer.text(ids, false)?.chars().map(line).collect())
}

/// What each mode cost, and how often it was right: a column for each mode.
pub fn costs(model: &Llama, tasks: &[Task], results: &[(&'static str, Total)]) -> String {
    let headings = [
        "",
        "answers right",
        "value tokens right",
        "phase 1: context encoding",
        "  speed-up over dense",
        "phase 2: per token",
        "KV of the context, per rank",
        "sent per layer and token",
        "messages per layer and token",
        "merged outputs, on all ranks",
    ];
    let mut rows = headings.map(|heading| vec![heading.to_owned()]);
    let dense = results.iter().find(|(name, _)| *name == "dense").map(|(_, dense)| dense.encode_time);
    for (name, total) in results {
        let expected = tasks.iter().flat_map(|task| &task.expected).zip(&total.answers);
        let scores: Vec<(usize, usize)> =
            expected.filter_map(|(expected, answer)| Some(score(answer, expected.as_ref()?))).collect();
        let values: usize = scores.iter().map(|score| score.0).sum();
        let asked: usize = scores.iter().map(|score| score.1).sum();
        let whole = scores.iter().filter(|(right, of)| right == of).count();
        let share = |part: usize, of: usize| match of {
            0 => "-".to_owned(),
            _ => format!("{part}/{of} ({:.3})", part as f64 / of as f64),
        };
        let encode = total.encode_time.as_secs_f64();
        let generated = total.answers.iter().map(|answer| answer.tokens.len()).sum::<usize>() as f64;
        let layers_tokens = generated * model.config.layers as f64;
        let column = [
            (*name).to_owned(),
            share(whole, scores.len()),
            share(values, asked),
            time(encode),
            dense.map_or_else(|| "-".to_owned(), |dense| format!("{:.2}x", dense.as_secs_f64() / encode)),
            time(total.query_time.as_secs_f64() / generated),
            bytes(total.kv_bytes.iter().copied().max().unwrap_or(0) as f64),
            bytes(total.traffic.bytes as f64 / layers_tokens),
            format!("{:.2}", total.traffic.messages as f64 / layers_tokens),
            format!("{:016x}", total.checksum),
        ];
        rows.iter_mut().zip(column).for_each(|(row, cell)| row.push(cell));
    }
    table(&rows)
}

/// How the times are to be read.
pub fn reading(ranks: usize, engine: Engine) -> String {
    let (cores, each) = (threads_per_rank(1), threads_per_rank(ranks));
    match engine {
        Engine::Threads => format!(
            "Wall time on this machine, whose {cores} cores dense has for itself and star's {ranks} ranks share, {each} for each: the\n\
             speed-up is that on equal hardware. Ranks on machines of their own would have more of it."
        ),
        Engine::Mpi => format!(
            "Wall time of {ranks} processes, and of one of them for dense. The last line tells the bits that all have: any other engine must give\n\
             the same."
        ),
    }
}

/// Tokens of `answer` that are as expected, and how many there could be.
fn score(answer: &Answer, expected: &[u32]) -> (usize, usize) {
    let right = answer.tokens.iter().zip(expected).filter(|(got, expected)| got == expected).count();
    (right, expected.len().min(answer.tokens.len()))
}
