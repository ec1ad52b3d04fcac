//! A model of 2 to 64 ranks: time to first token and time per generated token of Star Attention,
//! beside dense attention on one rank, ring attention and tree attention. **Modelled, not
//! measured**: rates of one rank, measured here or given, in the formulas below.
//!
//!     cargo bench --bench cluster -- [--ranks 2,4,..] [--lengths 16384,..] [--query 32]
//!         [--latency 10e-6] [--bandwidth 12.5e9] [--attention-flops R] [--linear-flops R] [--kv-bandwidth B]
//!
//! Llama-3.1-8B in bf16, whole on every rank; one context of `L` tokens, a query of `T`, then one
//! token at a time.
//!
//! ```text
//! α, β     seconds of a collective or a message, bytes a rank sends per second           comm::Link
//! R(m, n)  FLOP/s of attention under mask m at the longest blocks measured that have at most n tokens
//! R_q      the same for the T query tokens over a shard
//! R_l      FLOP/s of linear layers; unless given, that of causal attention
//! B        bytes per second of keys and values read for one token; weights are read as fast
//!
//! W        weights of a layer's linear layers:  d D (2 n_q + 2 n_kv) + 3 D M,  hidden size D, the MLP's M
//! K        a token's keys and values in a layer:  2 n_kv d · 2 bytes
//! P(t)     a rank's partial for t tokens, in f32:  t n_q (d + 1) · 4 bytes                comm::MergePlan
//! F(m)     FLOPs of a layer's attention:  4 d n_q for each pair that m leaves             cpu::flash::Plan::flops
//!
//! linear(t)    = max(2 W t / R_l,  2 W / B)
//! query(t, S)  = max(4 d n_q t S / R_q,  S K / B)
//! step(t, m)   = layers (linear(t) + query(t, S + T) + m) + head,    S = the longest shard
//! head         = linear(1), with the D × vocabulary weights of the last layer
//! ```
//!
//! **Star** (arXiv 2411.17116, sections 2.1 and 2.2), `a = b = ⌈L/H⌉`. A rank's rows are the
//! anchor's and its own, or its own alone if rank 0 sends it each layer's keys and values of the
//! anchor; then no rank is ahead of another, and nothing hides the sending.
//!
//! ```text
//! first token  = layers (max over ranks (linear(rows) + F(star) / R(star, b)) + anchor) + step(T, merge(T))
//! next token   = step(1, merge(1))
//! anchor       = 0 if encoded,  Link::broadcast(a K) if received                          comm::AnchorKv
//! merge(t)     = the less of  α + (H-1) P(t) / β    and    2α + 2 (H-1)/H P(t) / β        comm::MergeWay
//! ```
//!
//! **Ring** (arXiv 2310.01889), a rank having the chunks `i` and `2H-1-i` of `2H` (zigzag: arXiv
//! 2407.21783, section 3.3.2), so that all have the same to do; sending is hidden behind computing
//! in full. `C = ⌈(L+T)/H⌉`. **Dense** on one rank is `H = 1`.
//!
//! ```text
//! first token  = layers (linear(C) + max(F(causal)/H / R(causal, C),  (H-1) (α + C K / β))) + head
//! next token   = step(1, (H-1) (α + P(1) / β))
//! ```
//!
//! For the next token ranks pass on the partials they get until all have all. Gathered by one
//! collective, ring would have star's time.
//!
//! **Tree** (arXiv 2408.04093, Algorithm 3): the first token as with ring; for the next an
//! all-reduce of the maximum, and one of numerator and denominator together, where the algorithm
//! has two.
//!
//! ```text
//! next token   = step(1, 2α + 2 (H-1)/H n_q (4 + 4 (d + 1)) / β)
//! ```
//!
//! Only times are compared: star's context encoding leaves out keys that the others see. Not in the
//! model: memory (dense on one rank must hold 128 GiB of keys and values at 1M tokens), the
//! arithmetic of merges, norms and RoPE, launches, stragglers, links that share a wire, and
//! latencies of collectives that grow with the ranks.

#[path = "cluster/model.rs"]
mod model;
#[path = "cluster/rates.rs"]
mod rates;
#[path = "cluster/run.rs"]
mod run;

use model::Case;
use rates::{Given, Rates};
use star_attention::comm::{AnchorKv, Link, MergeWay};
use std::num::NonZeroUsize;
use std::str::FromStr;

/// The value of an option, if it is there.
fn option<T: FromStr>(name: &str) -> Option<T> {
    let args: Vec<String> = std::env::args().collect();
    let at = args.iter().position(|arg| arg == name)?;
    let value = args.get(at + 1).and_then(|value| value.parse().ok());
    Some(value.unwrap_or_else(|| panic!("{name}: missing or out of range")))
}

/// A comma list of numbers above 0.
struct List(Vec<usize>);

impl FromStr for List {
    type Err = ();

