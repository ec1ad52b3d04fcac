//! The engine for processes. Each test starts `mpirun` (or what `MPIRUN` names) on this very
//! binary, whose ignored test `rank` is one process's share.

use crate::common::{extents, named};
use crate::programs::PROGRAMS;
use star_attention::comm::{
    Agreement, AnchorKv, Collective, GroupConfig, Message, Mpi, Pattern, Traffic, agree, share_anchor,
};
use star_attention::{DType, Error, GeneratedKv, Result, StarLayout, TensorViewMut};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// The rank that fails.
const VICTIM: usize = 1;
/// How long ranks wait for it.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Longer than anything here takes, on a machine that has other work.
const PATIENCE: Duration = Duration::from_secs(120);

/// Processes started together, and what they say.
struct Processes {
    mpirun: Child,
    lines: Receiver<(usize, String)>,
    started: Instant,
}

impl Processes {
    fn start(count: usize, program: &str) -> Self {
        let mpirun = std::env::var("MPIRUN").unwrap_or("mpirun".into());
        let mut words = mpirun.split_whitespace();
        let mut mpirun = Command::new(words.next().expect("MPIRUN names a program"))
            .args(words)
            .args(["-n", &count.to_string()])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "mpi::rank", "--ignored", "--nocapture", "--test-threads", "1"])
            .env("STAR_ATTENTION_TEST_PROGRAM", program)
            .env("RAYON_NUM_THREADS", "1")
            // Open MPI: more ranks than cores, and no end to all because one has ended.
            .envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")])
            .envs([("OMPI_MCA_rmaps_base_oversubscribe", "1"), ("OMPI_MCA_orte_enable_recovery", "1")])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("mpirun is installed");
        let (send, lines) = channel();
        let output = BufReader::new(mpirun.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in output.lines().map_while(std::result::Result::ok) {
                let said = line.strip_prefix("@ ").and_then(|line| line.split_once(' '));
                if let Some((rank, said)) = said {
                    let _ = send.send((rank.parse().unwrap(), said.to_owned()));
                }
            }
        });
        Self { mpirun, lines, started: Instant::now() }
    }

    /// The next thing that a process says.
    fn next(&self) -> (usize, String) {
        let left = PATIENCE.saturating_sub(self.started.elapsed());
        self.lines.recv_timeout(left).expect("a process says something in time")
    }

    fn end(mut self) {
        while self.mpirun.try_wait().unwrap().is_none() {
            assert!(self.started.elapsed() < PATIENCE, "mpirun does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        let _ = self.mpirun.kill();
        let _ = self.mpirun.wait();
    }
}

#[test]
fn all_programs_hold_for_every_world_size() {
    for size in 1..=8 {
        let processes = Processes::start(size, "all");
        let mut ranks: Vec<usize> = (0..size)
            .map(|_| {
                let (rank, said) = processes.next();
                assert_eq!(said, "done");
                rank
            })
            .collect();
        ranks.sort_unstable();
        assert_eq!(ranks, (0..size).collect::<Vec<_>>());
        processes.end();
    }
}

#[test]
fn calls_that_differ_are_errors_on_every_rank() {
    for program in ["longer", "shorter", "another", "layout"] {
        let processes = Processes::start(3, program);
        for _ in 0..3 {
            let (rank, said) = processes.next();
            let named = said.starts_with("peer") || (program != "layout" && said.starts_with("disconnected"));
            assert!(named, "{program}: rank {rank}: {said}");
        }
        processes.end();
    }
}

/// Lets the victim fail in a phase, and holds the others to their promise.
fn fails(way: &str) {
    for phase in ["start", "encode", "query", "generate"] {
        let processes = Processes::start(4, &format!("{way} {phase}"));
        // What the ranks say may come in any order, but where the victim waits for its signal.
        let mut said: Vec<(usize, String)> = Vec::new();
        while said.iter().all(|(rank, _)| *rank != VICTIM) {
            said.push(processes.next());
        }
        let pid = said.remove(said.iter().position(|(rank, _)| *rank == VICTIM).unwrap()).1;
        let signal =
            |signal: &str| assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
        match way {
            "kill" => signal("-KILL"),
            "stop" => signal("-STOP"),
            _ => {}
        }
        let failed = Instant::now();
        while said.len() < 3 {
            said.push(processes.next());
        }
        for (rank, said) in &said {
            // By name: the rank that failed, not one that left because of it.
            let gone = *said == format!("disconnected {VICTIM}");
            let late = *said == format!("timeout of {VICTIM}");
            assert!(gone || (late && matches!(way, "kill" | "stop")), "{way} {phase}: rank {rank}: {said}");
        }
        let mut others: Vec<usize> = said.into_iter().map(|(rank, _)| rank).collect();
        others.sort_unstable();
        assert_eq!(others, [0, 2, 3]);
        assert!(
            failed.elapsed() < TIMEOUT + Duration::from_secs(20),
            "{way} {phase}: {:?}",
            failed.elapsed()
        );
        if way == "stop" {
            signal("-KILL");
        }
        processes.end();
    }
}

#[test]
fn a_rank_that_is_killed_is_an_error_on_all_others() {
    fails("kill");
}

#[test]
fn a_rank_that_is_stopped_is_an_error_on_all_others() {
    fails("stop");
}

#[test]
fn a_rank_that_panics_is_an_error_on_all_others() {
    fails("panic");
}

#[test]
fn a_rank_that_leaves_is_an_error_on_all_others() {
    fails("leave");
}

#[test]
fn a_rank_that_forgets_what_it_has_started_leaves_the_group() {
    let processes = Processes::start(3, "forget");
    for _ in 0..2 {
        let (rank, said) = processes.next();
        assert_eq!(said, format!("disconnected {VICTIM}"), "rank {rank}");
    }
    processes.end();
}

/// One process's share of a test above.
#[test]
#[ignore = "a process of the other tests"]
fn rank() {
    let program = std::env::var("STAR_ATTENTION_TEST_PROGRAM").expect("started by another test");
    let timeout = if program == "all" { PATIENCE } else { TIMEOUT };
    let group = Mpi::init(&GroupConfig { timeout, ..GroupConfig::default() }).unwrap();
    let rank = group.rank();
    let say = |text: &str| {
        // In one piece, so that the lines of ranks do not mix.
        std::io::stdout().write_all(format!("\n@ {rank} {text}\n").as_bytes()).unwrap();
        std::io::stdout().flush().unwrap();
    };
    let error = match program.as_str() {
        "all" => {
            for (_, program) in PROGRAMS {
                program(&group);
            }
            long_broadcasts_go_in_parts(&group);
            long_messages_go_in_pieces(&group);
            assert!(matches!(
                Mpi::init(&GroupConfig::default()),
                Err(Error::Unavailable { what: "MPI", .. })
            ));
            return say("done");
        }
        "longer" | "shorter" | "another" | "layout" => differ(&group, &program),
        "forget" => forget(&group),
        _ => {
            let (way, phase) = program.split_once(' ').unwrap();
            phases(&group, |here| {
                if rank == VICTIM && here == phase {
                    say(&std::process::id().to_string());
                    match way {
                        "panic" => std::panic::resume_unwind(Box::new("a rank's panic")),
                        "leave" => return false,
                        // In the last phase it is caught in the middle of its work, in others
                        // before.
                        _ if phase != "generate" => std::thread::sleep(PATIENCE),
                        _ => {}
                    }
                }
                true
            })
        }
    };
    match error {
        Ok(()) => {}
        Err(Error::Peer { .. }) => say("peer"),
        Err(Error::Timeout { rank, .. }) => say(&format!("timeout of {rank}")),
        Err(Error::Disconnected { rank }) => say(&format!("disconnected {rank}")),
        Err(other) => say(&other.to_string()),
    }
}

/// The root sends each part once, and its own to all; each other rank passes its part on to all but
/// the root.
fn long_broadcasts_go_in_parts(group: &dyn Collective) {
    const PART: usize = 100_000;
    let (rank, size) = (group.rank() as u64, group.size() as u64);
    let before = group.traffic();
    group.broadcast(0, &mut vec![0; group.size() * PART]).unwrap();
    let (messages, parts) = match (rank, size) {
        // To one other rank it goes in one piece.
        (0, 2) => (1, 2),
        (0, _) => (2 * (size - 1), 2 * (size - 1)),
        _ => (size - 2, size - 2),
    };
    let sent = Traffic { collectives: 1, messages, bytes: parts * PART as u64 };
    assert_eq!(group.traffic() - before, sent);
}

/// What is longer than one message of MPI (16 MiB) is put together again, whatever region a cut
/// goes through; meanwhile the group does nothing else.
fn long_messages_go_in_pieces(group: &dyn Collective) {
    const LENS: [usize; 2] = [4004, 17 << 20];
    let (rank, size) = (group.rank(), group.size());
    if size > 3 {
        return;
    }
    let byte = |from: usize, to: usize, i: usize| (from * 7 + to * 13 + i % 251) as u8;
    for pattern in [Pattern::AllGather, Pattern::AllToAll] {
        let parts = if pattern == Pattern::AllGather { 1 } else { size };
        let mut message = Message::new(&LENS.map(|len| parts * len)).unwrap();
        for (region, len) in message.get_mut().unwrap().into_iter().zip(LENS) {
            for (to, part) in region.chunks_exact_mut(len).enumerate() {
                part.iter_mut().enumerate().for_each(|(i, x)| *x = byte(rank, to, i));
            }
        }
        let before = group.traffic();
        let started = group.start(pattern, message).unwrap();
        assert_eq!(named(group.broadcast(0, &mut [0]).unwrap_err()), ("value", "group"));
        let mut shown = 0;
        let read = &mut |received: &star_attention::comm::Received<'_>| {
            for (from, region) in (0..size).flat_map(|from| [(from, 0), (from, 1)]) {
                let (bytes, to) = (received.get(from, region).unwrap(), if parts == 1 { 0 } else { rank });
                assert_eq!(bytes.len(), LENS[region]);
                assert!(
                    bytes.iter().enumerate().all(|(i, &x)| x == byte(from, to, i)),
                    "{pattern:?} of {from}"
                );
                shown += 1;
            }
        };
        group.finish(started, read).unwrap();
        assert_eq!(shown, 2 * size);
        let others = size as u64 - 1;
        let bytes = others * LENS.iter().sum::<usize>() as u64;
        // Two pieces to each.
        assert_eq!(group.traffic() - before, Traffic { collectives: 1, messages: 2 * others, bytes });
    }
}

