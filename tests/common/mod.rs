//! What the integration tests share: seeded values, owned tensors of any strides, and running
//! examples.

#![allow(dead_code)] // every test binary takes what it needs

use proptest::prelude::*;
use star_attention::{AttentionShape, DType, Element, Error, Inputs, Scales, TensorView, TensorViewMut};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// SplitMix64: a case is its seed, so it shrinks and reproduces without its tensors.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// Uniform over (0, 1).
    pub fn uniform(&mut self) -> f32 {
        ((self.next() >> 41) as f32 + 0.5) / (1u64 << 23) as f32
    }

    /// Standard normal (Box-Muller).
    pub fn normal(&mut self) -> f32 {
        let radius = (-2.0 * self.uniform().ln()).sqrt();
        radius * (std::f32::consts::TAU * self.uniform()).cos()
    }
}

/// The extents of a call: sequences, query rows and keys; query heads and KV heads; head dim and
/// value dim.
pub const fn extents(
    [batch, query_len, key_len]: [usize; 3],
    [query_heads, kv_heads]: [usize; 2],
    [head_dim, value_dim]: [usize; 2],
) -> AttentionShape {
    AttentionShape { batch, query_len, key_len, query_heads, kv_heads, head_dim, value_dim }
}

/// Attention sinks of so many heads: of the size of scores, far above and far below them, and none.
pub fn sinks(heads: usize, seed: u64) -> Vec<f32> {
    let mut rng = Rng::new(!seed);
    let sink = |_| match rng.below(8) {
        0 => f32::NEG_INFINITY,
        1 => [1e4, 1e30][rng.below(2)],
        2 => [-1e4, -1e30][rng.below(2)],
        _ => 3.0 * rng.normal(),
    };
    (0..heads).map(sink).collect()
}

/// Scales of keys and values, where these are fp8: one for all heads or one for each, from 1e-3
/// to 1e3; none now and then.
pub fn scales<K: Element>(kv_heads: usize, seed: u64) -> Option<Scales<Vec<f32>>> {
    if K::DTYPE != DType::F8E4M3 {
        return None;
    }
    let mut rng = Rng::new(seed.rotate_left(32));
    let mut draw = || {
        let count = if rng.below(2) == 0 { 1 } else { kv_heads };
        (0..count).map(|_| 10f32.powf(6.0 * rng.uniform() - 3.0)).collect()
    };
    let scales = Scales::new(draw(), draw());
    (rng.below(4) > 0).then_some(scales)
}

/// The scale of a head, of one for all or one for each.
pub fn scale_of(scales: &[f32], kv_head: usize) -> f32 {
    scales[if scales.len() == 1 { 0 } else { kv_head }]
}

/// Scales as a call takes them.
pub fn as_slices(scales: &Option<Scales<Vec<f32>>>) -> Option<Scales<&[f32]>> {
    scales.as_ref().map(|scales| Scales::new(&scales.key[..], &scales.value[..]))
}

/// How a tensor lies in its buffer; the last axis is contiguous.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The axes batch (0), seq (1) and heads (2), outermost first.
    pub order: [usize; 3],
    /// Elements left free after each step of those axes.
    pub padding: [usize; 3],
    /// Elements before the first one.
    pub offset: usize,
}

impl Layout {
    /// `[batch, seq, heads, dim]`, row-major.
    pub const CONTIGUOUS: Self = Self { order: [0, 1, 2], padding: [0; 3], offset: 0 };
}

/// Half of them contiguous or `[batch, heads, seq, dim]`, the others any order with any padding.
pub fn layouts() -> impl Strategy<Value = Layout> {
    let order = Just([0, 1, 2]).prop_shuffle();
    let padded = (order, [0..5usize, 0..40usize, 0..70usize], 0..20usize)
        .prop_map(|(order, padding, offset)| Layout { order, padding, offset });
    prop_oneof![
        1 => Just(Layout::CONTIGUOUS),
        1 => Just(Layout { order: [0, 2, 1], ..Layout::CONTIGUOUS }),
        2 => padded,
    ]
}

