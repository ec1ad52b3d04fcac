//! Bad input: a typed error that names the argument, and the store as it was.

use crate::common::{Tensor, named};
use crate::properties::backend::read_store;
use star_attention::cpu::Cpu;
use star_attention::cuda::Cuda;
use star_attention::cuda::simt::Simt;
use star_attention::{Error, KvConfig, KvStore, SequenceId, bf16};
use std::fmt::Debug;

const CPU: Cpu = Cpu::new();

fn heads() -> KvConfig {
    KvConfig::new(2, 8)
}

fn refused<R: Debug>(result: Result<R, Error>) -> (&'static str, &'static str) {
    named(result.unwrap_err())
}

/// A store in pages with a sequence of `len` tokens, all rows 1.
fn in_pages(pages: usize, page_len: usize, len: usize) -> (KvStore<Cpu, f32>, SequenceId) {
    let mut store = KvStore::new(&CPU, heads().in_pages(pages, page_len)).unwrap();
    let sequence = store.open().unwrap();
    store.extend(&CPU, sequence, len).unwrap();
    let ones = Tensor::<f32>::contiguous("ones", [1, len, 2, 8], |_| 1.0);
    store.put(&CPU, 0, sequence, 0..len, [ones.view(), ones.view()]).unwrap();
    (store, sequence)
}

#[test]
fn configs() {
    let new = |config: KvConfig| refused(KvStore::<_, bf16>::new(&CPU, config));
    assert_eq!(new(heads().with_layers(0).in_pages(1, 1)), ("value", "layers"));
    assert_eq!(new(KvConfig::new(0, 8).in_pages(1, 1)), ("value", "kv_heads"));
    assert_eq!(new(KvConfig::new(2, 0).in_rows(1, 1)), ("value", "head_dim"));
    assert_eq!(new(heads().with_value_dim(0).in_rows(1, 1)), ("value", "value_dim"));
    assert_eq!(new(heads().in_pages(1, 0)), ("value", "page_len"));
    // Without room.
    assert_eq!(new(heads()), ("value", "page_len"));
    // Places are numbers of 32 bits.
    assert_eq!(new(heads().in_pages(1 << 16, 1 << 16)), ("value", "pages"));
    assert_eq!(new(heads().in_pages(usize::MAX, 2)), ("value", "pages"));
    assert_eq!(new(heads().in_rows(1, 1 << 32)), ("value", "capacity"));
    assert_eq!(new(heads().in_rows(1 << 20, 1 << 20)), ("value", "sequences"));
    assert_eq!(new(heads().in_rows(1 << 32, 0)), ("value", "sequences"));
    assert_eq!(new(KvConfig::new(1 << 40, 8).in_pages(1 << 16, 16)), ("shape", "key"));
    assert_eq!(new(heads().with_value_dim(1 << 40).in_pages(1 << 16, 16)), ("shape", "value"));
    assert_eq!(new(KvConfig::new(1 << 20, 8).in_pages(1 << 26, 16)), ("value", "len"));
    assert_eq!(new(heads().with_layers(usize::MAX).in_pages(1, 1)), ("value", "layers"));
    // Room for nothing is room: a rank may have no tokens.
    for config in [heads().in_pages(0, 16), heads().in_rows(1, 0), heads().in_rows(0, 0)] {
        KvStore::<_, bf16>::new(&CPU, config).unwrap();
    }
}

