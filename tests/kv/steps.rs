//! Both phases of Star Attention on a store: what each rank keeps.

use crate::common::{Tensor, indices};
use star_attention::cpu::Cpu;
use star_attention::{Append, F8E4M3, GeneratedKv, KvConfig, KvStore, SequenceId, StarLayout};

const HEADS: usize = 2;
const DIM: usize = 3;
const LAYERS: usize = 2;

/// Rows that tell their layer, token and head.
fn rows(layer: usize, tokens: impl IntoIterator<Item = usize>) -> Tensor<f32> {
    let tokens: Vec<usize> = tokens.into_iter().collect();
    Tensor::contiguous("rows", [1, tokens.len(), HEADS, DIM], |[_, row, head, d]| {
        (10_000 * layer + 100 * tokens[row] + 10 * head + d) as f32
    })
}

/// The first rows of the sequence are those of `tokens`, keys and, negated, values.
fn holds(store: &KvStore<Cpu, f32>, sequence: SequenceId, layer: usize, tokens: &[usize]) {
    let expected = rows(layer, tokens.iter().copied());
    let [key, value] = store.rows_of(&Cpu::new(), layer, sequence, tokens.len()).unwrap().map(Tensor::of);
    for index in indices(expected.shape()) {
        assert_eq!(key.get(index), expected.get(index), "layer {layer} {index:?} of {tokens:?}");
        assert_eq!(value.get(index), -expected.get(index));
    }
}

fn negated(rows: &Tensor<f32>) -> Tensor<f32> {
    Tensor::contiguous("rows", rows.shape(), |index| -rows.get(index))
}

#[test]
fn ranks_keep_their_tokens_and_attend_to_what_they_lead() {
    let cpu = Cpu::new();
    for generated in [GeneratedKv::QueryRank, GeneratedKv::RoundRobin] {
        let layout = StarLayout::builder(20).block_len(5).anchor_len(3).ranks(3).query_rank(1);
        let layout = layout.generated(generated).build().unwrap();
        let steps = [7, 1, 1, 4];
        let mut kept_by_all = Vec::new();
        for rank in 0..3 {
            let rank = layout.rank(rank).unwrap();
            // Exactly the room that the layout asks for.
            let room = rank.room(steps.iter().sum(), 7);
            let config = KvConfig::new(HEADS, DIM).with_layers(LAYERS).in_rows(1, room);
            let mut store = KvStore::<_, f32>::new(&cpu, config).unwrap();
            let sequence = store.open().unwrap();

            // The anchor is dropped by never storing it.
            let (own, kept) = (rank.own_tokens(), rank.kept());
            store.extend(&cpu, sequence, own.len()).unwrap();
            for layer in 0..LAYERS {
                let key = rows(layer, rank.tokens());
                let value = negated(&key);
                let own = [&key, &value].map(|rows| rows.view().narrow(1, kept.start, kept.len()).unwrap());
                store.put(&cpu, layer, sequence, 0..kept.len(), own).unwrap();
            }
            let mut held: Vec<usize> = own.collect();
            let mut first = 0;
            for len in steps {
                let step = rank.step(first..first + len);
                first += len;
                let tokens: Vec<usize> = step.positions().collect();
                let new = store.begin_step(&cpu, sequence, &step).unwrap();
                assert_eq!(new.held, held.len());
                let attended = [&held[..], &tokens[step.appended()]].concat();
                assert_eq!(new.attended, attended.len());
                held.extend(step.kept().map(|row| tokens[row]));
                assert_eq!(new.kept, held.len());
                for layer in 0..LAYERS {
                    let key = rows(layer, tokens.iter().copied());
                    let value = negated(&key);
                    let rows = |places| Append::new(key.view(), value.view(), places);
                    store.append(&cpu, layer, rows(&new.appended_places[..])).unwrap();
                    holds(&store, sequence, layer, &attended);
                    if step.keeps_appended() {
                        assert_eq!(new.kept, new.attended);
                    } else {
                        store.append(&cpu, layer, rows(&new.kept_places[..])).unwrap();
                    }
                    holds(&store, sequence, layer, &held);
                }
                store.truncate(sequence, new.kept).unwrap();
            }
            kept_by_all.extend(held);
        }
        kept_by_all.sort_unstable();
        assert_eq!(kept_by_all, (0..33).collect::<Vec<_>>());
    }
}

/// As documented: the CPU streams a head's keys from contiguous memory.
#[test]
fn heads_come_before_rows_in_memory() {
    let cpu = Cpu::new();
    let store = KvStore::<_, f32>::new(&cpu, KvConfig::new(2, 8).in_pages(3, 5)).unwrap();
    for tensor in [store.key(&cpu, 0).unwrap(), store.value(&cpu, 0).unwrap()] {
        assert_eq!((tensor.shape(), tensor.strides()), ([3, 5, 2, 8], [80, 8, 40, 1]));
    }
    assert_eq!(store.row_bytes(), 2 * 2 * 8 * 4);
    let config = KvConfig::new(2, 8).with_value_dim(3).in_pages(3, 5);
    let store = KvStore::<_, F8E4M3>::new(&cpu, config).unwrap();
    let value = store.value(&cpu, 0).unwrap();
    assert_eq!((value.shape(), value.strides()), ([3, 5, 2, 3], [30, 3, 15, 1]));
    assert_eq!((store.value_shape(), store.row_bytes()), ([3, 5, 2, 3], 2 * (8 + 3)));
}