    fn from_str(list: &str) -> Result<Self, ()> {
        let number = |item: &str| item.parse().ok().filter(|&number| number > 0).ok_or(());
        list.split(',').map(number).collect::<Result<_, _>>().map(Self)
    }
}

/// A rate in operations or bytes per second.
struct Rate(f64);

impl FromStr for Rate {
    type Err = ();

    fn from_str(rate: &str) -> Result<Self, ()> {
        rate.parse().ok().filter(|&rate: &f64| rate > 0.0 && rate.is_finite()).map(Self).ok_or(())
    }
}

/// Three digits, and the largest unit that leaves some before the point.
fn time(seconds: f64) -> String {
    const UNITS: [(f64, &str); 5] = [(86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms")];
    let (unit, name) = UNITS.into_iter().find(|(unit, _)| seconds >= *unit).unwrap_or((1e-6, "us"));
    let value = seconds / unit;
    let digits = 2 - (value.log10().floor() as i32).clamp(0, 2);
    format!("{value:.*} {name}", digits as usize)
}

fn tokens(count: usize) -> String {
    match count {
        _ if count.is_multiple_of(1 << 20) => format!("{}M", count >> 20),
        _ if count.is_multiple_of(1 << 10) => format!("{}K", count >> 10),
        _ => count.to_string(),
    }
}

fn merge_name(way: MergeWay) -> &'static str {
    match way {
        MergeWay::AllGather => "all-gather",
        MergeWay::ByRows => "by rows",
    }
}

fn first_token_table(cases: &[Case<'_>]) {
    println!(
        "| context | dense, 1 rank | ring, tree | star, encoded | star, received | anchor | query's merge | ring / star |"
    );
    println!("|---:|---:|---:|---:|---:|---|---|---:|");
    for case in cases {
        let anchor = case.anchor();
        let [encoded, received] = [AnchorKv::Encoded, AnchorKv::Received].map(|kv| case.star_first(kv));
        println!(
            "| {} | {} | {} | {} | {} | {} | {} | {:.2} |",
            tokens(case.context),
            time(case.dense().ring_first()),
            time(case.ring_first()),
            time(encoded),
            time(received),
            if anchor == AnchorKv::Encoded { "encoded" } else { "received" },
            merge_name(case.merge(case.query)),
            case.ring_first() / case.star_first(anchor)
        );
    }
}

fn next_token_table(cases: &[Case<'_>]) {
    println!(
        "| context | dense, 1 rank | ring | tree | star | merge | dense / star | a layer's messages: ring | tree | star |"
    );
    println!("|---:|---:|---:|---:|---:|---|---:|---:|---:|---:|");
    for case in cases {
        let [dense, ring] = [case.dense(), *case].map(|case| case.next(case.ring_messages()));
        let star = case.next(case.star_messages(1));
        println!(
            "| {} | {} | {} | {} | {} | {} | {:.2} | {} | {} | {} |",
            tokens(case.context),
            time(dense),
            time(ring),
            time(case.next(case.tree_messages())),
            time(star),
            merge_name(case.merge(1)),
            dense / star,
            time(case.ring_messages()),
            time(case.tree_messages()),
            time(case.star_messages(1))
        );
    }
}

fn main() {
    // `cargo bench` says --bench; tests only want to see it start.
    let given = |name: &str| std::env::args().any(|arg| arg == name);
    let test = given("--test") || !given("--bench");
    let list = |name: &str, short: &[usize], long: &[usize]| {
        option::<List>(name).map_or(if test { short } else { long }.to_vec(), |List(list)| list)
    };
    let ranks = list("--ranks", &[4], &[2, 4, 8, 16, 32, 64]);
    let lengths = list("--lengths", &[1 << 14], &std::array::from_fn::<_, 7, _>(|i| 1 << (14 + i)));
    let query = option("--query").map_or(32, NonZeroUsize::get);
    let (latency, bandwidth) =
        (option("--latency").unwrap_or(10e-6), option("--bandwidth").unwrap_or(12.5e9));
    let link = Link::new(latency, bandwidth).unwrap_or_else(|error| panic!("{error}"));
    let rate = |name: &str| option(name).map(|Rate(rate)| rate);
    let [attention, linear, bandwidth] = ["--attention-flops", "--linear-flops", "--kv-bandwidth"].map(rate);
    let rates = Rates::new(&Given { attention, linear, bandwidth }, query, test);

    println!("\n{rates}");
    println!(
        "Modelled, not measured: {} and {:.1} GB/s between ranks, a query of {query} tokens, Llama-3.1-8B.",
        time(latency),
        link.bandwidth / 1e9
    );
    for ranks in ranks {
        let case = |&context| Case { rates: &rates, link, ranks, context, query };
        let cases: Vec<_> = lengths.iter().map(case).collect();
        println!("\n## {ranks} ranks\n\nTime to first token, modelled:\n");
        first_token_table(&cases);
        println!("\nTime per generated token, and of a layer's messages in it, modelled:\n");
        next_token_table(&cases);
    }
}
