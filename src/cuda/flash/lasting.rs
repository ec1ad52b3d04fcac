//! Plans that last: their tables lie in device memory of their own, and change while an engine
//! keeps them.

use super::call::{Call, Tables};
use super::room::{LaunchRoom, Room};
use super::tiles::KernelTiles;
use super::{DeviceInputs, Plan};
use crate::cuda::device::{ALIGNMENT, Device, DeviceTensorMut, SpanMut, bytes_of, check_not_capturing};
use crate::cuda::merge::merge_kernel;
use crate::cuda::params::{StarMergedRow, StarTile};
use crate::cuda::{Properties, Staging};
use crate::{Batch, Capacity, DType, Element, Error, PlanConfig, Result};
use std::ops::Range;

/// Updates that may be under way at a time: an engine prepares a step or two ahead of the device.
const UPDATES: usize = 4;

/// The schedule of a batch in a device's memory, for calls on one stream.
///
/// One that is made for a [`Capacity`] takes any batch within it, by [`update`](Self::update).
/// While a stream is captured, calls ask for as many blocks as the capacity may need; those without
/// work return at once. So a captured graph stays valid: what it attends to is the batch of the
/// last update before it is replayed.
///
/// A mask may give each token a tile of its own, so a captured call asks for a block for each token
/// of the capacity and head (or KV head, where its query heads share a tile): graphs are for steps
/// of few rows.
///
/// A graph holds addresses of the plan's tables, as of the workspace and the tensors of the call:
/// keep them all as long as it may be replayed, and replay it on the plan's stream, in whose order
/// updates change the tables.
#[derive(Debug)]
pub struct DevicePlan<D: Device> {
    config: PlanConfig,
    properties: Properties,
    /// None for one batch alone.
    capacity: Option<Capacity>,
    /// The schedule of the batch.
    plan: Plan,
    room: Room,
    tables: D::Memory,
    stream: [u64; 2],
    staging: Option<Staging<D>>,
    /// How far each launch's part of the tiles, and the list of rows to merge, are filled.
    filled: Vec<usize>,
    filled_merged: usize,
    /// An update failed while it copied, so the tables may be of no batch.
    torn: bool,
}

impl<D: Device> DevicePlan<D> {
    /// A plan for one batch, for calls on one stream.
    ///
    /// # Errors
    /// As [`Plan::for_batch`]; [`Error::Value`] if the stream is being captured in a graph; errors
    /// of the driver.
    pub fn for_batch(device: &D, stream: &D::Stream, config: &PlanConfig, batch: &Batch) -> Result<Self> {
        let properties = device.properties();
        let plan = Plan::for_batch(&properties, config, batch)?;
        check_not_capturing::<D>(stream)?;
        let room = Room::of(&plan);
        let tables = device.allocate(stream, room.places().end)?;
        let parts = std::iter::once((0, bytes_of(&plan.tiles))).chain(plan.tables(&room.places()));
        for (at, bytes) in parts.filter(|(_, bytes)| !bytes.is_empty()) {
            // SAFETY: inside the tables, which nobody else has.
            unsafe { device.upload(stream, D::address(&tables) + at as u64, bytes)? };
        }
        Ok(Self::new(config, properties, None, plan, room, tables, stream, None))
    }

    /// A plan for any batch within a capacity, for calls on one stream. It has no sequence until
    /// the first update.
    ///
    /// # Errors
    /// [`Error::Value`] or [`Error::Shape`] for what is out of range or has no kernels, or a stream
    /// that is being captured in a graph; errors of the driver.
    pub fn with_capacity(
        device: &D,
        stream: &D::Stream,
        config: &PlanConfig,
        capacity: &Capacity,
    ) -> Result<Self> {
        let properties = device.properties();
        let batch = capacity.empty_batch()?;
        config.validate()?;
        let room = Room::for_capacity(&properties, config, capacity)?;
        let plan = Plan::within(&properties, config, &batch, &room)?;
        check_not_capturing::<D>(stream)?;
        load_kernels(device, &room)?;
        let bytes = room.places().end;
        let tables = device.allocate(stream, bytes)?;
        let staging = Staging::new(device, UPDATES, bytes)?;
        let capacity = Some(capacity.clone());
        Ok(Self::new(config, properties, capacity, plan, room, tables, stream, Some(staging)))
    }

