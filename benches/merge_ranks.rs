//! The merge over ranks, by ranks and query tokens: both ways, with partials that attention has
//! written into the message and with partials that are copied there, beside the scheme of the
//! paper's own code (an all-gather of outputs, one of log-sum-exps, and a barrier), on threads, and
//! with the feature `mpi` on processes. Partials of 32 heads of 128 in f32.
//!
//!     cargo bench --bench merge_ranks [--features mpi] -- [--max-tokens T] [--max-ranks N]
//!
//! Every rank merges at the same time as all others, so ranks beyond the machine's cores share
//! them.

use indicatif::ProgressBar;
use star_attention::comm::{
    Collective, CpuMerge, GroupConfig, Link, MergePlan, MergeWay, ThreadGroup, Traffic,
};
use star_attention::merge::{self, Partial};
use star_attention::{Result, TensorView, TensorViewMut};
use std::time::{Duration, Instant};

const HEADS: usize = 32;
const DIM: usize = 128;
const RANKS: [usize; 4] = [2, 3, 4, 8];
const TOKENS: [usize; 6] = [1, 8, 46, 128, 512, 2048];
/// Time for each figure.
const BUDGET: Duration = Duration::from_millis(300);

/// How a merge goes.
#[derive(Clone, Copy, PartialEq)]
enum Scheme {
    /// A partial that attention has written into the message.
    InPlace(MergeWay),
    /// A partial that is copied into the message.
    Copied(MergeWay),
    /// Two all-gathers and a barrier.
    Reference,
}

const SCHEMES: [(&str, Scheme); 5] = [
    ("all-gather", Scheme::InPlace(MergeWay::AllGather)),
    ("by rows", Scheme::InPlace(MergeWay::ByRows)),
    ("all-gather, copied", Scheme::Copied(MergeWay::AllGather)),
    ("by rows, copied", Scheme::Copied(MergeWay::ByRows)),
    ("reference", Scheme::Reference),
];
const REFERENCE: usize = 4;

/// A rank's partial, and room for what comes of it.
struct Rank {
    shape: [usize; 4],
    /// What attention writes.
    values: (Vec<f32>, Vec<f32>),
    out: Vec<f32>,
    lse: Vec<f32>,
    merged: Vec<f32>,
    merged_lse: Vec<f32>,
    /// Of each way.
    merges: [CpuMerge<f32, f32>; 2],
    scratch: Vec<f32>,
}

impl Rank {
    fn new(tokens: usize, group: &dyn Collective) -> Result<Self> {
        let shape = [1, tokens, HEADS, DIM];
        let (rank, ranks) = (group.rank(), group.size());
        // The most that the reference needs, and touched: no one pays for memory's first use.
        let scratch = vec![1.0; ranks * tokens * HEADS * (DIM + 1)];
        let value = |i: usize| (i.wrapping_mul(2_654_435_761 + rank) % 2001) as f32 / 1000.0 - 1.0;
        let (out, lse): (Vec<f32>, Vec<f32>) =
            ((0..tokens * HEADS * DIM).map(value).collect(), (0..tokens * HEADS).map(value).collect());
        let plan = MergePlan::new(shape, ranks, &group.link())?;
        let merges = [MergeWay::AllGather, MergeWay::ByRows].map(|way| plan.with_way(way).on_cpu());
        let (merged, merged_lse, values) = (out.clone(), lse.clone(), (out.clone(), lse.clone()));
        Ok(Self { shape, values, out, lse, merged, merged_lse, merges, scratch })
    }

    /// Writes the partial to where attention would for a scheme.
    fn attend(&mut self, scheme: Scheme) -> Result<()> {
        let Self { shape, values: (values, lses), out, lse, merges, .. } = self;
        if let Scheme::InPlace(way) = scheme {
            let (mut to, to_lse) = merges[way as usize].partial()?;
            let [_, seq, heads, dim] = *shape;
            let strides = to.strides();
            for (row, value) in values.chunks_exact(dim).enumerate() {
                let start = row / heads % seq * strides[1] + row % heads * strides[2];
                to.data_mut()[start..start + dim].copy_from_slice(value);
            }
            to_lse.copy_from_slice(lses);
        } else {
            out.copy_from_slice(values);
            lse.copy_from_slice(lses);
        }
        Ok(())
    }