/// Rows at multiples of 16 bytes.
pub fn aligned(layout: &Layout) -> Layout {
    Layout { order: layout.order, padding: layout.padding.map(|p| p / 4 * 8), offset: layout.offset / 4 * 8 }
}

/// An owned tensor `[batch, seq, heads, dim]`. The buffer ends with its last element.
#[derive(Clone, Debug)]
pub struct Tensor<T> {
    name: &'static str,
    buffer: Vec<T>,
    shape: [usize; 4],
    strides: [usize; 4],
    offset: usize,
}

impl<T: Element> Tensor<T> {
    /// The elements are drawn from `value` in row-major order; everything between them is
    /// `padding`.
    pub fn new(
        name: &'static str,
        shape: [usize; 4],
        layout: &Layout,
        padding: f32,
        mut value: impl FnMut([usize; 4]) -> f32,
    ) -> Self {
        let mut strides = [0, 0, 0, 1];
        let mut span = shape[3].max(1);
        for (&axis, padding) in layout.order.iter().zip(layout.padding).rev() {
            strides[axis] = span + padding;
            span = strides[axis] * shape[axis].max(1);
        }
        let last: usize = (0..4).map(|axis| shape[axis].saturating_sub(1) * strides[axis]).sum();
        let elements = if shape.contains(&0) { 0 } else { last + 1 };
        let buffer = vec![T::from_f32(padding); layout.offset + elements];
        let mut tensor = Self { name, buffer, shape, strides, offset: layout.offset };
        for index in indices(shape) {
            tensor.set(index, T::from_f32(value(index)));
        }
        tensor
    }

    /// A row-major tensor.
    pub fn contiguous(name: &'static str, shape: [usize; 4], value: impl FnMut([usize; 4]) -> f32) -> Self {
        Self::new(name, shape, &Layout::CONTIGUOUS, 0.0, value)
    }

    /// A row-major tensor of standard normal values.
    pub fn normal(name: &'static str, shape: [usize; 4], rng: &mut Rng) -> Self {
        Self::contiguous(name, shape, |_| rng.normal())
    }

    /// A row-major copy.
    pub fn of(view: TensorView<'_, T>) -> Self {
        let strides = view.strides();
        Self::contiguous("copy", view.shape(), |index| {
            view.data()[index.iter().zip(strides).map(|(i, stride)| i * stride).sum::<usize>()].to_f32()
        })
    }

    /// The rows `seqs` of this tensor, copied one after another.
    pub fn gather(&self, seqs: impl IntoIterator<Item = usize>) -> Self {
        let seqs: Vec<usize> = seqs.into_iter().collect();
        let [batch, _, heads, dim] = self.shape;
        Self::contiguous(self.name, [batch, seqs.len(), heads, dim], |[b, seq, head, d]| {
            self.get([b, seqs[seq], head, d]).to_f32()
        })
    }

    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    pub fn strides(&self) -> [usize; 4] {
        self.strides
    }

    /// Elements of the buffer before the first one.
    pub fn offset(&self) -> usize {
        self.offset
    }

    pub fn buffer(&self) -> &[T] {
        &self.buffer
    }

    pub fn buffer_mut(&mut self) -> &mut [T] {
        &mut self.buffer
    }

    fn at(&self, index: [usize; 4]) -> usize {
        self.offset + (0..4).map(|axis| index[axis] * self.strides[axis]).sum::<usize>()
    }

    pub fn get(&self, index: [usize; 4]) -> T {
        self.buffer[self.at(index)]
    }

    pub fn set(&mut self, index: [usize; 4], value: T) {
        let at = self.at(index);
        self.buffer[at] = value;
    }

