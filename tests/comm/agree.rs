//! The handshake finds whatever differs between ranks, on every rank.

use crate::common::{extents, named};
use crate::threads::all_ranks;
use star_attention::comm::{Agreement, AnchorKv, Collective, GroupConfig, Link, ThreadGroup, Traffic, agree};
use star_attention::{AttentionShape, DType, Error, GeneratedKv, StarLayout};

fn agreement(ranks: usize) -> Agreement {
    Agreement {
        layout: StarLayout::builder(1000).block_len(100).anchor_len(50).ranks(ranks).build().unwrap(),
        shape: extents([1, 5, 7], [8, 2], [64, 64]),
        layers: 4,
        dtype: DType::BF16,
        anchor: AnchorKv::Encoded,
        model: 0,
    }
}

#[test]
fn ranks_that_run_the_same_agree() {
    for size in 1..=8 {
        all_ranks(size, |group| {
            let mut mine = agreement(size);
            // Ranks have shares of different lengths.
            mine.shape.key_len = group.rank();
            agree(&group, &mine).unwrap();
            assert_eq!(group.traffic().collectives, 1);
        });
    }
}

#[test]
fn whatever_differs_is_named_on_every_rank() {
    let base = agreement(3);
    let layout = |context, block, anchor| {
        StarLayout::builder(context).block_len(block).anchor_len(anchor).ranks(3).build().unwrap()
    };
    let same = base.layout.to_builder();
    let shape = base.shape;
    let cases = [
        ("context_len", Agreement { layout: layout(999, 100, 50), ..base }, "1000", "999"),
        ("block_len", Agreement { layout: layout(1000, 90, 50), ..base }, "100", "90"),
        ("anchor_len", Agreement { layout: layout(1000, 100, 0), ..base }, "50", "0"),
        ("query_rank", Agreement { layout: same.query_rank(0).build().unwrap(), ..base }, "2", "0"),
        ("batch", Agreement { shape: AttentionShape { batch: 2, ..shape }, ..base }, "1", "2"),
        ("query_heads", Agreement { shape: AttentionShape { query_heads: 16, ..shape }, ..base }, "8", "16"),
        ("kv_heads", Agreement { shape: AttentionShape { kv_heads: 8, ..shape }, ..base }, "2", "8"),
        ("head_dim", Agreement { shape: AttentionShape { head_dim: 128, ..shape }, ..base }, "64", "128"),
        ("value_dim", Agreement { shape: AttentionShape { value_dim: 128, ..shape }, ..base }, "64", "128"),
        ("layers", Agreement { layers: 5, ..base }, "4", "5"),
        ("dtype", Agreement { dtype: DType::F16, ..base }, "bf16", "f16"),
        ("anchor", Agreement { anchor: AnchorKv::Received, ..base }, "encoded", "received"),
        (
            "generated",
            Agreement { layout: same.generated(GeneratedKv::RoundRobin).build().unwrap(), ..base },
            "on the query rank",
            "round robin",
        ),
        ("model", Agreement { model: 1 << 63, ..base }, "0", "9223372036854775808"),
    ];
    for (name, other, ours, theirs) in cases {
        let errors =
            all_ranks(3, |group| agree(&group, if group.rank() == 1 { &other } else { &base }).unwrap_err());
        for (rank, error) in errors.into_iter().enumerate() {
            let Error::Peer { rank: peer, argument, expected, got } = &error else { panic!("{error}") };
            assert_eq!(*argument, name);
            let (of, sides) = if rank == 1 { (0, (theirs, ours)) } else { (1, (ours, theirs)) };
            assert_eq!((*peer, (expected.as_str(), got.as_str())), (of, sides), "{error}");
        }
    }
}

#[test]
fn links_that_differ_are_found() {
    let config =
        |latency| GroupConfig { link: Some(Link { latency, bandwidth: 1e9 }), ..GroupConfig::default() };
    // A rank of one group that holds the link of another: as two processes with other options
    // would.
    struct Linked(ThreadGroup, Link);
    impl Collective for Linked {
        fn rank(&self) -> usize {
            self.0.rank()
        }
        fn size(&self) -> usize {
            self.0.size()
        }
        fn link(&self) -> Link {
            self.1
        }
        fn all_gather(&self, send: &[u8], receive: &mut [u8]) -> star_attention::Result<()> {
            self.0.all_gather(send, receive)
        }
        fn all_to_all(&self, send: &[u8], receive: &mut [u8]) -> star_attention::Result<()> {
            self.0.all_to_all(send, receive)
        }
        fn broadcast(&self, root: usize, buffer: &mut [u8]) -> star_attention::Result<()> {
            self.0.broadcast(root, buffer)
        }
        fn traffic(&self) -> Traffic {
            self.0.traffic()
        }
    }
    let ranks = ThreadGroup::ranks_with(2, &config(1e-5)).unwrap();
    assert_eq!(ranks[0].link().latency, 1e-5);
    std::thread::scope(|scope| {
        for group in ranks {
            scope.spawn(|| {
                let link = Link { latency: 1e-5 * (1 + group.rank()) as f64, bandwidth: 1e9 };
                let error = agree(&Linked(group, link), &agreement(2)).unwrap_err();
                assert!(matches!(error, Error::Peer { argument: "latency", .. }), "{error}");
            });
        }
    });
}

#[test]
fn a_layout_for_other_hosts_is_refused_before_anything_is_sent() {
    all_ranks(2, |group| {
        assert_eq!(named(agree(&group, &agreement(3)).unwrap_err()), ("value", "layout"));
        assert_eq!(group.traffic(), Traffic::default());
    });
}