    fn merge(&mut self, group: &dyn Collective, scheme: Scheme) -> Result<()> {
        let Self { shape, out, lse, merged, merged_lse, merges, scratch, .. } = self;
        let to = TensorViewMut::contiguous("out", merged, *shape)?;
        match scheme {
            Scheme::InPlace(way) => merges[way as usize].run(group, to, Some(merged_lse)),
            Scheme::Copied(way) => {
                let partial = Partial { out: TensorView::contiguous("partial", out, *shape)?, lse };
                merges[way as usize].merge(group, &partial, to, Some(merged_lse))
            }
            Scheme::Reference => {
                let (outs, lses) = scratch.split_at_mut(group.size() * out.len());
                let lses = &mut lses[..group.size() * lse.len()];
                group.all_gather(bytemuck::cast_slice(out), bytemuck::cast_slice_mut(outs))?;
                group.all_gather(bytemuck::cast_slice(lse), bytemuck::cast_slice_mut(lses))?;
                group.all_gather(&[], &mut [])?;
                let parts = outs.chunks_exact(out.len()).zip(lses.chunks_exact(lse.len()));
                let parts = parts.map(|(out, lse)| {
                    Ok(Partial { out: TensorView::contiguous("partial", out, *shape)?, lse })
                });
                merge::merge(&parts.collect::<Result<Vec<_>>>()?, to, merged_lse)
            }
        }
    }
}

/// One rank's median seconds and what one merge sends, for each scheme in turn.
fn measure(group: &dyn Collective, tokens: usize, once: bool) -> Result<Vec<(f64, Traffic)>> {
    let mut rank = Rank::new(tokens, group)?;
    let mut times = SCHEMES.map(|_| Vec::new());
    let mut traffic = [Traffic::default(); SCHEMES.len()];
    let start = Instant::now();
    loop {
        // In turn, so that the machine's moods meet all of them.
        for (at, (_, scheme)) in SCHEMES.iter().enumerate() {
            rank.attend(*scheme)?;
            let before = group.traffic();
            let start = Instant::now();
            rank.merge(group, *scheme)?;
            times[at].push(start.elapsed().as_secs_f64());
            traffic[at] = group.traffic() - before;
        }
        // Rank 0 says when it is enough: all must agree.
        let mut enough = [u8::from(once || start.elapsed() > BUDGET * SCHEMES.len() as u32)];
        group.broadcast(0, &mut enough)?;
        if enough == [1] {
            break;
        }
    }
    let median = |times: &mut Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    Ok(times.iter_mut().map(median).zip(traffic).collect())
}

