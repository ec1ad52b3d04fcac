//! Memory that kernels may touch.

use std::collections::BTreeMap;

/// The allocations of a device: start and length.
#[derive(Clone, Debug, Default)]
pub struct Regions(BTreeMap<usize, usize>);

impl Regions {
    pub fn add(&mut self, start: usize, bytes: usize) {
        self.0.insert(start, bytes);
    }

    pub fn remove(&mut self, start: usize) {
        self.0.remove(&start);
    }

    /// Whether an access, aligned to its size, lies inside one allocation.
    pub fn check(&self, address: usize, bytes: usize, write: bool) -> Result<(), String> {
        let verb = if write { "writes" } else { "reads" };
        // The widest accesses are of 16 bytes; structs are read in parts of that.
        let alignment = bytes.min(16).next_power_of_two().min(if bytes.is_power_of_two() { 16 } else { 4 });
        if !address.is_multiple_of(alignment) {
            return Err(format!(
                "global memory: {verb} {bytes} bytes at an address not aligned to {alignment}"
            ));
        }
        self.check_inside(address, bytes, verb)
    }

    /// Whether bytes that a copy reads, at any address, lie inside one allocation.
    pub fn check_bytes(&self, address: usize, bytes: usize) -> Result<(), String> {
        self.check_inside(address, bytes, "reads")
    }

    fn check_inside(&self, address: usize, bytes: usize, verb: &str) -> Result<(), String> {
        let Some((&start, &len)) = self.0.range(..=address).next_back() else {
            return Err(format!("global memory: {verb} {bytes} bytes before every allocation"));
        };
        let offset = address - start;
        if offset + bytes > len {
            return Err(format!(
                "global memory: {verb} bytes {offset}..{} of an allocation of {len}",
                offset + bytes
            ));
        }
        Ok(())
    }
}
