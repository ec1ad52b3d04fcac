//! Aggregation (RULER, section 3.3): the most common words of a list, and the most frequent of a
//! coded text.

use super::super::language::Language;
use super::super::llama::random::Random;
use super::super::sample::{Piece, Question, Sample};
use super::super::task::Haystack;

/// Common words, and how often each stands in a list for each time that another word does: RULER's
/// 30 to 3.
const COMMON: usize = 10;
const RATIO: usize = 10;
/// How often another word stands in a list that is long enough: RULER's number.
const UNCOMMON_TIMES: usize = 3;
/// The exponent of the coded words' frequencies, by rank, and how many of them count.
const ALPHA: i32 = 2;
const FREQUENT: usize = 3;

/// `size` words, of which ten stand in the list ten times as often as each of the others.
pub fn common(language: &dyn Language, size: usize, mut random: Random) -> Option<Sample> {
    // Another word stands in the list three times; fewer in a short list, and more in one for which
    // there are not enough words.
    let others = |times: usize| size.checked_sub(COMMON * RATIO * times).map_or(0, |left| left / times);
    let most = language.most_words() - COMMON;
    let mut times = (1..=UNCOMMON_TIMES).rev().find(|&times| others(times) >= COMMON)?;
    while others(times) > most && others(times + 1) >= COMMON {
        times += 1;
    }
    let others = others(times).min(most);
    let chosen = language.words(COMMON + others, &mut random);
    let (common, rest) = chosen.split_at(COMMON);
    let repeat = |words: &[String], times| {
        words.iter().flat_map(|word| std::iter::repeat_n(word.clone(), times)).collect::<Vec<_>>()
    };
    let mut list = [repeat(common, RATIO * times), repeat(rest, times)].concat();
    random.shuffle(&mut list);
    let mut context = vec![Piece::hay(language.words_are_listed())];
    context
        .extend(list.iter().enumerate().map(|(index, word)| Piece::fact(language.listed(index + 1, word))));
    Some(Sample {
        context,
        separator: language.separator(Haystack::Words),
        questions: vec![Question {
            query: language.ask_common(COMMON),
            answer: common.join(" "),
            expected: common.to_vec(),
        }],
    })
}

/// About `size` words, the word of rank `k` (from 1) with frequency `k^-2 / zeta(2)`; the first is
/// dots.
pub fn frequent(language: &dyn Language, size: usize, mut random: Random) -> Option<Sample> {
    let zeta = std::f64::consts::PI.powi(2) / 6.0;
    let times = |rank: usize| (size as f64 * (rank as f64).powi(-ALPHA) / zeta) as usize;
    // Ranks without a word end the vocabulary.
    let ranks = (1..=language.most_words()).take_while(|&rank| times(rank) > 0).count();
    // The third must be more frequent than what follows it.
    if times(FREQUENT + 1) <= times(FREQUENT + 2) {
        return None;
    }
    let mut words = vec![language.dots().to_owned()];
    words.extend(language.coded_words(ranks - 1, &mut random));
    let repeated = words.iter().enumerate().flat_map(|(index, word)| vec![word.clone(); times(index + 1)]);
    let mut text: Vec<String> = repeated.collect();
    random.shuffle(&mut text);
    let mut context = vec![Piece::hay(language.text_is_coded())];
    context.extend(text.into_iter().map(Piece::fact));
    let expected = words[1..=FREQUENT].to_vec();
    Some(Sample {
        context,
        separator: " ",
        questions: vec![Question { query: language.ask_frequent(), answer: expected.join(" "), expected }],
    })
}
