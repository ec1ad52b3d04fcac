//! Random histories of a store, beside a list of tokens for each sequence.

use crate::common::{Call, Rng, Tensor, extents};
use crate::properties::backend::{Stored, read_store};
use crate::properties::cases::RUBBISH;
use crate::properties::expected::Expected;
use proptest::prelude::*;
use proptest::sample::Index;
use star_attention::cpu::Cpu;
use star_attention::cuda::Cuda;
use star_attention::cuda::simt::Simt;
use star_attention::{
    Append, AttentionConfig, Backend, Batch, Element, Error, F8E4M3, Inputs, KvConfig, KvRoom, KvStore,
    LEFT_OUT, Mask, PlanConfig, Sequence, SequenceId, bf16, f16,
};

#[derive(Clone, Debug)]
enum Event {
    Open,
    Close(Index),
    Extend(Index, usize),
    /// Every sequence by so many tokens, as far as there is room, in one append for each layer.
    ExtendAll(usize),
    Truncate(Index, Index),
    Share(Index, Index),
    /// More pages, and longer ones in rows.
    Grow([usize; 2]),
}

#[derive(Clone, Debug)]
struct History {
    config: KvConfig,
    /// Query heads for each KV head.
    group: usize,
    events: Vec<Event>,
    seed: u64,
}

fn histories(dims: impl Strategy<Value = (usize, usize)>) -> impl Strategy<Value = History> {
    let index = any::<Index>;
    let event = prop_oneof![
        3 => Just(Event::Open),
        1 => index().prop_map(Event::Close),
        5 => (index(), 0..12usize).prop_map(|(of, rows)| Event::Extend(of, rows)),
        2 => (0..4usize).prop_map(Event::ExtendAll),
        2 => (index(), index()).prop_map(|(of, len)| Event::Truncate(of, len)),
        2 => (index(), index()).prop_map(|(of, len)| Event::Share(of, len)),
        1 => [0..3usize, 0..5usize].prop_map(Event::Grow),
    ];
    let extents = (1..=3usize, 1..=3usize, 1..=3usize, dims);
    let room = (any::<bool>(), 0..8usize, 1..9usize);
    (extents, room, prop::collection::vec(event, 1..24), any::<u64>()).prop_map(
        |((layers, kv_heads, group, (head_dim, value_dim)), (in_rows, pages, page_len), events, seed)| {
            let config = KvConfig::new(kv_heads, head_dim).with_value_dim(value_dim).with_layers(layers);
            let config = match in_rows {
                true => config.in_rows(pages, 3 * page_len - 3),
                false => config.in_pages(pages, page_len),
            };
            History { config, group, events, seed }
        },
    )
}

/// A store, and what its sequences should hold: for each token what its rows are drawn from.
struct Kept<'a, B: Backend, T: Element> {
    backend: &'a B,
    store: KvStore<B, T>,
    open: Vec<(SequenceId, Vec<u64>)>,
    rng: Rng,
}

/// Rows of keys (0) or values (1) of a layer.
fn rows<T: Element>(tokens: &[u64], layer: usize, which: usize, config: &KvConfig) -> Tensor<T> {
    let stream = (2 * layer + which) as u64;
    let mut rngs: Vec<Rng> = tokens.iter().map(|&token| Rng::new(token.wrapping_add(stream))).collect();
    let shape = [1, tokens.len(), config.kv_heads, [config.head_dim, config.value_dim][which]];
    Tensor::contiguous("rows", shape, |[_, token, ..]| rngs[token].normal())
}

fn both<T: Element>(tokens: &[u64], layer: usize, config: &KvConfig) -> [Tensor<T>; 2] {
    [0, 1].map(|which| rows(tokens, layer, which, config))
}