    pub fn view(&self) -> TensorView<'_, T> {
        TensorView::new(self.name, &self.buffer[self.offset..], self.shape, self.strides).unwrap()
    }

    pub fn view_mut(&mut self) -> TensorViewMut<'_, T> {
        TensorViewMut::new(self.name, &mut self.buffer[self.offset..], self.shape, self.strides).unwrap()
    }

    /// The elements in row-major order.
    pub fn values(&self) -> impl Iterator<Item = f32> + '_ {
        indices(self.shape).map(|index| self.get(index).to_f32())
    }

    /// The bits of the elements, in row-major order.
    pub fn bits(&self) -> Vec<u32> {
        self.values().map(f32::to_bits).collect()
    }

    /// Whether everything between the elements still is what it was made with.
    pub fn padding_is(&self, padding: f32) -> bool {
        let mut rest = vec![true; self.buffer.len()];
        for index in indices(self.shape) {
            rest[self.at(index)] = false;
        }
        let padding = T::from_f32(padding).to_f32().to_bits();
        rest.iter().zip(&self.buffer).all(|(&rest, x)| !rest || x.to_f32().to_bits() == padding)
    }
}

/// What a call takes, on tensors in CPU memory.
pub type Call<'a, Q, K> = Inputs<&'a Tensor<Q>, &'a Tensor<K>, &'a [f32]>;

/// The same as a plan of the CPU takes it.
pub fn views<'a, Q: Element, K: Element>(
    call: Call<'a, Q, K>,
) -> Inputs<TensorView<'a, Q>, TensorView<'a, K>, &'a [f32]> {
    let mut views = Inputs::new(call.query.view(), call.key.view(), call.value.view());
    views.prefix = call.prefix.map(|prefix| prefix.map(Tensor::view));
    (views.sinks, views.scales) = (call.sinks, call.scales);
    views
}

/// The indices of a shape in row-major order.
pub fn indices(shape: [usize; 4]) -> impl Iterator<Item = [usize; 4]> {
    let [batch, seq, heads, dim] = shape;
    (0..batch).flat_map(move |b| {
        (0..seq).flat_map(move |s| (0..heads).flat_map(move |h| (0..dim).map(move |d| [b, s, h, d])))
    })
}

/// A folder of its own for each test, removed with it.
pub struct Folder(PathBuf);

impl Folder {
    /// `test` is a name that no other test takes.
    pub fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("{test}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The names of all that is in it, sorted.
    pub fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.0).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A command that runs an example: cargo puts them beside the folder of the test binaries.
pub fn example(name: &str) -> Command {
    let test = std::env::current_exe().unwrap();
    let example = test.parent().unwrap().parent().unwrap().join("examples").join(name);
    Command::new(example.with_extension(std::env::consts::EXE_EXTENSION))
}

/// Exit code 2 and one line that holds `message`.
pub fn assert_refused(output: &Output, message: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.contains(message), "{stderr:?} does not name {message:?}");
    assert!(output.stdout.is_empty());
}

/// The index of the sequence that an error names, and what is wrong with it, as [`named`].
pub fn of_sequence(error: Error) -> (usize, &'static str, &'static str) {
    let Error::Sequence { index, source } = error else { panic!("{error}") };
    let (kind, argument) = named(*source);
    (index, kind, argument)
}

/// The kind of an error and the argument that it names.
pub fn named(error: Error) -> (&'static str, &'static str) {
    let (kind, argument) = match &error {
        Error::Shape { argument, .. } => ("shape", *argument),
        Error::Stride { argument, .. } => ("stride", *argument),
        Error::DType { argument, .. } => ("dtype", *argument),
        Error::Value { argument, .. } => ("value", *argument),
        Error::Workspace { .. } => ("workspace", "workspace"),
        _ => ("other", ""),
    };
    assert!(error.to_string().starts_with(argument), "{error}");
    assert!(!error.to_string().contains('\n'), "{error}");
    (kind, argument)
}
