//! The default backend (being written).

use crate::{AttentionConfig, AttentionShape, Element, Result, TensorView, TensorViewMut};

/// What a call computes on extents known beforehand; made once, it serves every layer.
#[derive(Clone, Debug)]
pub struct Plan {
    config: AttentionConfig,
    shape: AttentionShape,
}

impl Plan {
    /// A plan for a batch of sequences of one length.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) or [`Error::Shape`](crate::Error::Shape) for a config or extents out of range.
    pub fn new(config: &AttentionConfig, shape: &AttentionShape) -> Result<Self> {
        config.validate()?;
        shape.validate()?;
        Ok(Self { config: *config, shape: *shape })
    }

    /// A plan for packed sequences of different lengths: sequence `i` has query rows `query_offsets[i]..query_offsets[i + 1]` and
    /// keys `key_offsets[i]..key_offsets[i + 1]` of the seq axis; `shape.batch` is 1, `shape.query_len` and `shape.key_len` are the totals.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) or [`Error::Shape`](crate::Error::Shape) for a config, extents or offsets out of range.
    pub fn packed(
        config: &AttentionConfig,
        shape: &AttentionShape,
        query_offsets: &[usize],
        key_offsets: &[usize],
    ) -> Result<Self> {
        let _ = (query_offsets, key_offsets);
        Self::new(config, shape)
    }

    /// Elements of the workspace that [`run`](Self::run) needs.
    pub fn workspace_len(&self) -> usize {
        0
    }

    /// Attention of `query` over `key` and `value` into `out`, and the log-sum-exp `[batch, heads, seq]` into `lse`.
    /// `out` may be of another type than the inputs: f32 for partials that are to be merged.
    ///
    /// # Errors
    /// Shape, Stride, Workspace.
    pub fn run<T: Element, O: Element>(
        &self,
        query: TensorView<'_, T>,
        key: TensorView<'_, T>,
        value: TensorView<'_, T>,
        mut out: TensorViewMut<'_, O>,
        lse: Option<&mut [f32]>,
        workspace: &mut [f32],
    ) -> Result<()> {
        let _ = workspace;
        self.shape.check(&query, &key, &value)?;
        self.shape.check_output(out.shape(), out.strides(), lse.as_deref())?;
        let r = super::reference::attention(&self.config, query, key, value)?;
        let [b, t, h, d] = self.shape.query_shape();
        for i in 0..r.out.len() {
            out.set([i / d / h / t % b, i / d / h % t, i / d % h, i % d], O::from_f32(r.out[i] as f32));
        }
        if let Some(lse) = lse {
            for (to, from) in lse.iter_mut().zip(&r.lse) {
                *to = *from as f32;
            }
        }
        Ok(())
    }
}

/// One call of a plan made for it, with a workspace allocated for it.
///
/// # Errors
/// As [`Plan::new`] and [`Plan::run`].
pub fn attention<T: Element, O: Element>(
    config: &AttentionConfig,
    query: TensorView<'_, T>,
    key: TensorView<'_, T>,
    value: TensorView<'_, T>,
    out: TensorViewMut<'_, O>,
    lse: Option<&mut [f32]>,
) -> Result<()> {
    let plan = Plan::new(config, &AttentionShape::of(&query, &key, &value)?)?;
    let mut workspace = vec![0.0; plan.workspace_len()];
    plan.run(query, key, value, out, lse, &mut workspace)
}
