//! The cost model: its formulas, and the choices that follow.

use crate::common::named;
use proptest::prelude::*;
use star_attention::comm::{AnchorKv, Link, MergeWay};

fn near(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-12 * a.abs().max(b.abs())
}

#[test]
fn links_out_of_range_are_refused() {
    for latency in [-1.0, f64::NAN, f64::INFINITY] {
        assert_eq!(named(Link::new(latency, 1.0).unwrap_err()), ("value", "latency"));
    }
    for bandwidth in [0.0, -1.0, f64::NAN] {
        assert_eq!(named(Link::new(0.0, bandwidth).unwrap_err()), ("value", "bandwidth"));
    }
    assert!(Link::new(0.0, f64::INFINITY).is_ok());
}

proptest! {
    #[test]
    fn a_merge_goes_by_rows_beyond_the_documented_length(
        latency in 1e-7..1e-3f64, bandwidth in 1e8..1e12f64, ranks in 1..100usize, share in 1..1_000_000usize,
    ) {
        let link = Link::new(latency, bandwidth).unwrap();
        // Whole shares, so that none is rounded up.
        let bytes = share * ranks;
        let others = ranks as f64 - 1.0;
        let edge = latency * bandwidth / (others * (1.0 - 2.0 / ranks as f64));
        let expected = if ranks > 2 && bytes as f64 > edge { MergeWay::ByRows } else { MergeWay::AllGather };
        prop_assume!(!near(bytes as f64, edge));
        prop_assert_eq!(MergeWay::cheapest(&link, ranks, bytes), expected);
        let seconds = MergeWay::ByRows.seconds(&link, ranks, bytes);
        prop_assert!(near(seconds, 2.0 * latency + 2.0 * others / ranks as f64 * bytes as f64 / bandwidth));
    }

    #[test]
    fn the_anchor_is_sent_where_that_is_faster_than_encoding_it(
        latency in 1e-7..1e-3f64, bandwidth in 1e8..1e12f64, ranks in 1..100usize, bytes in 0..100_000_000usize, seconds in 0.0..1.0f64,
    ) {
        let link = Link::new(latency, bandwidth).unwrap();
        let others = ranks as f64 - 1.0;
        let to_each = latency + others * bytes as f64 / bandwidth;
        let in_parts = 2.0 * latency + 2.0 * others / ranks as f64 * bytes as f64 / bandwidth;
        prop_assert!(near(link.broadcast(ranks, bytes), to_each.min(in_parts)));
        let sent = AnchorKv::cheapest(&link, ranks, bytes, seconds) == AnchorKv::Received;
        prop_assert_eq!(sent, ranks > 1 && to_each.min(in_parts) < seconds);
    }
}
