//! What a step of phase 2 does to a sequence of a store.

use super::{KvStore, SequenceId};
use crate::{Backend, Element, Error, LEFT_OUT, Result, StepLayout};

/// The places of a step's rows in a sequence's store: the same in all layers, until the sequence is
/// extended, truncated or shared, or the store grows.
///
/// An engine with several sequences writes their places one behind the other.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StepRows {
    /// Keys that the sequence held before the step.
    pub held: usize,
    /// Keys that the step's rows attend to: those held, and the appended ones.
    pub attended: usize,
    /// Keys that the sequence holds after the step.
    pub kept: usize,
    /// For each token of the step its place before attention, or [`LEFT_OUT`].
    pub appended_places: Vec<u32>,
    /// For each token of the step its place afterwards, or [`LEFT_OUT`].
    pub kept_places: Vec<u32>,
}

impl<B: Backend, T: Element> KvStore<B, T> {
    /// Makes room for a step of phase 2, and finds the places of its rows. The sequence is the
    /// longer of what the step attends to and what it keeps, until it is truncated.
    ///
    /// ```
    /// # use star_attention::{KvConfig, KvStore, StarLayout, GeneratedKv, TensorView, Append, cpu::Cpu};
    /// # fn main() -> star_attention::Result<()> {
    /// let cpu = Cpu::new();
    /// let layout = StarLayout::builder(1000).ranks(2).generated(GeneratedKv::RoundRobin).build()?;
    /// let rank = layout.rank(1)?;
    /// let step = rank.step(0..4);
    /// let config = KvConfig::new(2, 64).with_layers(3).in_rows(1, rank.room(4, 4));
    /// let mut store = KvStore::<_, f32>::new(&cpu, config)?;
    /// let sequence = store.open()?;
    /// store.extend(&cpu, sequence, rank.own_tokens().len())?; // by phase 1
    /// # let new = [0f32; 4 * 2 * 64];
    ///
    /// let rows = store.begin_step(&cpu, sequence, &step)?;
    /// for layer in 0..3 {
    ///     // The keys and values of the step's 4 tokens, from the model.
    ///     let new = TensorView::contiguous("new", &new, [1, 4, 2, 64])?;
    ///     store.append(&cpu, layer, Append::new(new, new, &rows.appended_places))?;
    ///     let [key, value] = store.rows_of(&cpu, layer, sequence, rows.attended)?;
    ///     // ... attend to them under `step.mask()`, and merge ...
    ///     # let _ = (key, value);
    ///     if !step.keeps_appended() {
    ///         store.append(&cpu, layer, Append::new(new, new, &rows.kept_places))?;
    ///     }
    /// }
    /// store.truncate(sequence, rows.kept)?;
    /// assert_eq!(store.len(sequence)?, 502);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`extend`](Self::extend); the store is then as it was.
    pub fn begin_step(&mut self, backend: &B, id: SequenceId, step: &StepLayout) -> Result<StepRows> {
        let held = self.len(id)?;
        let (appended, kept) = (step.appended(), step.kept());
        let [appended_places, kept_places] = [left_out(step)?, left_out(step)?];
        self.extend(backend, id, appended.len().max(kept.len()))?;
        let mut rows = StepRows {
            held,
            attended: held + appended.len(),
            kept: held + kept.len(),
            appended_places,
            kept_places,
        };
        for (row, place) in appended.zip(self.places(id, held..rows.attended)?) {
            rows.appended_places[row] = place;
        }
        for (row, place) in kept.zip(self.places(id, held..rows.kept)?) {
            rows.kept_places[row] = place;
        }
        Ok(rows)
    }
}

/// A place for each token of a step, of which none is stored yet.
fn left_out(step: &StepLayout) -> Result<Vec<u32>> {
    let (mut places, len) = (Vec::new(), step.tokens().len());
    let reserved = places.try_reserve_exact(len);
    reserved.map_err(|_| Error::value("step", "a count of tokens that memory has room for", len))?;
    places.resize(len, LEFT_OUT);
    Ok(places)
}
