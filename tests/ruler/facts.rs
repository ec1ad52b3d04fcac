//! What every sample holds, read from its text by rules that are written here anew.

use super::english::English;
use super::fit::Fit;
use super::language::Language;
use super::sample::Sample;
use super::samples::{count_words, small_answer_len};
use super::small::Small;
use super::task::{Haystack, Task};
use proptest::prelude::*;
use std::collections::{BTreeSet, HashMap};

fn task() -> impl Strategy<Value = Task> {
    prop::sample::select(Task::ALL.to_vec())
}

fn fit(task: Task, len: usize, questions: usize, seed: u64) -> Fit {
    Fit { task, len, answer_len: small_answer_len(task), questions, seed }
}

fn small(task: Task, len: usize, questions: usize, seed: u64) -> Sample {
    fit(task, len, questions, seed).sample(&Small, &count_words).expect("a sample of this length")
}

/// About a token for every four letters, as tokenizers for English have it.
fn english(task: Task, len: usize, seed: u64) -> Sample {
    let fit = Fit { task, len, answer_len: task.answer_len(), questions: 1, seed };
    fit.sample(&English, &|text| text.len().div_ceil(4)).expect("a sample of this length")
}

proptest! {
    #[test]
    fn a_sample_fills_its_length(task in task(), len in 256usize..3000, seed: u64) {
        let sample = small(task, len, 1, seed);
        let used = count_words(&sample.text()) + count_words(&sample.questions[0].query) + small_answer_len(task);
        prop_assert!(used <= len);
        // No more than a unit of hay is missing; lists grow by three words or by ten times a count.
        let slack = match task {
            Task::Cwe => 64 + len / 50,
            _ => 24,
        };
        prop_assert!(used + slack >= len, "{used} of {len}");
    }

    #[test]
    fn an_english_sample_fits_its_length(task in task(), len in 2048usize..8192, seed: u64) {
        let sample = english(task, len, seed);
        let used = sample.text().len().div_ceil(4) + sample.questions[0].query.len().div_ceil(4) + task.answer_len();
        prop_assert!(used <= len && used * 10 >= len * 8, "{used} of {len}");
    }

    #[test]
    fn the_same_seed_gives_the_same_sample(task in task(), seed in 0u64..u64::MAX) {
        prop_assert_eq!(small(task, 400, 1, seed), small(task, 400, 1, seed));
        prop_assert_ne!(small(task, 400, 1, seed), small(task, 400, 1, seed + 1));
        prop_assert_eq!(english(task, 4096, seed), english(task, 4096, seed));
    }

    /// A right answer has all that is expected, and nothing has none of it.
    #[test]
    fn the_answer_scores_in_full(task in task(), questions in 1usize..6, seed: u64) {
        let english = english(task, 4096, seed);
        for question in small(task, 400, questions, seed).questions.iter().chain(&english.questions) {
            prop_assert_eq!(question.score(&question.answer), 1.0);
            prop_assert_eq!(question.score(""), 0.0);
            prop_assert!(!question.expected.is_empty());
        }
    }

    /// The query does not give the answer away.
    #[test]
    fn what_is_expected_is_in_the_context_only(task in task(), seed: u64) {
        for sample in [small(task, 400, 1, seed), english(task, 4096, seed)] {
            let (text, question) = (sample.text(), &sample.questions[0]);
            for expected in &question.expected {
                prop_assert!(text.contains(expected.as_str()), "{expected} is not in the context");
                prop_assert!(!question.query.contains(expected.as_str()), "{expected} is in the query");
            }
        }
    }

    #[test]
    fn the_small_model_knows_every_word(task in task(), questions in 1usize..6, seed: u64) {
        let vocabulary: BTreeSet<String> = Small::vocabulary().into_iter().collect();
        let sample = small(task, 400, questions, seed);
        let questions = sample.questions.iter().flat_map(|question| [question.query.clone(), question.answer.clone()]);
        let texts: Vec<String> = questions.chain([sample.text()]).collect();
        for word in texts.iter().flat_map(|text| text.split_whitespace()) {
            prop_assert!(vocabulary.contains(word), "{word} is not in the vocabulary");
        }
    }

    /// No other needle has a key that is asked for, and a key asked for has all of its values.
    #[test]
    fn needles_answer_one_question(
        task in task().prop_filter("needles", |task| task.niah().is_some()), len in 128usize..2000, seed: u64
    ) {
        let niah = task.niah().unwrap();
        let sample = small(task, len, 1, seed);
        let words = count_words;
        let (key_len, value_len) = match task {
            Task::NiahMultikey3 => (3, 3),
            Task::NiahSingle3 => (2, 3),
            _ => (2, 2),
        };
        let mut values: HashMap<String, Vec<String>> = HashMap::new();
        let mut needles = 0;
        for piece in sample.context.iter().filter(|piece| piece.fact) {
            let parts: Vec<&str> = piece.text.split_whitespace().collect();
            prop_assert_eq!((parts[0], words(&piece.text)), ("<needle>", 1 + key_len + value_len));
            values.entry(parts[1..=key_len].join(" ")).or_default().push(parts[1 + key_len..].join(" "));
            needles += 1;
        }
        if niah.haystack != Haystack::Needles {
            prop_assert_eq!(needles, niah.keys * niah.values);
        }
        let question = &sample.questions[0];
        let asked: Vec<String> = question.query.split_whitespace().filter(|word| !word.starts_with('<'))
            .collect::<Vec<_>>().chunks(key_len).map(|key| key.join(" ")).collect();
        prop_assert_eq!(asked.len(), niah.asked);
        let found: Vec<String> = asked.iter().flat_map(|key| values[key].clone()).collect();
        prop_assert_eq!(&found, &question.expected);
        prop_assert_eq!(found.len(), niah.asked * niah.values);
    }

    /// The variables that have the value, by carrying out the assignments.
    #[test]
    fn a_chain_leads_to_all_variables(
        (task, hops) in prop::sample::select(vec![(Task::Vt2, 2), (Task::Vt3, 3), (Task::Vt4, 4)]), len in 256usize..2000, seed: u64
    ) {
        let sample = small(task, len, 1, seed);
        let question = &sample.questions[0];
        let mut holders = vec![question.query.strip_prefix("<trace> ").unwrap().to_owned()];
        for piece in sample.context.iter().filter(|piece| piece.fact) {
            let (from, to) = piece.text.strip_prefix("<put> ").unwrap().rsplit_once(' ').unwrap();
            prop_assert!(holders.contains(&from.to_owned()));
            holders.push(to.to_owned());
        }
        prop_assert_eq!(&holders[1..], &question.expected[..]);
        prop_assert_eq!(question.expected.len(), hops + 1);
    }

    /// By counting: the ten stand out, whatever the length.
    #[test]
    fn the_most_common_words_are_asked_for(len in 160usize..4000, seed: u64) {
        let sample = small(Task::Cwe, len, 1, seed);
        let counts = counts(&sample);
        prop_assert_eq!(top(&counts, 10), sample.questions[0].expected.iter().cloned().collect());
        prop_assert!(counts[9].1 >= 10 * counts[10].1);
    }

    #[test]
    fn the_most_frequent_coded_words_are_asked_for(len in 128usize..4000, seed: u64) {
        let sample = small(Task::Fwe, len, 1, seed);
        let mut counts = counts(&sample);
        let dots = counts.remove(0);
        prop_assert_eq!(dots.0.as_str(), "<dots>");
        let three: Vec<String> = counts[..3].iter().map(|(word, _)| word.clone()).collect();
        prop_assert_eq!(&three, &sample.questions[0].expected);
        prop_assert!(counts[0].1 > counts[1].1 && counts[1].1 > counts[2].1 && counts[2].1 > counts[3].1);
    }

    /// Where persons and objects are, by following the story.
    #[test]
    fn a_story_has_one_answer(
        task in prop::sample::select(vec![Task::Qa1, Task::Qa2, Task::Qa3]), len in 200usize..2000, questions in 1usize..6, seed: u64
    ) {
        let sample = small(task, len, questions, seed);
        let mut place: HashMap<&str, &str> = HashMap::new();
        let mut holder: HashMap<&str, &str> = HashMap::new();
        let mut visits: HashMap<&str, Vec<&str>> = HashMap::new();
        let mut taker: HashMap<&str, &str> = HashMap::new();
        for piece in sample.context.iter().filter(|piece| piece.fact) {
            let parts: Vec<&str> = piece.text.split_whitespace().collect();
            let &[verb, first, second] = &parts[..] else { panic!("{}", piece.text) };
            let (person, what) = if verb == "<went>" { (first, second) } else { (second, first) };
            match verb {
                "<went>" => {
                    place.insert(person, what);
                    let carried = holder.iter().filter(|(_, holder)| **holder == person);
                    carried.for_each(|(object, _)| visits.entry(object).or_default().push(what));
                }
                "<got>" => {
                    prop_assert!(!holder.contains_key(what), "{} is held", what);
                    let here = place[person];
                    prop_assert!(visits.get(what).is_none_or(|visits| visits.last() == Some(&here)));
                    visits.entry(what).or_insert_with(|| vec![here]);
                    holder.insert(what, person);
                    taker.insert(what, person);
                }
                _ => {
                    prop_assert_eq!(verb, "<left>");
                    prop_assert_eq!(holder.remove(what), Some(person));
                }
            }
        }
        for question in &sample.questions {
            let parts: Vec<&str> = question.query.split_whitespace().collect();
            let answer = match (task, &parts[..]) {
                (Task::Qa1, ["<where>", person]) => place[person],
                (Task::Qa2, ["<where>", object]) => visits[object].last().unwrap(),
                (Task::Qa3, ["<before>", object, to]) => {
                    let at: Vec<usize> = (0..visits[object].len()).filter(|&at| visits[object][at] == *to).collect();
                    prop_assert_eq!(at.len(), 1);
                    visits[object][at[0] - 1]
                }
                _ => panic!("{}", question.query),
            };
            prop_assert_eq!(&question.expected, &[answer.to_owned()]);
            prop_assert_eq!(question.answer.split_whitespace().last(), Some(answer));
            if task == Task::Qa2 {
                prop_assert_eq!(question.answer.split_whitespace().next(), Some(taker[parts[1]]));
            }
        }
    }
}

