//! What an attention call computes: mask, scale, softcap, and the extents it runs on.

use crate::{Element, Error, Mask, Result, TensorView};

/// What an attention call computes: `softmax(softcap(scale · q kᵀ) + mask) v`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AttentionConfig {
    /// Which keys a row sees.
    pub mask: Mask,
    /// Factor of the scores; `1/sqrt(head_dim)` if `None`. Finite and not negative.
    pub scale: Option<f32>,
    /// If `Some(c)`, scaled scores `s` become `c · tanh(s / c)`. Finite and positive.
    pub softcap: Option<f32>,
}

/// Of scores before tanh. Four times as much, as which the kernels take it, is finite.
const LARGEST_FACTOR: f32 = f32::MAX / 4.0;

impl AttentionConfig {
    /// The default scale and no softcap, under `mask`.
    pub fn new(mask: Mask) -> Self {
        Self { mask, ..Self::default() }
    }

    /// The factor of the scores for heads of `head_dim`.
    pub fn scale_for(&self, head_dim: usize) -> f32 {
        self.score().scale_for(head_dim)
    }

    /// What becomes of the scores, without the mask.
    pub fn score(&self) -> ScoreConfig {
        ScoreConfig { scale: self.scale, softcap: self.softcap }
    }

    /// # Errors
    /// [`Error::Value`] for a scale, softcap or star mask outside its range.
    pub fn validate(&self) -> Result<()> {
        self.score().validate()?;
        self.mask.validate()
    }
}

/// How scores are made: `softcap(scale · q kᵀ)`. Which of them count is each sequence's [`Mask`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct ScoreConfig {
    /// Factor of the scores; `1/sqrt(head_dim)` if `None`. Finite and not negative. Scores must be
    /// in f32's range: beyond it a row's results may be NaN.
    pub scale: Option<f32>,
    /// If `Some(c)`, scaled scores `s` become `c · tanh(s / c)`. Finite and positive.
    pub softcap: Option<f32>,
}

impl ScoreConfig {
    /// The default scale and no softcap.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same with another factor of the scores.
    #[must_use]
    pub fn with_scale(self, scale: f32) -> Self {
        Self { scale: Some(scale), ..self }
    }

    /// The same with a softcap.
    #[must_use]
    pub fn with_softcap(self, softcap: f32) -> Self {
        Self { softcap: Some(softcap), ..self }
    }

    /// The factor of the scores for heads of `head_dim`.
    pub fn scale_for(&self, head_dim: usize) -> f32 {
        self.scale.unwrap_or_else(|| 1.0 / (head_dim as f32).sqrt())
    }

    /// The factor of `q · k` for a scale, and, if there is a softcap, what tanh of the product is
    /// multiplied by: the scores in powers of 2.
    ///
    /// A cap so large that `scale / cap` falls below f32's normal range does nothing: tanh of such
    /// a number is the number itself. Below a cap so small that `scale / cap` overflows, all scores
    /// but 0 are at the cap; the factor is bounded, so that 0 stays 0.
    pub(crate) fn factors_for(&self, scale: f32) -> (f32, Option<f32>) {
        let log2_e = std::f32::consts::LOG2_E;
        match self.softcap {
            Some(cap) if scale / cap >= f32::MIN_POSITIVE && (cap * log2_e).is_finite() => {
                ((scale / cap).min(LARGEST_FACTOR), Some(cap * log2_e))
            }
            _ => (scale * log2_e, None),
        }
    }

    /// # Errors
    /// [`Error::Value`] for a scale or softcap outside its range.
    pub fn validate(&self) -> Result<()> {
        if let Some(scale) = self.scale
            && !(scale.is_finite() && scale >= 0.0)
        {
            return Err(Error::value("scale", "a finite number, not negative", scale));
        }
        if let Some(softcap) = self.softcap
            && !(softcap.is_finite() && softcap > 0.0)
        {
            return Err(Error::value("softcap", "a finite number above 0", softcap));
        }
        Ok(())
    }
}