#[test]
fn too_few_pages() {
    let (mut store, sequence) = in_pages(3, 4, 6);
    let full = |result: Result<(), Error>, pages: [usize; 2]| {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::Pages { needed, free } if [needed, free] == pages), "{error}");
        error.to_string()
    };
    assert_eq!(full(store.extend(&CPU, sequence, 7), [2, 1]), "store: 2 more pages needed, 1 free");
    // One for the rows, and one for the copy of the page that both use.
    let other = store.share(sequence, 5).unwrap();
    full(store.extend(&CPU, other, 4), [2, 1]);
    store.extend(&CPU, other, 3).unwrap();
    // The first has its page for itself again.
    store.extend(&CPU, sequence, 2).unwrap();
    full(store.extend(&CPU, sequence, 1), [1, 0]);
    full(store.extend(&CPU, sequence, usize::MAX - 8), [(usize::MAX / 4) - 1, 0]);
    assert_eq!([sequence, other].map(|id| store.len(id).unwrap()), [8, 8]);

    let mut rows = KvStore::<_, f32>::new(&CPU, heads().in_rows(1, 4)).unwrap();
    let first = rows.open().unwrap();
    full(rows.open().map(|_| ()), [1, 0]);
    // A share is no copy, until one of them grows.
    let second = rows.share(first, 0).unwrap();
    full(rows.extend(&CPU, second, 1), [1, 0]);
    rows.close(first).unwrap();
    rows.extend(&CPU, second, 1).unwrap();
}

#[test]
fn a_sequence_that_is_full() {
    let mut store = KvStore::<_, f32>::new(&CPU, heads().in_rows(2, 4)).unwrap();
    let sequence = store.open().unwrap();
    store.extend(&CPU, sequence, 3).unwrap();
    for rows in [2, usize::MAX] {
        let error = store.extend(&CPU, sequence, rows).unwrap_err();
        let Error::Capacity { capacity, len, requested } = error else { panic!("{error}") };
        assert_eq!((capacity, len, requested), (4, 3, rows));
    }
    store.extend(&CPU, sequence, 1).unwrap();
    assert!(matches!(store.extend(&CPU, sequence, 1), Err(Error::Capacity { .. })));
    store.truncate(sequence, 1).unwrap();
    store.extend(&CPU, sequence, 3).unwrap();
    // In pages a count of tokens has an end as well.
    let (mut pages, sequence) = in_pages(3, 4, 6);
    assert!(matches!(pages.extend(&CPU, sequence, usize::MAX), Err(Error::Capacity { len: 6, .. })));
}

#[test]
fn sequences_that_are_not_open() {
    let (mut store, sequence) = in_pages(3, 4, 6);
    let stale = store.open().unwrap();
    store.close(stale).unwrap();
    // In the same slot.
    let again = store.open().unwrap();
    assert_ne!(stale, again);
    let unknown = in_pages(3, 4, 6).1;
    let ones = Tensor::<f32>::contiguous("ones", [1, 0, 2, 8], |_| 1.0);
    for id in [stale, unknown] {
        let wrong = ("value", "sequence");
        assert_eq!(refused(store.close(id)), wrong);
        assert_eq!(refused(store.len(id)), wrong);
        assert_eq!(refused(store.extend(&CPU, id, 1)), wrong);
        assert_eq!(refused(store.truncate(id, 0)), wrong);
        assert_eq!(refused(store.share(id, 0)), wrong);
        assert_eq!(refused(store.keys(id)), wrong);
        assert_eq!(refused(store.keys_of(id, 0)), wrong);
        assert_eq!(refused(store.places(id, 0..0).map(|_| ())), wrong);
        assert_eq!(refused(store.rows(&CPU, 0, id)), wrong);
        assert_eq!(refused(store.put(&CPU, 0, id, 0..0, [ones.view(), ones.view()])), wrong);
    }
    assert_eq!((store.len(sequence).unwrap(), store.len(again).unwrap()), (6, 0));
}

