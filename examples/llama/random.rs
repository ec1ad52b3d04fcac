//! Random numbers that a seed determines.

use std::collections::BTreeSet;
use std::ops::Range;

/// SplitMix64: small, and the same on every machine.
pub struct Random(pub u64);

impl Random {
    /// 64 random bits.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number of `range`, which is not empty.
    pub fn within(&mut self, range: Range<u32>) -> u32 {
        range.start + (self.next() % u64::from(range.end - range.start)) as u32
    }

    /// `count` different numbers of `range`, in random order; there must be as many.
    pub fn distinct(&mut self, range: Range<u32>, count: usize) -> Vec<u32> {
        let mut chosen = Vec::with_capacity(count);
        while chosen.len() < count {
            let number = self.within(range.clone());
            if !chosen.contains(&number) {
                chosen.push(number);
            }
        }
        chosen
    }

    /// `count` different numbers of `range`, ascending; all of them if there are not as many.
    pub fn ascending(&mut self, range: Range<usize>, count: usize) -> Vec<usize> {
        let count = count.min(range.len());
        let mut chosen = BTreeSet::new();
        // Floyd's way: after each step every number up to `last` is as likely as any other.
        for last in range.end - count..range.end {
            let number = self.between(range.start..last + 1);
            chosen.insert(if chosen.contains(&number) { last } else { number });
        }
        chosen.into_iter().collect()
    }

    /// A number of `range`, which is not empty.
    pub fn between(&mut self, range: Range<usize>) -> usize {
        range.start + (self.next() % (range.end - range.start) as u64) as usize
    }

    /// One of `items`, of which there is at least one.
    pub fn choose<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.between(0..items.len())]
    }

    /// `count` of `items` in random order, none of them twice; all if there are not as many.
    pub fn sample<T: Clone>(&mut self, count: usize, items: &[T]) -> Vec<T> {
        let chosen = self.ascending(0..items.len(), count);
        let mut chosen: Vec<T> = chosen.into_iter().map(|index| items[index].clone()).collect();
        self.shuffle(&mut chosen);
        chosen
    }

    /// A stream of its own for each name, which is the same however much is drawn from it.
    pub fn stream(&self, name: u64) -> Self {
        let mut stream = Self(self.0 ^ name.wrapping_mul(0xd134_2543_de82_ef95));
        Self(stream.next())
    }

    /// Puts `items` in random order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for end in (2..=items.len()).rev() {
            items.swap(end - 1, (self.next() % end as u64) as usize);
        }
    }
}
