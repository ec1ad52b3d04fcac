//! A backend that is chosen at run time, as an engine would write one.

use star_attention::merge::PartialOf;
use star_attention::{
    Append, Backend, Batch, Capacity, Element, Error, Inputs, Plain, PlanConfig, Result, Rotation,
};
use std::ops::RangeBounds;

/// One of two: a backend, or what belongs to it.
#[derive(Debug)]
pub enum Either<A, B> {
    One(A),
    Other(B),
}

use Either::{One, Other};

impl<A, B> Either<A, B> {
    fn one(self) -> Result<A> {
        let Self::One(one) = self else { return Err(mixed()) };
        Ok(one)
    }

    fn other(self) -> Result<B> {
        let Self::Other(other) = self else { return Err(mixed()) };
        Ok(other)
    }

    fn as_ref(&self) -> Either<&A, &B> {
        match self {
            One(one) => One(one),
            Other(other) => Other(other),
        }
    }

    fn as_mut(&mut self) -> Either<&mut A, &mut B> {
        match self {
            One(one) => One(one),
            Other(other) => Other(other),
        }
    }
}

fn mixed() -> Error {
    Error::Unavailable { what: "the backend", reason: "memory of two backends in one call".into() }
}

/// Takes an option of either apart.
fn option<A, B, T>(
    option: Option<Either<A, B>>,
    take: impl Fn(Either<A, B>) -> Result<T>,
) -> Result<Option<T>> {
    option.map(take).transpose()
}

impl<A: Backend, B: Backend> Backend for Either<A, B> {
    type Buffer<T: Plain> = Either<A::Buffer<T>, B::Buffer<T>>;
    type Slice<'a, T: Plain>
        = Either<A::Slice<'a, T>, B::Slice<'a, T>>
    where
        Self: 'a;
    type SliceMut<'a, T: Plain>
        = Either<A::SliceMut<'a, T>, B::SliceMut<'a, T>>
    where
        Self: 'a;
    type View<'a, T: Element>
        = Either<A::View<'a, T>, B::View<'a, T>>
    where
        Self: 'a;
    type ViewMut<'a, T: Element>
        = Either<A::ViewMut<'a, T>, B::ViewMut<'a, T>>
    where
        Self: 'a;
    type Plan = Either<A::Plan, B::Plan>;

    fn buffer<T: Plain>(&self, len: usize) -> Result<Self::Buffer<T>> {
        Ok(match self {
            One(a) => One(a.buffer(len)?),
            Other(b) => Other(b.buffer(len)?),
        })
    }

    fn write<T: Plain>(&self, buffer: &mut Self::Buffer<T>, at: usize, data: &[T]) -> Result<()> {
        match self {
            One(a) => a.write(buffer.as_mut().one()?, at, data),
            Other(b) => b.write(buffer.as_mut().other()?, at, data),
        }
    }

    fn read<T: Plain>(&self, buffer: &Self::Buffer<T>) -> Result<Vec<T>> {
        match self {
            One(a) => a.read(buffer.as_ref().one()?),
            Other(b) => b.read(buffer.as_ref().other()?),
        }
    }

