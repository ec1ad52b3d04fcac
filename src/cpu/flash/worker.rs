//! What a thread does: it takes pieces, and chooses the kernel of each.

use super::piece::{Operands, Piece};
use super::work::Place;
use super::workspace::Scratch;
use super::{Plan, few, tile};
use crate::simd::{Product, Simd, Task};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Gets a row's result: the piece and where its result goes, the row, out and lse.
pub(super) type Write<'a> = &'a (dyn Fn(&Piece<'_>, Place, usize, &[f32], f32) + Sync);

/// A thread that takes pieces until none is left.
pub(super) struct Worker<'a> {
    pub plan: &'a Plan,
    pub inputs: &'a Operands<'a>,
    /// The next piece.
    pub next: &'a AtomicUsize,
    pub scratch: Scratch<'a>,
    pub write: Write<'a>,
}

impl Task for Worker<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd, P: Product<S>>(mut self, simd: S, product: P) {
        let total = self.plan.work.pieces();
        let mut unit = product.unit();
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= total {
                return;
            }
            let (piece, place) = self.plan.work.piece(&self.plan.batch, index);
            let write = |head: usize, row: usize, out: &[f32], lse: f32| {
                (self.write)(&piece.of_head(head), place.of_head(head), row, out, lse);
            };
            if self.plan.work.is_few(&piece) {
                few::attend(simd, product, self.inputs, &piece, &mut self.scratch, write);
                continue;
            }
            let write = |row: usize, out: &[f32], lse: f32| write(0, row, out, lse);
            let kv_head = piece.kv_heads.start;
            if P::HAS_UNIT {
                let unit = unit.as_mut().expect("the product proves that there is one");
                let unit = tile::matrix::Unit::new(simd, unit, self.inputs, kv_head);
                tile::attend(unit, self.inputs, &piece, &mut self.scratch, write);
            } else {
                let vectors = tile::Vectors::new(simd, product, self.inputs, kv_head);
                tile::attend(vectors, self.inputs, &piece, &mut self.scratch, write);
            }
        }
    }
}
