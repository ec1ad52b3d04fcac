//! Tensor maps, and the copies of boxes that they describe (`cp.async.bulk.tensor`).

use super::clock::Access;
use super::global::Regions;
use super::shared::{SharedMemory, State};
use crate::{Error, Result};

/// How a tensor in device memory is cut into boxes, as `cuTensorMapEncodeTiled` is told: axes from
/// the contiguous one on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiling {
    /// Of the first element.
    pub address: u64,
    /// Bytes of an element.
    pub element_bytes: u32,
    /// Elements along each axis.
    pub extents: [u64; 4],
    /// Of the axes after the first, in bytes.
    pub strides: [u64; 3],
    /// Elements of a box along each axis.
    pub extents_of_box: [u32; 4],
    /// Whether rows of a box are swizzled over 128 bytes.
    pub swizzled: bool,
}

/// A [`Tiling`] as the emulator's kernels take it, where a GPU's take a `CUtensorMap`.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct TensorMap {
    magic: u64,
    address: u64,
    extents: [u64; 4],
    strides: [u64; 3],
    extents_of_box: [u32; 4],
    element_bytes: u32,
    swizzled: u32,
    padding: [u64; 4],
}

const _: () = assert!(size_of::<TensorMap>() == 128);
const MAGIC: u64 = u64::from_ne_bytes(*b"tiledmap");

/// What is copied at a time, and rows are swizzled by.
pub const CHUNK: usize = 16;
/// Rows of eight times eight chunks repeat the pattern of the swizzle.
const PATTERN: u32 = 1024;

/// The 128-byte swizzle, of an address in shared memory: bits 4 to 6 with bits 7 to 9.
pub fn swizzle(address: u32) -> u32 {
    address ^ (address >> 3 & 0x70)
}

impl Tiling {
    /// The map, if a GPU would take it.
    ///
    /// # Errors
    /// [`Error::Value`] for what is out of bounds or not aligned.
    pub fn encode(&self) -> Result<TensorMap> {
        let Self { address, element_bytes, extents, strides, extents_of_box, swizzled } = *self;
        let refuse = |argument, expected: &str, got: String| Err(Error::value(argument, expected, got));
        let inner = u64::from(extents_of_box[0]) * u64::from(element_bytes);
        if !address.is_multiple_of(CHUNK as u64) {
            return refuse("address", "a multiple of 16", address.to_string());
        }
        if !matches!(element_bytes, 1 | 2 | 4 | 8) {
            return refuse("element_bytes", "1, 2, 4 or 8", element_bytes.to_string());
        }
        if extents.iter().any(|&extent| extent == 0 || extent > 1 << 32) {
            return refuse("extents", "1 to 2^32 each", format!("{extents:?}"));
        }
        if strides.iter().any(|&stride| stride == 0 || stride >= 1 << 40 || stride % CHUNK as u64 != 0) {
            return refuse("strides", "multiples of 16 from 16 to 2^40", format!("{strides:?}"));
        }
        if extents_of_box.iter().any(|extent| !(1..=256).contains(extent)) {
            return refuse("extents_of_box", "1 to 256 each", format!("{extents_of_box:?}"));
        }
        if !inner.is_multiple_of(CHUNK as u64) || swizzled && inner != 128 {
            let expected = "rows of a multiple of 16 bytes, swizzled ones of 128";
            return refuse("extents_of_box", expected, inner.to_string());
        }
        Ok(TensorMap {
            magic: MAGIC,
            address,
            extents,
            strides,
            extents_of_box,
            element_bytes,
            swizzled: swizzled.into(),
            padding: [0; 4],
        })
    }
}

impl TensorMap {
    /// Whether a host made it.
    pub fn check(&self) -> std::result::Result<(), String> {
        if self.magic == MAGIC { Ok(()) } else { Err("cp.async.bulk.tensor: no tensor map".into()) }
    }

    fn row_bytes(&self) -> usize {
        self.extents_of_box[0] as usize * self.element_bytes as usize
    }

    fn rows(&self) -> usize {
        self.extents_of_box[1..].iter().map(|&extent| extent as usize).product()
    }

    /// Of a box; what is outside of the tensor counts.
    pub fn box_bytes(&self) -> usize {
        self.rows() * self.row_bytes()
    }
}

/// A box on its way.
pub struct BoxCopy {
    pub map: TensorMap,
    /// Of the box's first element, which may be outside of the tensor.
    pub at: [i32; 4],
    pub to: u32,
    /// One row shorter and not swizzled, if a fault says so.
    pub short: bool,
    pub swizzled: bool,
}

impl BoxCopy {
    pub fn new(map: TensorMap, at: [i32; 4], to: u32) -> Self {
        Self { map, at, to, short: false, swizzled: map.swizzled != 0 }
    }

    /// Where a box's rows are in shared memory.
    pub fn check(&self) -> std::result::Result<(), String> {
        let alignment = if self.map.swizzled != 0 { PATTERN } else { 128 };
        if !self.to.is_multiple_of(alignment) {
            return Err(format!(
                "cp.async.bulk.tensor: shared address {} is not aligned to {alignment}",
                self.to
            ));
        }
        Ok(())
    }

    pub fn bytes(&self) -> usize {
        self.map.box_bytes() - if self.short { self.map.row_bytes() } else { 0 }
    }

    /// The bytes in shared memory, in pieces of 16.
    pub fn chunks(&self) -> impl Iterator<Item = u32> + use<> {
        let (to, swizzled) = (self.to, self.swizzled);
        (0..self.bytes() / CHUNK).map(move |i| {
            let address = to + (i * CHUNK) as u32;
            if swizzled { swizzle(address) } else { address }
        })
    }

    /// Copies what is inside the tensor, and zeros.
    pub fn land(
        &self,
        regions: &Regions,
        shared: &mut SharedMemory,
        by: Access,
    ) -> std::result::Result<(), String> {
        let mut chunks = self.chunks();
        for row in 0..self.bytes() / self.map.row_bytes() {
            let data = self.row(regions, row)?;
            for chunk in data.chunks(CHUNK) {
                let address = chunks.next().expect("a place for each");
                shared.land_copy(by, State::Landed, address, chunk)?;
            }
        }
        Ok(())
    }

    fn row(&self, regions: &Regions, row: usize) -> std::result::Result<Vec<u8>, String> {
        let Self { map, at, .. } = self;
        let mut data = vec![0; map.row_bytes()];
        let (mut rest, mut address) = (row, map.address);
        let places = at[1..].iter().zip(&map.extents_of_box[1..]);
        for ((&first, &width), (&extent, &stride)) in places.zip(map.extents[1..].iter().zip(&map.strides)) {
            let index = i64::from(first) + (rest % width as usize) as i64;
            rest /= width as usize;
            if index < 0 || index as u64 >= extent {
                return Ok(data);
            }
            address += index as u64 * stride;
        }
        let (first, width) = (i64::from(at[0]), i64::from(map.extents_of_box[0]));
        let begin = first.max(0);
        let end = (first + width).min(map.extents[0] as i64);
        if begin < end {
            let element = map.element_bytes as usize;
            let bytes = (end - begin) as usize * element;
            let from = address as usize + begin as usize * element;
            regions.check_bytes(from, bytes)?;
            let to = (begin - first) as usize * element;
            // SAFETY: the check found these bytes inside of one allocation.
            let memory =
                unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance::<u8>(from), bytes) };
            data[to..to + bytes].copy_from_slice(memory);
        }
        Ok(data)
    }
}