/// Words of the context with their counts, the most frequent first.
fn counts(sample: &Sample) -> Vec<(String, usize)> {
    let mut counts: HashMap<&str, usize> = HashMap::new();
    sample
        .context
        .iter()
        .filter(|piece| piece.fact)
        .for_each(|piece| *counts.entry(&piece.text).or_default() += 1);
    let mut counts: Vec<(String, usize)> =
        counts.into_iter().map(|(word, count)| (word.to_owned(), count)).collect();
    counts.sort_by_key(|(word, count)| (std::cmp::Reverse(*count), word.clone()));
    counts
}

fn top(counts: &[(String, usize)], count: usize) -> BTreeSet<String> {
    counts[..count].iter().map(|(word, _)| word.clone()).collect()
}

/// Answers are looked for as parts of a text: a word within another would be found where it is not.
#[test]
fn no_word_of_the_small_model_is_within_another() {
    let words = Small::vocabulary();
    for (index, word) in words.iter().enumerate() {
        for (other_index, other) in words.iter().enumerate() {
            assert!(index == other_index || !other.contains(word.as_str()), "{word} is within {other}");
        }
    }
}

#[test]
fn needles_lie_everywhere() {
    for task in [Task::NiahSingle1, Task::NiahSingle2, Task::NiahMultikey1] {
        let mut thirds = [0; 3];
        for seed in 0..300 {
            let sample = small(task, 600, 1, seed);
            let expected = format!(" {}", sample.questions[0].expected[0]);
            let at = sample
                .context
                .iter()
                .position(|piece| piece.fact && piece.text.ends_with(&expected))
                .unwrap();
            thirds[(at * 3 / sample.context.len()).min(2)] += 1;
        }
        // A third of 300 is 100, with a deviation of 8.
        assert!(thirds.iter().all(|&count| (65..=135).contains(&count)), "{task:?}: {thirds:?}");
    }
}

