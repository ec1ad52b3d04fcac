//! The handshake: do all ranks run the same thing?

use super::{AnchorKv, Collective, Link};
use crate::{AttentionShape, DType, Error, Result, StarLayout};

/// What all ranks must have in common before they exchange partials.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Agreement {
    /// The partition of the context.
    pub layout: StarLayout,
    /// Heads and dims of a layer. Lengths are not compared: ranks have shares of their own.
    pub shape: AttentionShape,
    /// Layers of the model.
    pub layers: usize,
    /// Element type of queries, keys and values.
    pub dtype: DType,
    /// How ranks come by the anchor.
    pub anchor: AnchorKv,
    /// Anything else that must be the same: a hash of the weights, say.
    pub model: u64,
}

/// Names and values, in the order of the message.
type Fields = [(&'static str, u64); 20];

impl Agreement {
    fn fields(&self, ranks: usize, link: Link) -> Fields {
        let number = |text: &str| text.parse().unwrap_or(u64::MAX);
        [
            // "star" in ASCII, as a little-endian number: a peer that says something else speaks
            // another language or byte order.
            ("protocol", 0x7261_7473),
            ("major version", number(env!("CARGO_PKG_VERSION_MAJOR"))),
            ("minor version", number(env!("CARGO_PKG_VERSION_MINOR"))),
            ("ranks", ranks as u64),
            ("context_len", self.layout.context_len() as u64),
            ("block_len", self.layout.block_len() as u64),
            ("anchor_len", self.layout.anchor_len() as u64),
            ("batch", self.shape.batch as u64),
            ("query_heads", self.shape.query_heads as u64),
            ("kv_heads", self.shape.kv_heads as u64),
            ("head_dim", self.shape.head_dim as u64),
            ("value_dim", self.shape.value_dim as u64),
            ("layers", self.layers as u64),
            ("dtype", self.dtype as u64),
            ("anchor", self.anchor as u64),
            ("query_rank", self.layout.query_rank() as u64),
            ("generated", self.layout.generated() as u64),
            ("model", self.model),
            ("latency", link.latency.to_bits()),
            ("bandwidth", link.bandwidth.to_bits()),
        ]
    }
}

/// Tells the other ranks what this one runs, and compares: to be called before anything else.
///
/// # Errors
/// [`Error::Value`] if the layout is for another number of ranks (nothing was sent);
/// [`Error::Peer`] on every rank if any two differ, naming what differs; and the collective's
/// errors.
pub fn agree(group: &(impl Collective + ?Sized), agreement: &Agreement) -> Result<()> {
    if agreement.layout.ranks() != group.size() {
        return Err(Error::value("layout", format!("of {} ranks", group.size()), agreement.layout.ranks()));
    }
    let fields = agreement.fields(group.size(), group.link());
    let mine = fields.map(|(_, value)| value.to_le_bytes()).concat();
    let mut all = vec![0; group.size() * mine.len()];
    group.all_gather(&mine, &mut all)?;
    for (rank, theirs) in all.chunks_exact(mine.len()).enumerate() {
        for ((argument, expected), got) in fields.iter().zip(theirs.chunks_exact(8)) {
            if got != expected.to_le_bytes() {
                let got = got.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte));
                let [expected, got] = [*expected, got].map(|value| show(argument, value));
                return Err(Error::Peer { rank, argument, expected, got });
            }
        }
    }
    Ok(())
}

/// A field's value as it was before it became a number.
fn show(argument: &str, value: u64) -> String {
    let one_of = |names: &[&str]| match usize::try_from(value).ok().and_then(|at| names.get(at)) {
        Some(name) => (*name).to_owned(),
        None => format!("number {value}"),
    };
    match argument {
        "dtype" => one_of(&["f32", "f16", "bf16", "f8e4m3"]),
        "anchor" => one_of(&["encoded", "received"]),
        "generated" => one_of(&["on the query rank", "round robin"]),
        "latency" | "bandwidth" => f64::from_bits(value).to_string(),
        _ => value.to_string(),
    }
}