/// The victim starts an exchange, and leaves; the others get its part, or not, and then an error.
fn forget(group: &dyn Collective) -> Result<()> {
    let started = group.start(Pattern::AllGather, Message::new(&[100])?)?;
    if group.rank() == VICTIM {
        std::mem::forget(started);
        return Ok(());
    }
    group.finish(started, &mut |_| {})?;
    loop {
        group.all_gather(&[0; 10], &mut vec![0; 10 * group.size()])?;
    }
}

/// All phases, over and over in the last; `go_on` is asked before each.
fn phases(group: &dyn Collective, go_on: impl Fn(&str) -> bool) -> Result<()> {
    if !go_on("start") {
        return Ok(());
    }
    agree(group, &agreement(group, 100))?;
    if !go_on("encode") {
        return Ok(());
    }
    let shape = [1, 100, 2, 64];
    let mut tensors = [(); 2].map(|()| vec![if group.rank() == 0 { 1f32 } else { 0.0 }; 12_800]);
    let [key, value] = &mut tensors;
    let view = |data| TensorViewMut::contiguous("anchor", data, shape);
    share_anchor(group, view(key)?, view(value)?, &mut vec![0.0; 25_600])?;
    if !go_on("query") {
        return Ok(());
    }
    let exchange = || -> Result<()> {
        let mut all = vec![0; group.size() * 100_000];
        group.all_gather(&vec![group.rank() as u8; 100_000], &mut all)?;
        assert!(all.iter().enumerate().all(|(i, &x)| usize::from(x) == i / 100_000), "a wrong answer");
        Ok(())
    };
    exchange()?;
    if !go_on("generate") {
        return Ok(());
    }
    loop {
        exchange()?;
    }
}

fn agreement(group: &dyn Collective, block_len: usize) -> Agreement {
    Agreement {
        layout: StarLayout::builder(1000)
            .block_len(block_len)
            .anchor_len(50)
            .ranks(group.size())
            .generated(GeneratedKv::RoundRobin)
            .build()
            .unwrap(),
        shape: extents([1, 1, 1], [4, 2], [64, 64]),
        layers: 1,
        dtype: DType::F32,
        anchor: AnchorKv::Received,
        model: 0,
    }
}

/// Something else on the victim than on the others.
fn differ(group: &dyn Collective, program: &str) -> Result<()> {
    let differs = group.rank() == VICTIM;
    let gather = |bytes: usize| group.all_gather(&vec![0; bytes], &mut vec![0; bytes * group.size()]);
    match program {
        "longer" => gather(if differs { 1_000_000 } else { 10 }),
        "shorter" => gather(if differs { 10 } else { 1_000_000 }),
        "another" if differs => group.all_to_all(&[0; 30], &mut [0; 30]),
        "another" => gather(10),
        _ => agree(group, &agreement(group, if differs { 100 } else { 101 })),
    }
}