    #[allow(clippy::too_many_arguments)]
    fn new(
        config: &PlanConfig,
        properties: Properties,
        capacity: Option<Capacity>,
        plan: Plan,
        room: Room,
        tables: D::Memory,
        stream: &D::Stream,
        staging: Option<Staging<D>>,
    ) -> Self {
        let filled = vec![0; room.launches.len()];
        let stream = D::stream_id(stream);
        Self {
            config: *config,
            properties,
            capacity,
            plan,
            room,
            tables,
            stream,
            staging,
            filled,
            filled_merged: 0,
            torn: false,
        }
    }

    /// Sets the batch of the calls that follow on the stream, and of graphs that are replayed on
    /// it.
    ///
    /// # Errors
    /// As [`Capacity::check`]; [`Error::Value`] for a plan of one batch, for another stream than
    /// the plan's, and for one that is being captured in a graph; [`Error::Busy`] while too many
    /// updates are under way: try again after the stream has moved on. The plan is as it was.
    /// Errors of the driver, after which calls are refused, and graphs must not be replayed, until
    /// an update succeeds.
    pub fn update(&mut self, device: &D, stream: &D::Stream, batch: &Batch) -> Result<()> {
        let (Some(capacity), Some(staging)) = (&self.capacity, &mut self.staging) else {
            return Err(Error::value("plan", "one that was made for a capacity", "one for a batch"));
        };
        check_stream::<D>(self.stream, stream)?;
        capacity.check(batch)?;
        let plan = Plan::within(&self.properties, &self.config, batch, &self.room)?;
        let places = self.room.places();
        let mut filled = vec![0; self.room.launches.len()];
        let mut tables = Vec::new();
        for (index, LaunchRoom { launch, .. }) in self.room.launches.iter().enumerate() {
            let own = plan.tiles_of_kernel(launch.policy.kernel);
            filled[index] = own.len();
            let tiles = with_surplus(own, self.filled[index], StarTile::default());
            tables.push((launch.tiles.start * size_of::<StarTile>(), tiles));
        }
        let merged = with_surplus(&plan.merged, self.filled_merged, StarMergedRow::default());
        let mut parts: Vec<(usize, &[u8])> =
            tables.iter().map(|(at, tiles)| (*at, bytes_of(tiles))).collect();
        parts.push((places.pages, bytes_of(&plan.pages)));
        parts.push((places.ranges, bytes_of(&plan.ranges)));
        parts.push((places.merged, bytes_of(&merged)));
        let mut to = SpanMut::on(D::address(&self.tables), places.end, self.stream);
        match staging.copy(device, stream, &mut to, &parts) {
            Ok(()) => {
                (self.filled, self.filled_merged, self.plan) = (filled, plan.merged.len(), plan);
                self.torn = false;
                Ok(())
            }
            // Nothing was copied.
            Err(error @ (Error::Busy { .. } | Error::Value { .. })) => Err(error),
            Err(error) => {
                // The next update has to clear what either batch may have left.
                self.filled.iter_mut().zip(filled).for_each(|(old, new)| *old = new.max(*old));
                self.filled_merged = self.filled_merged.max(plan.merged.len());
                self.torn = true;
                Err(error)
            }
        }
    }

    /// Bytes of the workspace that a call needs, for partial results; 0 if there are none. It
    /// follows from the capacity alone, and one workspace serves any number of plans whose calls
    /// are on one stream.
    pub fn workspace_bytes(&self) -> usize {
        self.room.partials_bytes()
    }

