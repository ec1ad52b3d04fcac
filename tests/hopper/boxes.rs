//! Where boxes of tensors land, and what is refused of their maps.

use crate::launch;
use star_attention::cuda::simt::{Simt, TensorMap, Tiling};
use star_attention::{Error, Result};

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct BoxParams {
    map: TensorMap,
    out: u64,
    at: [i32; 4],
    bytes: u32,
    padding: [u32; 9],
}

/// Elements along each axis, with gaps between rows.
const EXTENTS: [u64; 4] = [72, 5, 3, 2];
const STRIDES: [u64; 3] = [160, 5 * 160 + 32, 3 * (5 * 160 + 32)];

/// Each element is its own index.
fn tensor() -> Vec<u16> {
    (0..2 * STRIDES[2] / 2).map(|i| i as u16).collect()
}

fn tiling(address: u64, extents_of_box: [u32; 4], swizzled: bool) -> Tiling {
    Tiling { address, element_bytes: 2, extents: EXTENTS, strides: STRIDES, extents_of_box, swizzled }
}

/// A box as it lies in shared memory.
fn copied(extents_of_box: [u32; 4], at: [i32; 4], swizzled: bool, seed: u64) -> Result<Vec<u16>> {
    let simt = Simt::new(seed);
    let memory = simt.buffer(&tensor());
    let elements = extents_of_box.iter().product::<u32>();
    let mut out = simt.buffer(&vec![0xffffu16; elements as usize]);
    let map = tiling(memory.span().address(), extents_of_box, swizzled).encode()?;
    let bytes = 2 * elements;
    let params = BoxParams { map, out: out.span_mut().address(), at, bytes, padding: [0; 9] };
    launch(&simt, "probe_box", [1, 32, 2048 + bytes], &params)?;
    Ok(out.as_slice().to_vec())
}

/// The same by the definition, element by element.
fn expected(extents_of_box: [u32; 4], at: [i32; 4], swizzled: bool) -> Vec<u16> {
    let [width, rows, heads, batches] = extents_of_box;
    let mut out = vec![0; (width * rows * heads * batches) as usize];
    for (i, place) in (0..out.len()).enumerate() {
        let mut rest = i as u32;
        let index: [i64; 4] = std::array::from_fn(|axis| {
            let offset = rest % extents_of_box[axis];
            rest /= extents_of_box[axis];
            i64::from(at[axis]) + i64::from(offset)
        });
        let inside = index.iter().zip(EXTENTS).all(|(&i, extent)| i >= 0 && (i as u64) < extent);
        let offset = 2 * index[0] + index[1..].iter().zip(STRIDES).map(|(i, s)| i * s as i64).sum::<i64>();
        // The box begins where the pattern of the swizzle does.
        let to = if swizzled { place ^ (((place >> 6) & 7) << 3) } else { place };
        out[to] = if inside { (offset / 2) as u16 } else { 0 };
    }
    out
}

#[test]
fn boxes_land_where_they_should() {
    let boxes = [[64, 5, 1, 1], [64, 4, 3, 2], [8, 1, 1, 1], [64, 1, 1, 1], [64, 16, 1, 1], [24, 3, 2, 1]];
    let places = [[0; 4], [8, 1, 1, 1], [-3, -2, -1, -1], [70, 3, 2, 1], [64, 0, 0, 0], [100, 0, 0, 0]];
    for extents in boxes {
        for at in places {
            for swizzled in [false, true] {
                if swizzled && extents[0] != 64 {
                    continue;
                }
                let got = copied(extents, at, swizzled, 7).unwrap();
                assert_eq!(got, expected(extents, at, swizzled), "{extents:?} at {at:?}, {swizzled}");
            }
        }
    }
}

#[test]
fn maps_that_a_gpu_would_refuse() {
    let good = tiling(1 << 20, [64, 4, 1, 1], true);
    assert!(good.encode().is_ok());
    let bad = [
        Tiling { address: (1 << 20) + 8, ..good },
        Tiling { element_bytes: 3, ..good },
        Tiling { extents: [64, 0, 1, 1], ..good },
        Tiling { strides: [160, 168, 1600], ..good },
        Tiling { strides: [160, 0, 1600], ..good },
        Tiling { strides: [160, 1 << 40, 1600], ..good },
        Tiling { extents_of_box: [64, 257, 1, 1], ..good },
        Tiling { extents_of_box: [64, 0, 1, 1], ..good },
        Tiling { extents_of_box: [72, 1, 1, 1], ..good },
        Tiling { extents_of_box: [12, 1, 1, 1], swizzled: false, ..good },
    ];
    for tiling in bad {
        assert!(matches!(tiling.encode(), Err(Error::Value { .. })), "{tiling:?}");
    }
}

/// A tensor that claims to be longer than its allocation.
#[test]
fn a_box_outside_of_memory() {
    let simt = Simt::new(0);
    let memory = simt.buffer(&tensor()[..1000]);
    let mut out = simt.buffer(&[0u16; 64 * 16]);
    let map = tiling(memory.span().address(), [64, 4, 3, 2], false).encode().unwrap();
    let (out, bytes) = (out.span_mut().address(), 2 * 64 * 24);
    let params = BoxParams { map, out, at: [0; 4], bytes, padding: [0; 9] };
    let error = launch(&simt, "probe_box", [1, 32, 2048 + bytes], &params).unwrap_err().to_string();
    assert!(error.contains("global memory: ") && error.contains("of an allocation"), "{error}");
}

/// A phase that expects other bytes than those of the box.
#[test]
fn a_box_of_other_bytes() {
    let simt = Simt::new(0);
    let memory = simt.buffer(&tensor());
    let mut out = simt.buffer(&[0u16; 64 * 16]);
    let map = tiling(memory.span().address(), [64, 4, 1, 1], false).encode().unwrap();
    let out = out.span_mut().address();
    let wrong =
        [(512 - 16, "tx-count overflow"), (512 + 16, "lacks 0 arrivals and 16 bytes"), (1 << 20, "overflow")];
    for (bytes, expected) in wrong {
        let params = BoxParams { map, out, at: [0; 4], bytes, padding: [0; 9] };
        let error = launch(&simt, "probe_box", [1, 32, 4096], &params).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}