#[test]
fn tokens_and_layers_that_are_not_there() {
    let (mut store, sequence) = in_pages(3, 4, 6);
    assert_eq!(refused(store.truncate(sequence, 7)), ("value", "len"));
    assert_eq!(refused(store.share(sequence, 7)), ("value", "len"));
    assert_eq!(refused(store.keys_of(sequence, 7)), ("value", "len"));
    assert_eq!(refused(store.places(sequence, 5..7).map(|_| ())), ("value", "rows"));
    let reversed = std::ops::Range { start: 3, end: 2 };
    assert_eq!(refused(store.places(sequence, reversed).map(|_| ())), ("value", "rows"));
    let two = Tensor::<f32>::contiguous("two", [1, 2, 2, 8], |_| 2.0);
    let mut put = |layer, rows, key: &Tensor<f32>, value: &Tensor<f32>| {
        refused(store.put(&CPU, layer, sequence, rows, [key.view(), value.view()]))
    };
    assert_eq!(put(0, 5..7, &two, &two), ("value", "rows"));
    assert_eq!(put(1, 4..6, &two, &two), ("value", "layer"));
    assert_eq!(put(0, 3..6, &two, &two), ("shape", "places"));
    let wide = Tensor::<f32>::contiguous("wide", [1, 2, 2, 9], |_| 2.0);
    assert_eq!(put(0, 4..6, &wide, &two), ("shape", "cache_key"));
    assert_eq!(put(0, 4..6, &two, &wide), ("shape", "value"));
    assert_eq!(refused(store.key(&CPU, 1)), ("value", "layer"));
    assert_eq!(refused(store.value(&CPU, usize::MAX)), ("value", "layer"));
    assert_eq!(refused(store.rows(&CPU, 1, sequence)), ("value", "layer"));
    assert_eq!(refused(store.rows(&CPU, 0, sequence)), ("value", "store"));
    assert_eq!((store.len(sequence).unwrap(), store.free_pages()), (6, 1));
    let ones = |tensor: &Tensor<f32>| tensor.values().filter(|&x| x == 1.0).count();
    assert_eq!(read_store(&CPU, &store, 0).each_ref().map(ones), [6 * 2 * 8; 2]);
}

#[test]
fn growth_that_is_none() {
    let (mut store, sequence) = in_pages(3, 4, 6);
    let mut grow = |config: KvConfig| refused(store.grow(&CPU, config));
    assert_eq!(grow(heads().in_rows(3, 4)), ("value", "room"));
    assert_eq!(grow(heads().in_pages(2, 4)), ("value", "pages"));
    assert_eq!(grow(heads().in_pages(4, 5)), ("value", "page_len"));
    assert_eq!(grow(heads().with_layers(2).in_pages(4, 4)), ("value", "layers"));
    assert_eq!(grow(KvConfig::new(3, 8).in_pages(4, 4)), ("value", "kv_heads"));
    assert_eq!(grow(KvConfig::new(2, 16).in_pages(4, 4)), ("value", "head_dim"));
    assert_eq!(grow(heads().with_value_dim(16).in_pages(4, 4)), ("value", "value_dim"));
    assert_eq!(grow(heads().in_pages(1 << 30, 4)), ("value", "pages"));
    assert_eq!((store.shape(), store.len(sequence).unwrap()), ([3, 4, 2, 8], 6));
    let mut rows = KvStore::<_, f32>::new(&CPU, heads().in_rows(2, 4)).unwrap();
    assert_eq!(refused(rows.grow(&CPU, heads().in_rows(1, 9))), ("value", "sequences"));
    assert_eq!(refused(rows.grow(&CPU, heads().in_rows(2, 3))), ("value", "capacity"));
}

/// The kernels take no f32, so copies fail: of a shared page, and of what a store held before it
/// grew. Both leave the store as it was.
#[test]
fn copies_that_fail() {
    let backend = Cuda::new(Simt::new(0), ());
    let mut store = KvStore::<_, f32>::new(&backend, heads().in_pages(3, 4)).unwrap();
    let sequence = store.open().unwrap();
    store.extend(&backend, sequence, 2).unwrap();
    let other = store.share(sequence, 2).unwrap();
    let before = format!("{store:?}");
    assert_eq!(refused(store.extend(&backend, other, 1)), ("dtype", "key"));
    assert_eq!(refused(store.grow(&backend, heads().in_pages(4, 4))), ("dtype", "key"));
    assert_eq!(format!("{store:?}"), before);
    // Where nothing is to be copied, nothing fails.
    store.close(other).unwrap();
    store.extend(&backend, sequence, 1).unwrap();
    store.close(sequence).unwrap();
    store.grow(&backend, heads().in_pages(4, 4)).unwrap();
}
