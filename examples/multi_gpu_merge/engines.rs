//! Which ranks there are, what they work on, and what carries their messages.

use crate::rank::{Meter, Outcome, on_backend};
use crate::report::{checksum, report};
use crate::timed::Timed;
use crate::{Args, Engine, Kind, Sizes, Start};
use indicatif::{ProgressBar, ProgressStyle};
use star_attention::comm::{Agreement, AnchorKv, Collective, GroupConfig, Staged, ThreadGroup, agree};
use star_attention::cpu::Cpu;
use star_attention::cuda::{Cuda, Device, simt::Simt};
use star_attention::{Element, Error, Result, StarLayout};

/// Whether everything was right, on all ranks of this process.
pub fn run<T: Element>(args: &Args) -> Result<bool> {
    ranks(args, &|group| {
        let rank = group.rank();
        let work = |bar: &ProgressBar| -> Result<(Timed<_>, Outcome)> {
            let tick = || bar.inc(1);
            let sizes = args.sizes();
            agree_on::<T>(&group, &sizes)?;
            match (args.engine, args.device) {
                (Engine::Nccl, Kind::Cuda) => nccl::<T>(args, &sizes, group, &tick),
                (Engine::Nccl, _) => Err(unavailable("NCCL", "it works on GPUs alone: give --device cuda")),
                (_, Kind::Cpu) => {
                    let group = Timed::new(group);
                    let meter = Meter { spent: &|| group.take(), traffic: &|| group.traffic() };
                    let outcome = on_backend::<_, _, T>(&sizes, &Cpu::new(), &group, &meter, &tick)?;
                    Ok((group, outcome))
                }
                (_, Kind::Simt) => {
                    let emulator = Cuda::new(Simt::new(args.seed + rank as u64), ());
                    staged::<_, T>(&sizes, &emulator, group, &tick)
                }
                (_, Kind::Cuda) => cuda::<T>(&sizes, group, &tick),
            }
        };
        finish::<T>(args, rank, work)
    })
}

/// f32, which the kernels do not take.
pub fn run_f32(args: &Args) -> Result<bool> {
    if args.device != Kind::Cpu || args.engine == Engine::Nccl {
        let expected = "bf16 or f16 on devices other than the cpu".into();
        return Err(Error::Value { argument: "--dtype", expected, got: "f32".into() });
    }
    run::<f32>(args)
}

type Group = Box<dyn Collective>;

/// Runs `rank` for each rank of this process.
fn ranks(args: &Args, rank: &(dyn Fn(Group) -> Result<bool> + Sync)) -> Result<bool> {
    let sizes = args.sizes();
    let at_least_one = |argument: &'static str, extent: usize| match extent {
        0 => Err(Error::Value { argument, expected: "at least 1".into(), got: "0".into() }),
        _ => Ok(()),
    };
    at_least_one("--shards", sizes.shards.len())?;
    at_least_one("--query-len", sizes.query_len)?;
    // Before inputs are made: heads that do not fit, and sizes that no memory has.
    sizes.shape(sizes.shards.iter().copied().max().unwrap_or(0)).validate()?;
    let config = GroupConfig { timeout: args.timeout()?, ..GroupConfig::default() };
    if args.engine == Engine::Mpi || (args.engine == Engine::Nccl && args.start == Start::Mpi) {
        if args.ranks.is_some() {
            let expected = "none: mpirun says how many".into();
            return Err(Error::Value { argument: "--ranks", expected, got: "a number".into() });
        }
        return rank(mpi(&config)?);
    }
    let gpus = if args.engine == Engine::Nccl { gpus()? } else { 4 };
    let groups = ThreadGroup::ranks_with(args.ranks.unwrap_or(gpus), &config)?;
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            groups.into_iter().map(|group| scope.spawn(move || rank(Box::new(group)))).collect();
        let mut failure = None;
        let mut right = true;
        for thread in threads {
            match thread.join() {
                Ok(Ok(ok)) => right &= ok,
                // Not the first that noticed that another had left, but why that one did.
                Ok(Err(error)) => match &failure {
                    Some(Error::Disconnected { .. }) | None => failure = Some(error),
                    _ => {}
                },
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        failure.map_or(Ok(right), Err)
    })
}

/// A rank's work under a progress bar, and then its report.
fn finish<T: Element>(
    args: &Args,
    rank: usize,
    work: impl FnOnce(&ProgressBar) -> Result<(Timed<Group>, Outcome)>,
) -> Result<bool> {
    let sizes = args.sizes();
    let bar = if rank == 0 { ProgressBar::new(sizes.layers as u64) } else { ProgressBar::hidden() };
    let style = ProgressStyle::with_template("layer {pos} of {len} {wide_bar} {eta}");
    let bar = bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let result = work(&bar);
    bar.finish_and_clear();
    let (group, outcome) = result?;
    report::<T>(&group, &sizes, &outcome)
}