impl<B: Backend, T: Element> Kept<'_, B, T> {
    /// Whether a sequence could grow. Where it could not, nothing has changed.
    fn extend(&mut self, of: usize, rows: usize) -> bool {
        let (id, tokens) = &self.open[of];
        let free = self.store.free_pages();
        match self.store.extend(self.backend, *id, rows) {
            Ok(()) => return true,
            Err(Error::Pages { needed, free: left }) => assert!(needed > left && left == free),
            Err(Error::Capacity { capacity, len, requested }) => {
                let KvRoom::Rows { capacity: rows_of_each, .. } = self.store.config().room else {
                    panic!("a capacity in pages");
                };
                assert_eq!((capacity, len, requested), (rows_of_each, tokens.len(), rows));
                assert!(len + requested > capacity);
            }
            Err(error) => panic!("{error}"),
        }
        assert_eq!((self.store.len(*id).unwrap(), self.store.free_pages()), (tokens.len(), free));
        false
    }

    fn write_one(&mut self, of: usize, more: usize) {
        if !self.extend(of, more) {
            return;
        }
        let config = *self.store.config();
        let (id, tokens) = &mut self.open[of];
        let held = tokens.len();
        tokens.extend((0..more).map(|_| self.rng.next()));
        for layer in 0..config.layers {
            let own = both::<T>(&tokens[held..], layer, &config);
            let own = own.each_ref().map(|rows| Stored::of(self.backend, rows));
            let own = own.each_ref().map(|rows| rows.view(self.backend, "rows"));
            self.store.put(self.backend, layer, *id, held..held + more, own).unwrap();
        }
    }

    /// With a row of padding behind those of each sequence.
    fn write_all(&mut self, more: usize) {
        let config = *self.store.config();
        let (mut places, mut written) = (Vec::new(), Vec::new());
        for of in 0..self.open.len() {
            if !self.extend(of, more) {
                continue;
            }
            let (id, tokens) = &mut self.open[of];
            let held = tokens.len();
            tokens.extend((0..more).map(|_| self.rng.next()));
            places.extend(self.store.places(*id, held..held + more).unwrap());
            places.push(LEFT_OUT);
            written.extend_from_slice(&tokens[held..]);
            written.push(0);
        }
        let places = self.backend.buffer_of(&places).unwrap();
        for layer in 0..config.layers {
            let new = both::<T>(&written, layer, &config);
            let [key, value] = new.each_ref().map(|rows| Stored::of(self.backend, rows));
            let new = Append::new(
                key.view(self.backend, "key"),
                value.view(self.backend, "value"),
                self.backend.slice(&places, ..),
            );
            self.store.append(self.backend, layer, new).unwrap();
        }
    }

    fn happens(&mut self, event: &Event) {
        let at = |index: &Index| (!self.open.is_empty()).then(|| index.index(self.open.len()));
        match event {
            Event::Open => match self.store.open() {
                Ok(id) => self.open.push((id, Vec::new())),
                Err(Error::Pages { needed: 1, free: 0 }) => {
                    assert!(matches!(self.store.config().room, KvRoom::Rows { .. }));
                    assert_eq!(self.store.free_pages(), 0);
                }
                Err(error) => panic!("{error}"),
            },
            Event::Grow([pages, longer]) => {
                let config = *self.store.config();
                let config = match config.room {
                    KvRoom::Rows { sequences, capacity } => {
                        config.in_rows(sequences + pages, capacity + longer)
                    }
                    KvRoom::Pages { pages: before, page_len } => config.in_pages(before + pages, page_len),
                    _ => unreachable!("no other room was made"),
                };
                let free = self.store.free_pages();
                self.store.grow(self.backend, config).unwrap();
                assert_eq!((self.store.config(), self.store.free_pages()), (&config, free + pages));
            }
            Event::ExtendAll(more) => self.write_all(*more),
            Event::Close(of) => {
                let Some(of) = at(of) else { return };
                let (id, _) = self.open.swap_remove(of);
                self.store.close(id).unwrap();
                assert!(self.store.len(id).is_err());
            }
            Event::Extend(of, more) => {
                let Some(of) = at(of) else { return };
                self.write_one(of, *more);
            }
            Event::Truncate(of, len) => {
                let Some(of) = at(of) else { return };
                let (id, tokens) = &mut self.open[of];
                tokens.truncate(len.index(tokens.len() + 1));
                self.store.truncate(*id, tokens.len()).unwrap();
            }
            Event::Share(of, len) => {
                let Some(of) = at(of) else { return };
                let (id, tokens) = &self.open[of];
                let tokens = tokens[..len.index(tokens.len() + 1)].to_vec();
                let free = self.store.free_pages();
                let id = self.store.share(*id, tokens.len()).unwrap();
                assert_eq!(self.store.free_pages(), free, "a shared page was copied");
                self.open.push((id, tokens));
            }
        }
    }

    /// Every token of every sequence is what was written for it, in all layers.
    fn check(&self) -> Result<(), TestCaseError> {
        let config = self.store.config();
        let [_, page_len, kv_heads, _] = self.store.shape();
        for layer in 0..config.layers {
            let stored = read_store(self.backend, &self.store, layer);
            for (id, tokens) in &self.open {
                prop_assert_eq!(self.store.len(*id).unwrap(), tokens.len());
                let expected = both::<T>(tokens, layer, config);
                for (row, place) in self.store.places(*id, 0..tokens.len()).unwrap().enumerate() {
                    let (page, at) = (place as usize / page_len, place as usize % page_len);
                    for (stored, expected) in stored.iter().zip(&expected) {
                        let [.., dim] = expected.shape();
                        for (head, d) in (0..kv_heads).flat_map(|h| (0..dim).map(move |d| (h, d))) {
                            let (got, wanted) =
                                (stored.get([page, at, head, d]), expected.get([0, row, head, d]));
                            prop_assert_eq!(got.to_f32().to_bits(), wanted.to_f32().to_bits());
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Each sequence's rows attend to its keys in the store, all in one call; in rows also one by
    /// one.
    fn check_attention<Q: Element>(&self, layer: usize, group: usize) -> Result<(), TestCaseError> {
        let [_, _, kv_heads, head_dim] = self.store.shape();
        let [.., value_dim] = self.store.value_shape();
        let (backend, heads) = (self.backend, kv_heads * group);
        let lens: Vec<usize> = (0..self.open.len()).map(|i| 1 + i % 3).collect();
        let shape = [1, lens.iter().sum(), heads, head_dim];
        let query = Tensor::<Q>::normal("query", shape, &mut Rng::new(5));
        let mut batch = Batch::new(shape, self.store.shape()).unwrap().with_value_dim(value_dim).unwrap();
        let mut start = 0;
        for ((id, _), len) in self.open.iter().zip(&lens) {
            let keys = self.store.keys(*id).unwrap();
            batch.push(Sequence::new(0, start..start + len, keys, Mask::Causal)).unwrap();
            start += len;
        }
        let [key, value] = [self.store.key(backend, layer), self.store.value(backend, layer)];
        let (out, lse) = attend(backend, &batch, &query, [key.unwrap(), value.unwrap()]);

        let mut start = 0;
        for ((id, tokens), len) in self.open.iter().zip(&lens) {
            let config = AttentionConfig::new(Mask::Causal);
            let own = query.gather(start..start + len);
            let [key, value] = both::<T>(tokens, layer, self.store.config());
            let expected = Expected::of_call(&config, Call::new(&own, &key, &value), false);
            let row = heads * value_dim;
            expected.check_out(out[start * row..(start + len) * row].iter().copied())?;
            let own_lse = (0..heads).flat_map(|head| &lse[head * shape[1] + start..][..*len]);
            expected.check_lse(&own_lse.copied().collect::<Vec<f32>>())?;
            start += len;

            if matches!(self.store.config().room, KvRoom::Rows { .. }) {
                let shape = extents([1, *len, tokens.len()], [heads, kv_heads], [head_dim, value_dim]);
                let batch = Batch::uniform(&shape, &Mask::Causal).unwrap();
                let rows = self.store.rows(backend, layer, *id).unwrap();
                let (out, lse) = attend(backend, &batch, &own, rows);
                expected.check_out(out.into_iter())?;
                expected.check_lse(&lse)?;
            }
        }
        Ok(())
    }
}

fn attend<B: Backend, Q: Element, T: Element>(
    backend: &B,
    batch: &Batch,
    query: &Tensor<Q>,
    [key, value]: [B::View<'_, T>; 2],
) -> (Vec<f32>, Vec<f32>) {
    let mut plan = backend.plan_for(&PlanConfig::new(), batch).unwrap();
    let mut workspace = backend.buffer(backend.workspace_bytes(&plan)).unwrap();
    let stored = Stored::of(backend, query);
    let mut out = backend.buffer_of(&vec![RUBBISH; batch.out_shape().iter().product()]).unwrap();
    let mut lse = backend.buffer_of(&vec![RUBBISH; batch.lse_len()]).unwrap();
    backend
        .attend(
            &mut plan,
            Inputs::new(stored.view(backend, "query"), key, value),
            backend.whole_mut("out", &mut out, batch.out_shape()).unwrap(),
            Some(backend.slice_mut(&mut lse, ..)),
            backend.slice_mut(&mut workspace, ..),
        )
        .unwrap();
    (backend.read(&out).unwrap(), backend.read(&lse).unwrap())
}

fn sequences_hold_their_tokens<B: Backend, Q: Element, T: Element>(
    backend: &B,
    history: &History,
) -> Result<(), TestCaseError> {
    let History { config, group, events, seed } = history;
    let store = KvStore::<B, T>::new(backend, *config).unwrap();
    let mut kept = Kept { backend, store, open: Vec::new(), rng: Rng::new(*seed) };
    for event in events {
        kept.happens(event);
        kept.check()?;
    }
    kept.check_attention::<Q>(config.layers - 1, *group)?;
    kept.open.iter().for_each(|(id, _)| kept.store.close(*id).unwrap());
    prop_assert_eq!(kept.store.free_pages(), kept.store.shape()[0], "a page was lost");
    Ok(())
}

fn small_dims() -> impl Strategy<Value = (usize, usize)> {
    prop_oneof![2 => (1..40usize).prop_map(|dim| (dim, dim)), 1 => (1..40usize, 1..40usize)]
}

/// Those of kernels.
fn kernel_dims() -> impl Strategy<Value = (usize, usize)> {
    prop::sample::select(vec![(64usize, 64usize), (96, 96), (64, 32)])
}

proptest! {
    #[test]
    fn on_the_cpu(history in histories(small_dims()), dtype in 0..4usize) {
        match dtype {
            3 => sequences_hold_their_tokens::<_, f32, F8E4M3>(&Cpu::new(), &history)?,
            0 => sequences_hold_their_tokens::<_, f32, f32>(&Cpu::new(), &history)?,
            1 => sequences_hold_their_tokens::<_, f16, f16>(&Cpu::new(), &history)?,
            _ => sequences_hold_their_tokens::<_, bf16, bf16>(&Cpu::new(), &history)?,
        }
    }
}

proptest! {
    // A history on the emulator takes some ten milliseconds.
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases.div_ceil(4), ..Default::default() })]

    #[test]
    fn on_the_emulator(history in histories(kernel_dims()), bf in any::<bool>()) {
        let backend = Cuda::new(Simt::new(history.seed), ());
        match bf {
            true => sequences_hold_their_tokens::<_, bf16, bf16>(&backend, &history)?,
            false => sequences_hold_their_tokens::<_, f16, f16>(&backend, &history)?,
        }
    }
}