    fn slice<'a, T: Plain>(
        &'a self,
        buffer: &'a Self::Buffer<T>,
        range: impl RangeBounds<usize>,
    ) -> Self::Slice<'a, T> {
        match (self, buffer) {
            (One(a), One(buffer)) => One(a.slice(buffer, range)),
            (Other(b), Other(buffer)) => Other(b.slice(buffer, range)),
            _ => panic!("{}", mixed()),
        }
    }

    fn slice_mut<'a, T: Plain>(
        &'a self,
        buffer: &'a mut Self::Buffer<T>,
        range: impl RangeBounds<usize>,
    ) -> Self::SliceMut<'a, T> {
        match (self, buffer) {
            (One(a), One(buffer)) => One(a.slice_mut(buffer, range)),
            (Other(b), Other(buffer)) => Other(b.slice_mut(buffer, range)),
            _ => panic!("{}", mixed()),
        }
    }

    fn view<'a, T: Element>(
        argument: &'static str,
        slice: Self::Slice<'a, T>,
        shape: [usize; 4],
        strides: [usize; 4],
    ) -> Result<Self::View<'a, T>>
    where
        Self: 'a,
    {
        Ok(match slice {
            One(slice) => One(A::view(argument, slice, shape, strides)?),
            Other(slice) => Other(B::view(argument, slice, shape, strides)?),
        })
    }

    fn view_mut<'a, T: Element>(
        argument: &'static str,
        slice: Self::SliceMut<'a, T>,
        shape: [usize; 4],
        strides: [usize; 4],
    ) -> Result<Self::ViewMut<'a, T>>
    where
        Self: 'a,
    {
        Ok(match slice {
            One(slice) => One(A::view_mut(argument, slice, shape, strides)?),
            Other(slice) => Other(B::view_mut(argument, slice, shape, strides)?),
        })
    }

    fn plan(&self, config: &PlanConfig, capacity: &Capacity) -> Result<Self::Plan> {
        Ok(match self {
            One(a) => One(a.plan(config, capacity)?),
            Other(b) => Other(b.plan(config, capacity)?),
        })
    }

    fn plan_for(&self, config: &PlanConfig, batch: &Batch) -> Result<Self::Plan> {
        Ok(match self {
            One(a) => One(a.plan_for(config, batch)?),
            Other(b) => Other(b.plan_for(config, batch)?),
        })
    }

    fn update(&self, plan: &mut Self::Plan, batch: &Batch) -> Result<()> {
        match self {
            One(a) => a.update(plan.as_mut().one()?, batch),
            Other(b) => b.update(plan.as_mut().other()?, batch),
        }
    }

    fn workspace_bytes(&self, plan: &Self::Plan) -> usize {
        match (self, plan) {
            (One(a), One(plan)) => a.workspace_bytes(plan),
            (Other(b), Other(plan)) => b.workspace_bytes(plan),
            _ => 0,
        }
    }

    fn attend<Q: Element, T: Element, O: Element>(
        &self,
        plan: &mut Self::Plan,
        inputs: Inputs<Self::View<'_, Q>, Self::View<'_, T>, Self::Slice<'_, f32>>,
        out: Self::ViewMut<'_, O>,
        lse: Option<Self::SliceMut<'_, f32>>,
        workspace: Self::SliceMut<'_, u8>,
    ) -> Result<()> {
        let Inputs { query, key, value, prefix, sinks, .. } = inputs;
        match self {
            One(a) => {
                let mut inputs = Inputs::new(query.one()?, key.one()?, value.one()?);
                if let Some([key, value]) = prefix {
                    inputs = inputs.with_prefix(key.one()?, value.one()?);
                }
                inputs.sinks = option(sinks, Either::one)?;
                let (plan, lse) = (plan.as_mut().one()?, option(lse, Either::one)?);
                a.attend(plan, inputs, out.one()?, lse, workspace.one()?)
            }
            Other(b) => {
                let mut inputs = Inputs::new(query.other()?, key.other()?, value.other()?);
                if let Some([key, value]) = prefix {
                    inputs = inputs.with_prefix(key.other()?, value.other()?);
                }
                inputs.sinks = option(sinks, Either::other)?;
                let (plan, lse) = (plan.as_mut().other()?, option(lse, Either::other)?);
                b.attend(plan, inputs, out.other()?, lse, workspace.other()?)
            }
        }
    }

    fn append<T: Element, C: Element>(
        &self,
        new: Append<Self::View<'_, T>, Self::Slice<'_, f32>, Self::Slice<'_, u32>>,
        cache_key: Self::ViewMut<'_, C>,
        cache_value: Self::ViewMut<'_, C>,
    ) -> Result<()> {
        let Append { key, value, places, rotation, .. } = new;
        match self {
            One(a) => {
                let mut new = Append::new(key.one()?, value.one()?, places.one()?);
                if let Some(Rotation { cos, sin, positions, rotated, interleaved }) = rotation {
                    let (cos, sin, positions) = (cos.one()?, sin.one()?, positions.one()?);
                    new = new.with_rotation(Rotation { cos, sin, positions, rotated, interleaved });
                }
                a.append(new, cache_key.one()?, cache_value.one()?)
            }
            Other(b) => {
                let mut new = Append::new(key.other()?, value.other()?, places.other()?);
                if let Some(Rotation { cos, sin, positions, rotated, interleaved }) = rotation {
                    let (cos, sin, positions) = (cos.other()?, sin.other()?, positions.other()?);
                    new = new.with_rotation(Rotation { cos, sin, positions, rotated, interleaved });
                }
                b.append(new, cache_key.other()?, cache_value.other()?)
            }
        }
    }

    fn merge<T: Element, O: Element>(
        &self,
        partials: Vec<PartialOf<Self::View<'_, T>, Self::Slice<'_, f32>>>,
        sinks: Option<Self::Slice<'_, f32>>,
        out: Self::ViewMut<'_, O>,
        lse: Option<Self::SliceMut<'_, f32>>,
    ) -> Result<()> {
        match self {
            One(a) => {
                let one = |part: PartialOf<_, Either<_, _>>| {
                    let out: Either<A::View<'_, T>, B::View<'_, T>> = part.out;
                    Ok(PartialOf { out: out.one()?, lse: part.lse.one()? })
                };
                let partials = partials.into_iter().map(one).collect::<Result<_>>()?;
                a.merge(partials, option(sinks, Either::one)?, out.one()?, option(lse, Either::one)?)
            }
            Other(b) => {
                let other = |part: PartialOf<_, Either<_, _>>| {
                    let out: Either<A::View<'_, T>, B::View<'_, T>> = part.out;
                    Ok(PartialOf { out: out.other()?, lse: part.lse.other()? })
                };
                let partials = partials.into_iter().map(other).collect::<Result<_>>()?;
                b.merge(partials, option(sinks, Either::other)?, out.other()?, option(lse, Either::other)?)
            }
        }
    }
}
