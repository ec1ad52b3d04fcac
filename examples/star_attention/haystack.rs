//! Prompts of the retrieval Llama: a haystack of repeated noise with facts in it (its README says
//! how it was trained).

use super::llama::error::{Error, Result};
use super::llama::random::Random;
use std::ops::Range;

pub const BOS: u32 = 0;
pub const NEEDLE: u32 = 1;
pub const QUERY: u32 = 2;
/// Ids of the words of the noise.
pub const WORDS: Range<u32> = 16..112;
/// Ids of the keys of needles.
pub const KEYS: Range<u32> = 112..176;
/// Ids of the values of needles.
pub const VALUES: Range<u32> = 176..256;
/// Tokens of a needle: `<needle> KEY V1 V2`.
pub const NEEDLE_LEN: usize = 4;
/// Tokens of an answer.
pub const ANSWER_LEN: usize = 2;
/// Words of the noise sentence.
const SENTENCE: Range<u32> = 8..33;

/// A context, and the facts in it.
#[derive(Clone, Debug, PartialEq)]
pub struct Haystack {
    /// `<bos>`, then noise and needles.
    pub context: Vec<u32>,
    /// In the order in which they stand.
    pub needles: Vec<Needle>,
}

/// A fact: a key and its two values.
#[derive(Clone, Debug, PartialEq)]
pub struct Needle {
    pub key: u32,
    pub values: [u32; ANSWER_LEN],
}

impl Haystack {
    /// `context_len` tokens that hold `needles` needles of distinct keys, at random places; the
    /// same for the same seed.
    ///
    /// # Errors
    /// [`Error::Input`] for more needles than keys, or than fit.
    pub fn new(context_len: usize, needles: usize, seed: u64) -> Result<Self> {
        if !(1..=KEYS.len()).contains(&needles) {
            return Err(Error::input("--needles", format!("expected 1 to {}, got {needles}", KEYS.len())));
        }
        let shortest = 1 + needles * NEEDLE_LEN;
        if context_len < shortest {
            let reason = format!("expected at least {shortest} for {needles} needles, got {context_len}");
            return Err(Error::input("--context-len", reason));
        }
        let Ok(places) = u32::try_from(context_len - 1 - needles * (NEEDLE_LEN - 1)) else {
            let reason = format!("expected at most {}, got {context_len}", u32::MAX);
            return Err(Error::input("--context-len", reason));
        };
        let mut random = Random(seed);
        let sentence: Vec<u32> = (0..random.within(SENTENCE)).map(|_| random.within(WORDS)).collect();
        let noise = sentence.into_iter().cycle();
        let mut context: Vec<u32> = [BOS].into_iter().chain(noise).take(context_len).collect();
        // Distinct places among the tokens that are left when each needle shrinks to one token
        // never overlap.
        let mut places = random.distinct(0..places, needles);
        places.sort_unstable();
        let keys = random.distinct(KEYS, needles);
        let needles = keys
            .into_iter()
            .map(|key| Needle { key, values: [random.within(VALUES), random.within(VALUES)] })
            .collect::<Vec<_>>();
        for (index, (place, needle)) in places.into_iter().zip(&needles).enumerate() {
            let start = 1 + place as usize + index * (NEEDLE_LEN - 1);
            let [first, second] = needle.values;
            context[start..start + NEEDLE_LEN].copy_from_slice(&[NEEDLE, needle.key, first, second]);
        }
        Ok(Self { context, needles })
    }
}

impl Needle {
    /// The tokens that ask for it.
    pub fn query(&self) -> Vec<u32> {
        vec![QUERY, self.key]
    }
}