/// Ranks that were given other options end here.
fn agree_on<T: Element>(group: &Group, sizes: &Sizes) -> Result<()> {
    let keys = (0..group.size()).map(|rank| sizes.shards[rank % sizes.shards.len()]).sum();
    let rest =
        [sizes.query_len as u64, sizes.layers as u64, sizes.seed, sizes.way.map_or(0, |way| 1 + way as u64)];
    let agreement = Agreement {
        layout: StarLayout::builder(keys).anchor_len(0).ranks(group.size()).build()?,
        shape: sizes.shape(0),
        layers: sizes.layers,
        dtype: T::DTYPE,
        anchor: AnchorKv::default(),
        model: checksum(rest),
    };
    agree(&**group, &agreement)
}

fn staged<D: Device, T: Element>(
    sizes: &Sizes,
    backend: &Cuda<D>,
    group: Group,
    tick: &dyn Fn(),
) -> Result<(Timed<Group>, Outcome)> {
    let group = Timed::new(group);
    let staged = Staged { device: &**backend.device(), group: &group };
    let meter = Meter { spent: &|| group.take(), traffic: &|| group.traffic() };
    let outcome = on_backend::<_, _, T>(sizes, backend, &staged, &meter, tick)?;
    Ok((group, outcome))
}

fn unavailable(what: &'static str, reason: &str) -> Error {
    Error::Unavailable { what, reason: reason.into() }
}

#[cfg(feature = "cuda")]
fn gpu(rank: usize) -> Result<Cuda<star_attention::cuda::driver::Driver>> {
    use star_attention::cuda::driver::Driver;
    // Ranks of one machine in turn; with fewer GPUs than ranks some share one.
    let local = ["OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"].map(|name| std::env::var(name).ok());
    let local = local.into_iter().flatten().find_map(|rank| rank.parse().ok()).unwrap_or(rank);
    let driver = Driver::open(local % Driver::count()?.max(1))?;
    let stream = driver
        .context()
        .new_stream()
        .map_err(|source| Error::Driver { operation: "make a stream", source })?;
    Ok(Cuda::new(driver, stream))
}

#[cfg(feature = "cuda")]
fn gpus() -> Result<usize> {
    star_attention::cuda::driver::Driver::count()
}

#[cfg(not(feature = "cuda"))]
fn gpus() -> Result<usize> {
    Err(unavailable("NCCL", "this build has not the feature `nccl`"))
}

#[cfg(feature = "cuda")]
fn cuda<T: Element>(sizes: &Sizes, group: Group, tick: &dyn Fn()) -> Result<(Timed<Group>, Outcome)> {
    let gpu = gpu(group.rank())?;
    staged::<_, T>(sizes, &gpu, group, tick)
}

#[cfg(not(feature = "cuda"))]
fn cuda<T: Element>(_: &Sizes, _: Group, _: &dyn Fn()) -> Result<(Timed<Group>, Outcome)> {
    let _ = std::marker::PhantomData::<T>;
    Err(unavailable("the GPU", "this build has not the feature `cuda`; try --device cpu or simt"))
}

#[cfg(feature = "nccl")]
fn nccl<T: Element>(
    args: &Args,
    sizes: &Sizes,
    group: Group,
    tick: &dyn Fn(),
) -> Result<(Timed<Group>, Outcome)> {
    let gpu = gpu(group.rank())?;
    let config = GroupConfig { timeout: args.timeout()?, ..GroupConfig::default() };
    let nccl = Timed::new(star_attention::comm::Nccl::over(&*group, gpu.device(), &config)?);
    let traffic = || star_attention::comm::DeviceCollective::traffic(&nccl);
    let meter = Meter { spent: &|| nccl.take(), traffic: &traffic };
    let outcome = on_backend::<_, _, T>(sizes, &gpu, &nccl, &meter, tick)?;
    Ok((Timed::new(group), outcome))
}

#[cfg(not(feature = "nccl"))]
fn nccl<T: Element>(_: &Args, _: &Sizes, _: Group, _: &dyn Fn()) -> Result<(Timed<Group>, Outcome)> {
    let _ = std::marker::PhantomData::<T>;
    Err(unavailable("NCCL", "this build has not the feature `nccl`"))
}

#[cfg(feature = "mpi")]
fn mpi(config: &GroupConfig) -> Result<Group> {
    Ok(Box::new(star_attention::comm::Mpi::init(config)?))
}

#[cfg(not(feature = "mpi"))]
fn mpi(_: &GroupConfig) -> Result<Group> {
    Err(unavailable("MPI", "this build has not the feature `mpi`"))
}