    /// The schedule of the batch.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Attention of the inputs, of the batch's shapes, into `out` as the query, of its type or f32,
    /// and, if given, `lse` `[batch, query_heads, seq]`: natural logarithm, -inf where a row sees
    /// no key. Rows of no sequence are neither read nor written. Queries are f16 or bf16; keys and
    /// values are of the same type, or [`F8E4M3`](crate::F8E4M3) with head dims that are multiples
    /// of 16, at most 256. A prefix may be left out where no sequence has one and the stream
    /// is not being captured. Sinks count in every row
    /// ([`Inputs::with_sinks`](crate::Inputs::with_sinks)); that none is NaN or `+inf` is the
    /// caller's promise, as it is that scales are finite and above 0.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Stride`] for tensors that are not the plan's (last axes
    /// contiguous, the others at multiples of 16 bytes), [`Error::Value`] for a prefix that is
    /// missing, addresses that are no multiples of 16 bytes, memory or a plan of another stream, or
    /// a plan whose last update failed while it copied, [`Error::DType`] for other element types,
    /// [`Error::Workspace`] for one that is smaller than
    /// [`workspace_bytes`](Self::workspace_bytes); errors of the driver. Nothing was written then.
    pub fn run<Q: Element, T: Element, O: Element>(
        &mut self,
        device: &D,
        stream: &D::Stream,
        inputs: DeviceInputs<'_, '_, '_, '_, D, Q, T>,
        out: &mut DeviceTensorMut<'_, D, O>,
        lse: Option<&mut SpanMut<'_, D, f32>>,
        workspace: &mut SpanMut<'_, D, u8>,
    ) -> Result<()> {
        check_stream::<D>(self.stream, stream)?;
        if self.torn {
            let expected = "one whose last update did not fail while it copied";
            return Err(Error::value("plan", expected, "one that needs an update"));
        }
        if workspace.len < self.workspace_bytes() {
            return Err(Error::Workspace { expected: self.workspace_bytes(), got: workspace.len });
        }
        workspace.check("workspace", 0)?;
        workspace.check_stream("workspace", stream)?;
        let captured = D::is_capturing(stream)?;
        let launches: Vec<KernelTiles> = match captured {
            true => self.room.launches.iter().map(|room| room.launch.clone()).collect(),
            false => self.launches(),
        };
        let paged = match &self.capacity {
            Some(capacity) => capacity.pages > 0 && capacity.key[1] > 0,
            None => !self.plan.pages.is_empty(),
        };
        let may_have_prefix = captured && self.capacity.as_ref().is_some_and(|c| !c.prefix.contains(&0));
        let tables = D::address(&self.tables);
        let call = Call {
            plan: &self.plan,
            device,
            stream,
            launches: &launches,
            merged: if captured { self.room.merged } else { self.plan.merged.len() },
            needs_prefix: self.plan.has_prefix || may_have_prefix,
            tables: Tables::new(&self.room, tables, workspace.address, paged),
        };
        call.run(inputs, out, lse)
    }

    /// The launches of the batch, with their tiles where the room has them.
    fn launches(&self) -> Vec<KernelTiles> {
        let of_room = |room: &LaunchRoom| {
            let count = self.plan.tiles_of_kernel(room.launch.policy.kernel).len();
            let Range { start, .. } = room.launch.tiles;
            KernelTiles { tiles: start..start + count, ..room.launch.clone() }
        };
        self.room.launches.iter().map(of_room).collect()
    }
}

/// Loads all kernels that a plan may launch, so that its first call can be captured.
fn load_kernels<D: Device>(device: &D, room: &Room) -> Result<()> {
    for dtype in [DType::F16, DType::BF16] {
        for LaunchRoom { launch, .. } in &room.launches {
            let policies = [Some(launch.policy), launch.policy.e4m3()];
            policies.into_iter().flatten().try_for_each(|policy| device.load(&policy.entry(dtype)))?;
        }
    }
    [DType::F32, DType::F16, DType::BF16]
        .into_iter()
        .try_for_each(|to| device.load(&merge_kernel(DType::F32, to, true)))
}

/// A table's entries, and empty ones in the place of those that an earlier update has left.
fn with_surplus<T: Copy>(entries: &[T], filled: usize, empty: T) -> Vec<T> {
    let mut all = entries.to_vec();
    all.resize(entries.len().max(filled), empty);
    all
}

fn check_stream<D: Device>(own: [u64; 2], stream: &D::Stream) -> Result<()> {
    if own == D::stream_id(stream) {
        return Ok(());
    }
    Err(Error::value("stream", "the stream that the plan was made for", "another"))
}

// Tables begin at multiples of 16 bytes.
const _: () = assert!(size_of::<StarTile>().is_multiple_of(ALIGNMENT));