#[test]
fn a_task_that_does_not_fit_is_refused() {
    for task in Task::ALL {
        assert_eq!(fit(task, 4, 1, 0).sample(&Small, &count_words), None, "{task:?}");
    }
    assert_eq!(fit(Task::Cwe, 64, 1, 0).sample(&Small, &count_words), None);
}

/// RULER's sentences, word for word.
#[test]
fn english_needles_read_as_in_ruler() {
    let sample = english(Task::NiahMultivalue, 4096, 7);
    let question = &sample.questions[0];
    let key = question.query.split(" for ").nth(1).unwrap().split(' ').next().unwrap();
    assert!(sample.text().starts_with(
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about the \
         numbers afterwards."
    ));
    for value in &question.expected {
        assert_eq!(value.len(), 7);
        assert!(sample.text().contains(&format!("One of the special magic numbers for {key} is: {value}.")));
    }
    assert_eq!(
        question.query,
        format!(
            "\nWhat are all the special magic numbers for {key} mentioned in the provided text? The special magic numbers for {key} \
             mentioned in the provided text are"
        )
    );
    let single = english(Task::NiahSingle1, 4096, 7);
    assert!(single.text().starts_with("A special magic number is hidden within the following text."));
    assert!(single.text().contains(
        "\nThe grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
    ));
    assert!(single.questions[0].query.starts_with("\nWhat is the special magic number for "));
    let names: BTreeSet<&str> = Task::ALL.iter().map(|task| task.name()).collect();
    assert_eq!(names.len(), Task::ALL.len());
    assert_eq!(English.separator(Haystack::Essay), " ");
}
