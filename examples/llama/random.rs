//! Random numbers that a seed determines.

use std::ops::Range;

/// SplitMix64: small, and the same on every machine.
pub struct Random(pub u64);

impl Random {
    fn next(&mut self) -> u64 {
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
        let mut missing = count as u64;
        let end = range.end;
        let chosen = |&number: &usize| {
            let chosen = self.next() % ((end - number) as u64) < missing;
            missing -= u64::from(chosen);
            chosen
        };
        range.filter(chosen).collect()
    }

    /// Puts `items` in random order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for end in (2..=items.len()).rev() {
            items.swap(end - 1, (self.next() % end as u64) as usize);
        }
    }
}