/// How a plan computes attention: what becomes of the scores, and what is promised about bits.
///
/// By default the results of a row may differ in their last bits with what else is in the batch.
/// Both promises hold within one backend, instruction set, element type and head dim.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct PlanConfig {
    /// What becomes of the scores.
    pub score: ScoreConfig,
    /// If `Some(n)`, the keys of each row are split at multiples of `n`, rounded up to whole tiles
    /// of keys: the bits of a row depend neither on the rest of the batch, nor on the number of
    /// threads, nor on where keys lie. At least 1.
    pub split_keys: Option<usize>,
    /// Whether the bits of a row do not depend either on how many rows of its sequence are in the
    /// call, so that a causal row of a prefill equals its decode. Implies a fixed split length,
    /// [`ROW_INVARIANT_SPLIT_KEYS`] unless `split_keys` gives one. Decodes are slower.
    pub row_invariant: bool,
}

/// The split length of row-invariant plans, unless another is given: long enough that a merge
/// hardly counts, short enough that one long sequence fills a GPU.
pub const ROW_INVARIANT_SPLIT_KEYS: usize = 4096;

impl PlanConfig {
    /// Plain scores, and no promise about bits.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same with other scores.
    #[must_use]
    pub fn with_score(self, score: ScoreConfig) -> Self {
        Self { score, ..self }
    }

    /// The same with keys split at multiples of `split_keys`.
    #[must_use]
    pub fn with_split_keys(self, split_keys: usize) -> Self {
        Self { split_keys: Some(split_keys), ..self }
    }

    /// The same for bits that do not depend on the number of rows in a call.
    #[must_use]
    pub fn with_row_invariant(self) -> Self {
        Self { row_invariant: true, ..self }
    }

    /// The fixed split length, if there is one.
    pub fn fixed_split_keys(&self) -> Option<usize> {
        self.split_keys.or(self.row_invariant.then_some(ROW_INVARIANT_SPLIT_KEYS))
    }

    /// # Errors
    /// [`Error::Value`] for a scale, softcap or split length outside its range.
    pub fn validate(&self) -> Result<()> {
        self.score.validate()?;
        match self.split_keys {
            Some(0) => Err(Error::value("split_keys", "at least 1", 0)),
            _ => Ok(()),
        }
    }
}

impl From<ScoreConfig> for PlanConfig {
    fn from(score: ScoreConfig) -> Self {
        Self::new().with_score(score)
    }
}

/// The extents of an attention call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Sequences.
    pub batch: usize,
    /// Query rows of each sequence.
    pub query_len: usize,
    /// Keys of each sequence.
    pub key_len: usize,
    /// Heads of the queries: a multiple of `kv_heads`.
    pub query_heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Elements of one head of queries and keys.
    pub head_dim: usize,
    /// Elements of one head of values and outputs.
    pub value_dim: usize,
}

impl AttentionShape {
    /// The extents of queries `[batch, query_len, query_heads, head_dim]` against keys `[batch,
    /// key_len, kv_heads, head_dim]` and values `[batch, key_len, kv_heads, value_dim]`.
    ///
    /// # Errors
    /// [`Error::Shape`] if the three do not fit together.
    pub fn of<Q: Element, T: Element>(
        query: &TensorView<'_, Q>,
        key: &TensorView<'_, T>,
        value: &TensorView<'_, T>,
    ) -> Result<Self> {
        let [batch, query_len, query_heads, head_dim] = query.shape();
        let [_, key_len, kv_heads, _] = key.shape();
        let [.., value_dim] = value.shape();
        let shape = Self { batch, query_len, key_len, query_heads, kv_heads, head_dim, value_dim };
        shape.check(query, key, value)?;
        Ok(shape)
    }

    /// # Errors
    /// [`Error::Shape`] if heads, head_dim or value_dim are 0, the query heads are no multiple of
    /// the KV heads, or a tensor of these extents could not be addressed.
    pub fn validate(&self) -> Result<()> {
        check_heads(self.query_heads, self.kv_heads, self.head_dim)?;
        check_value_dim(self.value_dim)?;
        check_addressable("query", self.query_shape())?;
        check_addressable("out", self.out_shape())?;
        check_addressable("key", self.key_shape())?;
        check_addressable("value", self.value_shape())
    }

    /// Query heads that share a KV head; 0 without KV heads.
    pub fn group(&self) -> usize {
        self.query_heads.checked_div(self.kv_heads).unwrap_or(0)
    }

    /// The shape of queries.
    pub fn query_shape(&self) -> [usize; 4] {
        [self.batch, self.query_len, self.query_heads, self.head_dim]
    }

    /// The shape of outputs.
    pub fn out_shape(&self) -> [usize; 4] {
        [self.batch, self.query_len, self.query_heads, self.value_dim]
    }

