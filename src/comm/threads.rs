//! The collective over threads of one process.

/// One rank of a group of threads (being written).
#[derive(Debug)]
pub struct ThreadGroup;
