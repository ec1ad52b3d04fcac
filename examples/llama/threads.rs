//! How many threads ranks and candle use.

use std::num::NonZero;

/// Threads each of `ranks` may use: an equal share of the cores.
pub fn threads_per_rank(ranks: usize) -> usize {
    (std::thread::available_parallelism().map_or(1, NonZero::get) / ranks).max(1)
}

/// Keeps candle's own threads out of the ranks' way.
///
/// Its element-wise operations share one pool of spinning threads, for which the ranks would queue,
/// and every matrix product counts the machine's cores anew, by parsing a file. Both can be changed
/// only through the environment.
///
/// # Safety
/// The caller is the only thread: another could read the environment meanwhile.
pub unsafe fn tame_candle() {
    // Processes that mpirun started on this machine, if it did, by Open MPI or MPICH.
    let started = ["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"].map(|name| std::env::var(name).ok());
    let processes = started.into_iter().flatten().find_map(|count| count.parse().ok()).unwrap_or(1);
    for (name, threads) in [("CANDLE_NUM_THREADS", 1), ("RAYON_NUM_THREADS", threads_per_rank(processes))] {
        if std::env::var_os(name).is_none() {
            // SAFETY: there is no other thread, as the caller promises.
            unsafe { std::env::set_var(name, threads.to_string()) };
        }
    }
}