    /// The shape of keys.
    pub fn key_shape(&self) -> [usize; 4] {
        [self.batch, self.key_len, self.kv_heads, self.head_dim]
    }

    /// The shape of values.
    pub fn value_shape(&self) -> [usize; 4] {
        [self.batch, self.key_len, self.kv_heads, self.value_dim]
    }

    /// Elements of the log-sum-exp, `[batch, query_heads, query_len]`.
    pub fn lse_len(&self) -> usize {
        self.batch.saturating_mul(self.query_heads).saturating_mul(self.query_len)
    }

    /// Refuses tensors that have not these extents, or whose last axis is not contiguous.
    pub(crate) fn check<Q: Element, T: Element>(
        &self,
        query: &TensorView<'_, Q>,
        key: &TensorView<'_, T>,
        value: &TensorView<'_, T>,
    ) -> Result<()> {
        self.validate()?;
        check_rows("query", self.query_shape(), query.shape(), query.strides())?;
        check_rows("key", self.key_shape(), key.shape(), key.strides())?;
        check_rows("value", self.value_shape(), value.shape(), value.strides())
    }
}

/// Refuses a log-sum-exp `[batch, heads, seq]` of another length than the queries have.
pub(crate) fn check_lse([batch, seq, heads, _]: [usize; 4], lse: Option<&[f32]>) -> Result<()> {
    match lse {
        Some(lse) if lse.len() != batch * heads * seq => {
            let expected = format!("{:?}", [batch, heads, seq]);
            Err(Error::shape("lse", expected, format!("{} elements", lse.len())))
        }
        _ => Ok(()),
    }
}

/// Refuses attention sinks that are not one for each head.
pub(crate) fn check_sink_count(heads: usize, got: usize) -> Result<()> {
    if got != heads {
        return Err(Error::shape("sinks", format!("[{heads}]"), format!("[{got}]")));
    }
    Ok(())
}

/// Refuses attention sinks that are not one number below `+inf` for each head.
pub(crate) fn check_sinks(heads: usize, sinks: Option<&[f32]>) -> Result<()> {
    let Some(sinks) = sinks else { return Ok(()) };
    check_sink_count(heads, sinks.len())?;
    match sinks.iter().position(|&sink| sink.is_nan() || sink == f32::INFINITY) {
        Some(head) => Err(Error::value("sinks", format!("a number below +inf for head {head}"), sinks[head])),
        None => Ok(()),
    }
}

/// Refuses heads that are 0 or do not fit together.
pub(crate) fn check_heads(query_heads: usize, kv_heads: usize, head_dim: usize) -> Result<()> {
    if head_dim == 0 {
        return Err(Error::shape("query", "head_dim of at least 1", "0"));
    }
    if kv_heads == 0 {
        return Err(Error::shape("key", "at least 1 head", "0"));
    }
    if query_heads == 0 || !query_heads.is_multiple_of(kv_heads) {
        let expected = format!("heads a multiple of the {kv_heads} KV heads");
        return Err(Error::shape("query", expected, query_heads.to_string()));
    }
    Ok(())
}

/// Refuses values without elements.
pub(crate) fn check_value_dim(value_dim: usize) -> Result<()> {
    if value_dim == 0 {
        return Err(Error::shape("value", "head_dim of at least 1", "0"));
    }
    Ok(())
}

/// Refuses a tensor of which no memory could hold all elements.
pub(crate) fn check_addressable(argument: &'static str, shape: [usize; 4]) -> Result<()> {
    // Empty axes count as one, so that products of any of the extents are in range.
    let bytes = shape.iter().try_fold(4usize, |n, &extent| n.checked_mul(extent.max(1)));
    if bytes.is_none_or(|bytes| isize::try_from(bytes).is_err()) {
        return Err(Error::shape(argument, "extents that can be addressed", format!("{shape:?}")));
    }
    Ok(())
}

/// Refuses a tensor that has not the expected shape, or whose last axis is not contiguous.
pub(crate) fn check_rows(
    argument: &'static str,
    expected: [usize; 4],
    shape: [usize; 4],
    strides: [usize; 4],
) -> Result<()> {
    if shape != expected {
        return Err(Error::shape(argument, format!("{expected:?}"), format!("{shape:?}")));
    }
    if shape[3] > 1 && strides[3] != 1 && !shape.contains(&0) {
        return Err(Error::stride(argument, "with the last axis contiguous", format!("{strides:?}")));
    }
    Ok(())
}
