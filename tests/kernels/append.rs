//! Appends by the kernel: places and positions are read by it, so what is out of range is left out.
//! That rows go to their places is a property of every backend (`properties::append`).

use crate::backend::Backend;
use crate::call::{Memory, on_each_device};
use crate::common::{Rng, Tensor};
use star_attention::cuda::append;
use star_attention::{Append, LEFT_OUT, Rotation, bf16};

on_each_device! {
    fn rows_without_a_place_or_an_angle_are_left_out() {
        let backend = B::open(7);
        let mut rng = Rng::new(7);
        let [key, value] =
            ["key", "value"].map(|name| Tensor::<bf16>::normal(name, [1, 5, 1, 16], &mut rng));
        let empty = Tensor::<bf16>::contiguous("cache", [2, 3, 1, 16], |_| 7.0);
        let [mut to_key, mut to_value] = [&empty, &empty].map(|rows| Memory::of(&backend, rows));
        // The last row has a place, but no angle.
        let places = backend.memory(&[4u32, 6, LEFT_OUT, 7, 0]);
        let positions = backend.memory(&[1u32, 0, 0, 0, 2]);
        let (cos, sin) = (backend.memory(&[1f32; 16]), backend.memory(&[0f32; 16]));
        let rotation = Rotation {
            cos: backend.span(&cos),
            sin: backend.span(&sin),
            positions: backend.span(&positions),
            rotated: 16,
            interleaved: false,
        };
        let [new_key, new_value] = [&key, &value].map(|rows| Memory::of(&backend, rows));
        let new = Append::new(
            new_key.view(&backend, "key"),
            new_value.view(&backend, "value"),
            backend.span(&places),
        );
        append(
            backend.device(),
            backend.stream(),
            &new.with_rotation(rotation),
            &mut to_key.view_mut(&backend, "cache_key"),
            &mut to_value.view_mut(&backend, "cache_value"),
        )
        .unwrap();
        for (new, stored) in [(&key, &to_key), (&value, &to_value)] {
            let stored = backend.read(&stored.memory);
            for (row, elements) in stored.chunks(16).enumerate() {
                for (d, &x) in elements.iter().enumerate() {
                    let expected = if row == 4 { new.get([0, 0, 0, d]) } else { bf16::from_f32(7.0) };
                    assert_eq!(x, expected, "row {row}, dim {d}");
                }
            }
        }
    }
}
