//! What the prompts of the retrieval Llama must hold.

use super::haystack::{BOS, Haystack, KEYS, NEEDLE, NEEDLE_LEN, QUERY, VALUES, WORDS};
use super::llama::error::Error;
use std::collections::HashSet;

#[test]
fn needles_stand_in_repeated_noise() {
    for seed in 0..200 {
        let (len, needles) = (200 + 13 * seed as usize, 1 + seed as usize % 48);
        let haystack = Haystack::new(len, needles, seed).unwrap();
        let context = &haystack.context;
        assert_eq!((context.len(), haystack.needles.len(), context[0]), (len, needles, BOS));
        let keys: HashSet<u32> = haystack.needles.iter().map(|needle| needle.key).collect();
        assert_eq!(keys.len(), needles, "keys are distinct");
        let mut noise = vec![true; len];
        noise[0] = false;
        let starts: Vec<usize> = (0..len).filter(|&index| context[index] == NEEDLE).collect();
        assert_eq!(starts.len(), needles);
        for (start, needle) in starts.into_iter().zip(&haystack.needles) {
            assert!(KEYS.contains(&needle.key) && needle.values.iter().all(|value| VALUES.contains(value)));
            let [first, second] = needle.values;
            assert_eq!(context[start..start + NEEDLE_LEN], [NEEDLE, needle.key, first, second]);
            noise[start..start + NEEDLE_LEN].fill(false);
            assert_eq!(needle.query(), [QUERY, needle.key]);
        }
        // The rest repeats one sentence of 8 to 32 words, which goes on under the needles.
        let repeats = |period: usize| {
            (1..len - period).all(|index| {
                !noise[index] || !noise[index + period] || context[index] == context[index + period]
            })
        };
        assert!((8..=32).any(repeats));
        assert!((1..len).all(|index| !noise[index] || WORDS.contains(&context[index])));
    }
}

#[test]
fn a_seed_gives_one_haystack() {
    assert_eq!(Haystack::new(500, 8, 3).unwrap(), Haystack::new(500, 8, 3).unwrap());
    assert_ne!(Haystack::new(500, 8, 3).unwrap(), Haystack::new(500, 8, 4).unwrap());
}

#[test]
fn needles_must_fit() {
    assert!(Haystack::new(1 + 4 * 64, 64, 0).is_ok());
    for (len, needles, named) in
        [(1000, 0, "--needles"), (1000, 65, "--needles"), (32, 8, "--context-len"), (0, 1, "--context-len")]
    {
        let error = Haystack::new(len, needles, 0).expect_err("an error");
        assert!(matches!(&error, Error::Input { argument, .. } if argument == named), "{error}");
    }
}
