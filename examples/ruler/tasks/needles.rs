//! Needles in a haystack (RULER, section 3.1): a fact for each value of each key.

use super::super::language::Language;
use super::super::llama::random::Random;
use super::super::sample::{Piece, Question, Sample};
use super::super::task::{Haystack, Niah};
use super::hide;

/// Depths at which needles may lie in an essay: 40 of them from its start to its end, as in RULER.
const DEPTHS: usize = 40;

pub fn sample(
    language: &dyn Language,
    niah: Niah,
    size: usize,
    questions: usize,
    mut random: Random,
) -> Option<Sample> {
    let count = niah.keys * niah.values;
    if niah.haystack != Haystack::Essay && size < count {
        return None;
    }
    let mut used = Vec::new();
    let mut fresh = |kind, random: &mut Random| loop {
        let item = language.item(kind, random);
        if !used.contains(&item) {
            used.push(item.clone());
            return item;
        }
    };
    let keys: Vec<String> = (0..niah.keys).map(|_| fresh(niah.key, &mut random)).collect();
    let mut needles: Vec<(String, String)> = Vec::with_capacity(count);
    for key in &keys {
        for _ in 0..niah.values {
            needles.push((key.clone(), fresh(niah.value, &mut random)));
        }
    }
    random.shuffle(&mut needles);
    let asked = random.sample(niah.asked, &keys);

    let mut others = Vec::new();
    let (hay, places) = match niah.haystack {
        Haystack::Essay => {
            let mut sentence = language.essay(random.stream(1));
            let hay: Vec<Piece> = (0..size).map(|_| Piece::hay(sentence())).collect();
            let depths = random.ascending(0..DEPTHS, count);
            (hay, depths.into_iter().map(|depth| size * depth / (DEPTHS - 1)).collect())
        }
        Haystack::Needles => {
            let mut stream = random.stream(1);
            let draw = |kind, random: &mut Random| language.item(kind, random);
            while others.len() < size {
                let other = (draw(niah.key, &mut stream), draw(niah.value, &mut stream));
                // A distractor must not answer the question; among themselves they may share a key
                // once all are in use.
                if !keys.contains(&other.0) {
                    others.push(other);
                }
            }
            let needle = |(key, value): &(String, String)| language.needle(niah.value, key, value);
            let hay = others.iter().map(|other| Piece::fact(needle(other))).collect();
            (hay, random.ascending(0..size, count))
        }
        _ => {
            let mut sentence = language.noise(random.stream(1));
            let hay = (0..size).map(|_| Piece::hay(sentence())).collect();
            (hay, random.ascending(0..size, count))
        }
    };

    let question = |keys: &[String], needles: &[(String, String)]| {
        let values = |key: &String| {
            needles.iter().filter(|needle| needle.0 == *key).map(|needle| needle.1.clone()).collect()
        };
        let found: Vec<(String, Vec<String>)> = keys.iter().map(|key| (key.clone(), values(key))).collect();
        Question {
            query: language.ask_needles(niah.value, keys, niah.values),
            answer: language.needles_answer(&found),
            expected: found.into_iter().flat_map(|(_, values)| values).collect(),
        }
    };
    let mut all = vec![question(&asked, &needles)];
    // More of the kind: other keys, if one is asked for, and distractors with a key of their own.
    if niah.asked == 1 {
        let more = keys.iter().filter(|key| !asked.contains(key)).cloned();
        all.extend(more.map(|key| question(&[key], &needles)).take(questions.saturating_sub(all.len())));
        let mut more = random.ascending(0..others.len(), questions.saturating_sub(all.len()));
        random.shuffle(&mut more);
        let own = |key: &String| others.iter().filter(|other| other.0 == *key).count() == 1;
        let more = more.into_iter().map(|index| others[index].0.clone()).filter(own);
        all.extend(more.map(|key| question(&[key], &others)));
    }
    let facts =
        needles.iter().map(|(key, value)| language.needle(niah.value, key, value)).collect::<Vec<_>>();
    Some(Sample {
        context: hide(language.needles_are_hidden(niah.value, count), hay, facts, &places),
        separator: language.separator(niah.haystack),
        questions: all,
    })
}