/// Latency and bandwidth as the model has them, from two all-gathers.
fn measured_link(group: &dyn Collective) -> Result<Link> {
    let time = |bytes: usize, runs: usize| -> Result<f64> {
        let (send, mut receive) = (vec![1; bytes], vec![0; group.size() * bytes]);
        let mut times = Vec::new();
        for _ in 0..runs {
            let start = Instant::now();
            group.all_gather(&send, &mut receive)?;
            times.push(start.elapsed().as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        Ok(times[runs / 2])
    };
    let latency = time(1, 2001)?;
    let bytes = 4 << 20;
    let long = time(bytes, 11)?;
    Link::new(latency, (group.size() - 1) as f64 * bytes as f64 / (long - latency).max(1e-9))
}

/// A rank's program. Rank 0 prints.
fn program(
    engine: &str,
    group: &dyn Collective,
    tokens: &[usize],
    once: bool,
    bar: &ProgressBar,
) -> Result<()> {
    let link = measured_link(group)?;
    let ranks = group.size();
    for &tokens in tokens {
        let results = measure(group, tokens, once)?;
        if group.rank() != 0 {
            continue;
        }
        // The formulas of the module `comm`: P bytes a partial, in f32.
        let partial = tokens * HEADS * (4 * DIM + 4);
        let others = ranks - 1;
        let share = (tokens * HEADS).div_ceil(ranks) * (4 * DIM + 4);
        let (at_once, by_rows) = (others * partial, 2 * others * share);
        let formulas = [at_once, by_rows, at_once, by_rows, at_once];
        let cell = |(seconds, _): &(f64, Traffic)| format!("{:.1}", seconds * 1e6);
        let sent = |at: usize| {
            let Traffic { collectives, bytes, .. } = results[at].1;
            let verdict = if bytes as usize == formulas[at] { "" } else { " (NOT THE FORMULA'S)" };
            format!("{bytes} in {collectives}{verdict}")
        };
        let chosen = match MergeWay::cheapest(&group.link(), ranks, partial) {
            MergeWay::AllGather => SCHEMES[0].0,
            MergeWay::ByRows => SCHEMES[1].0,
        };
        let best = results[0].0.min(results[1].0);
        bar.suspend(|| {
            let times: Vec<String> = results.iter().map(cell).collect();
            let ratio = results[REFERENCE].0 / best;
            let sent: Vec<String> = [0, 1, REFERENCE].map(sent).to_vec();
            println!(
                "| {engine} | {ranks} | {tokens} | {} | {ratio:.2} | {chosen} | {} |",
                times.join(" | "),
                sent.join(" | ")
            );
        });
        bar.inc(1);
    }
    if group.rank() == 0 {
        bar.suspend(|| {
            eprintln!(
                "{engine}, {ranks} ranks: latency {:.1} us, bandwidth {:.2} GB/s measured; {:.1} us, {:.2} GB/s by default",
                link.latency * 1e6,
                link.bandwidth / 1e9,
                group.link().latency * 1e6,
                group.link().bandwidth / 1e9
            );
        });
    }
    Ok(())
}

fn option(name: &str) -> Option<usize> {
    let args: Vec<String> = std::env::args().collect();
    let value = args.iter().position(|arg| arg == name).and_then(|at| args.get(at + 1))?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name}: expected a number")))
}

/// This program once more, as `ranks` processes.
#[cfg(feature = "mpi")]
fn on_processes(ranks: usize) {
    let mpirun = std::env::var("MPIRUN").unwrap_or("mpirun".into());
    let status = std::process::Command::new(&mpirun)
        .args(["-n", &ranks.to_string()])
        .arg(std::env::current_exe().expect("this program has a path"))
        .args(std::env::args().skip(1))
        .arg("--rank")
        // Open MPI: more ranks than cores, and any user.
        .envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")])
        .env("OMPI_MCA_rmaps_base_oversubscribe", "1")
        .env("RAYON_NUM_THREADS", "1")
        .status();
    match status {
        Ok(status) if status.success() => {}
        other => eprintln!("{mpirun}: {other:?}"),
    }
}

#[cfg(feature = "mpi")]
fn rank_of_processes(tokens: &[usize], once: bool) -> Result<()> {
    let group = star_attention::comm::Mpi::init(&GroupConfig::default())?;
    program("mpi", &group, tokens, once, &ProgressBar::hidden())
}

fn main() -> Result<()> {
    let once = std::env::args().any(|arg| arg == "--test");
    let most_tokens = option("--max-tokens").unwrap_or(if once { 8 } else { usize::MAX });
    let most_ranks = option("--max-ranks").unwrap_or(if once { 3 } else { usize::MAX });
    let tokens: Vec<usize> = TOKENS.into_iter().filter(|&tokens| tokens <= most_tokens).collect();
    #[cfg(feature = "mpi")]
    if std::env::args().any(|arg| arg == "--rank") {
        return rank_of_processes(&tokens, once);
    }
    println!(
        "| engine | ranks | query tokens | {} | reference / best | cost model | sent by all-gather, bytes in calls | by rows | reference |",
        SCHEMES.map(|(name, _)| format!("{name}, us")).join(" | ")
    );
    println!("|---|---:|---:|---:|---:|---:|---:|---:|---:|---|---:|---:|---:|");
    let ranks: Vec<usize> = RANKS.into_iter().filter(|&ranks| ranks <= most_ranks).collect();
    let bar = ProgressBar::new((ranks.len() * tokens.len()) as u64);
    for &ranks in &ranks {
        std::thread::scope(|scope| {
            for group in ThreadGroup::ranks_with(ranks, &GroupConfig::default())? {
                let (tokens, bar) = (&tokens, &bar);
                let work = move || {
                    // As processes have it: a thread for each rank.
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");
                    pool.install(|| {
                        let group: ThreadGroup = group;
                        program("threads", &group, tokens, once, bar).expect("all ranks are there");
                    });
                };
                scope.spawn(work);
            }
            Ok::<_, star_attention::Error>(())
        })?;
    }
    bar.finish_and_clear();
    #[cfg(feature = "mpi")]
    ranks.iter().for_each(|&ranks| on_processes(ranks));
    Ok(())
}
