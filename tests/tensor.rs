//! Views are checked against their buffers.

use proptest::prelude::*;
use star_attention::{DType, Element, Error, TensorView, TensorViewMut, bf16, f16};
use std::collections::HashSet;

/// All offsets of a view, in order of their indices.
fn offsets(shape: [usize; 4], strides: [usize; 4]) -> Vec<usize> {
    let mut all = vec![];
    for a in 0..shape[0] {
        for b in 0..shape[1] {
            for c in 0..shape[2] {
                for d in 0..shape[3] {
                    all.push(a * strides[0] + b * strides[1] + c * strides[2] + d * strides[3]);
                }
            }
        }
    }
    all
}

proptest! {
    #[test]
    fn accepted_strides_stay_inside_and_meet_only_where_they_are_0(
        shape in prop::array::uniform4(0..4usize), strides in prop::array::uniform4(0..30usize), len in 0..80usize,
    ) {
        let mut data: Vec<f32> = (0..len).map(|i| i as f32).collect();
        let all = offsets(shape, strides);
        let fits = all.iter().all(|&offset| offset < len);
        // Axes that repeat count once.
        let repeats: Vec<bool> = (0..4).map(|axis| shape[axis] > 1 && strides[axis] == 0).collect();
        let once: [usize; 4] = std::array::from_fn(|axis| if repeats[axis] { 1 } else { shape[axis] });
        let distinct = |all: &[usize]| all.iter().collect::<HashSet<_>>().len() == all.len();
        let result = TensorView::new("query", &data, shape, strides);
        let accepted = result.is_ok();
        match result {
            Ok(view) => {
                prop_assert!(fits && distinct(&offsets(once, strides)));
                let mut expected = all.iter();
                for index in offsets(shape, [1000, 100, 10, 1]) {
                    let index = [index / 1000, index / 100 % 10, index / 10 % 10, index % 10];
                    prop_assert_eq!(view.at(index), *expected.next().unwrap() as f32);
                }
            }
            Err(Error::Stride { argument: "query", .. }) => {
                // What nests is accepted: only interleaved axes may be refused besides what is
                // really wrong.
                let mut axes: Vec<_> = (0..4).filter(|&axis| once[axis] > 1).collect();
                axes.sort_by_key(|&axis| strides[axis]);
                let nests = axes.windows(2).all(|pair| strides[pair[1]] >= once[pair[0]] * strides[pair[0]]);
                prop_assert!(!(fits && distinct(&offsets(once, strides)) && nests));
            }
            Err(other) => prop_assert!(false, "{}", other),
        }
        // What is written may not repeat.
        let repeats = repeats.contains(&true) && !shape.contains(&0);
        prop_assert_eq!(TensorViewMut::new("out", &mut data, shape, strides).is_ok(), accepted && !repeats);
    }

    #[test]
    fn a_narrowed_view_is_a_part_of_the_whole(
        shape in prop::array::uniform4(1..5usize), axis in 0..4usize, start in 0..6usize, len in 0..6usize,
    ) {
        let data: Vec<f32> = (0..shape.iter().product::<usize>()).map(|i| i as f32).collect();
        let view = TensorView::contiguous("key", &data, shape).unwrap();
        let part = view.narrow(axis, start, len);
        if start + len > shape[axis] {
            let refused = matches!(part, Err(Error::Value { argument: "narrow", .. }));
            prop_assert!(refused);
        } else {
            let part = part.unwrap();
            let mut expected = shape;
            expected[axis] = len;
            prop_assert_eq!(part.shape(), expected);
            if len > 0 {
                let mut index = shape.map(|extent| extent - 1);
                index[axis] = start + len - 1;
                let whole = view.at(index);
                index[axis] = len - 1;
                prop_assert_eq!(part.at(index), whole);
                let swapped = [index[0], index[2], index[1], index[3]];
                prop_assert_eq!(part.swap_seq_heads().at(swapped), whole);
            }
        }
    }
}

#[test]
fn strides_out_of_any_range_are_refused() {
    let data = [0f32; 8];
    for strides in [[usize::MAX, 1, 1, 1], [1, usize::MAX / 2 + 1, 1, 1], [4, usize::MAX - 4, 2, 1]] {
        let result = TensorView::new("value", &data, [2, 3, 2, 2], strides);
        assert!(matches!(result, Err(Error::Stride { argument: "value", .. })), "{strides:?}");
    }
    let interleaved = TensorView::new("key", &data, [1, 2, 3, 2], [8, 1, 2, 1]).unwrap_err();
    assert!(interleaved.to_string().starts_with("key: expected strides that never overlap"), "{interleaved}");
    let mut data = data;
    let repeated = TensorViewMut::new("out", &mut data, [1, 2, 4, 2], [8, 0, 2, 1]).unwrap_err();
    assert!(repeated.to_string().starts_with("out: expected strides that never overlap"), "{repeated}");
}

#[test]
fn buffers_of_another_length_are_refused() {
    let mut data = [0f32; 8];
    let result = TensorView::contiguous("key", &data, [1, 2, 2, 3]);
    assert!(matches!(result, Err(Error::Shape { argument: "key", .. })));
    let result = TensorViewMut::contiguous("out", &mut data, [usize::MAX, 2, 2, 2]);
    assert!(matches!(result, Err(Error::Shape { argument: "out", .. })));
    let view = TensorView::contiguous("key", &data, [1, 2, 2, 2]).unwrap();
    assert!(matches!(view.narrow(4, 0, 1), Err(Error::Value { argument: "axis", .. })));
    assert!(matches!(view.narrow(1, usize::MAX, 2), Err(Error::Value { argument: "narrow", .. })));
}

#[test]
fn a_mutable_view_writes_where_a_view_reads() {
    let mut data = [0f32; 24];
    let mut out = TensorViewMut::new("out", &mut data, [1, 2, 2, 3], [24, 4, 12, 1]).unwrap();
    out.set([0, 1, 1, 2], 5.0);
    assert_eq!(out.as_view().at([0, 1, 1, 2]), 5.0);
    let mut part = out.reborrow().narrow(1, 1, 1).unwrap().swap_seq_heads();
    assert_eq!(part.shape(), [1, 2, 1, 3]);
    part.set([0, 0, 0, 0], 6.0);
    assert_eq!(out.as_view().at([0, 1, 0, 0]), 6.0);
    assert_eq!(data.iter().filter(|x| **x != 0.0).count(), 2);
}

#[test]
fn elements_convert_to_the_nearest() {
    fn both_ways<T: Element>(dtype: DType, name: &str, size: usize, step: f32) {
        assert_eq!((T::DTYPE, T::DTYPE.to_string().as_str(), T::DTYPE.size()), (dtype, name, size));
        assert_eq!(T::from_f32(1.0).to_f32(), 1.0);
        assert_eq!(T::from_f32(1.0 + 0.4 * step).to_f32(), 1.0);
        assert_eq!(T::from_f32(1.0 + 0.6 * step).to_f32(), 1.0 + step);
        assert!(T::from_f32(f32::NAN).to_f32().is_nan());
    }
    both_ways::<f16>(DType::F16, "f16", 2, 1.0 / 1024.0);
    both_ways::<bf16>(DType::BF16, "bf16", 2, 1.0 / 128.0);
    assert_eq!((f32::DTYPE, f32::from_f32(0.1).to_f32()), (DType::F32, 0.1));
}
