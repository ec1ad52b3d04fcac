//! The CPU as a backend: appends, and engines on it.

use crate::common::{Rng, Tensor, extents};
use crate::properties::append::{appends, each_row_is_in_its_place};
use crate::properties::engine::{an_engine_serves_requests, histories};
use crate::properties::refusals::{a_refused_update_leaves_the_plan, writes_stay_inside_buffers};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use star_attention::cpu::{Cpu, InstructionSet, flash};
use star_attention::{
    Append, Backend, Batch, Capacity, Error, F8E4M3, Inputs, Keys, LEFT_OUT, Mask, PlanConfig, Rotation,
    Sequence, bf16, f16,
};

fn small_dims() -> impl Strategy<Value = (usize, usize)> {
    prop_oneof![2 => (1..70usize).prop_map(|dim| (dim, dim)), 1 => (1..70usize, 1..70usize)]
}

proptest! {
    #[test]
    fn rows_go_to_their_places(case in appends(), types in 0..6usize) {
        let cpu = Cpu::new();
        match types {
            0 => each_row_is_in_its_place::<_, f32, f32>(&cpu, &case)?,
            1 => each_row_is_in_its_place::<_, f16, f16>(&cpu, &case)?,
            2 => each_row_is_in_its_place::<_, bf16, bf16>(&cpu, &case)?,
            3 => each_row_is_in_its_place::<_, f32, bf16>(&cpu, &case)?,
            4 => each_row_is_in_its_place::<_, f32, f16>(&cpu, &case)?,
            _ => each_row_is_in_its_place::<_, bf16, f32>(&cpu, &case)?,
        }
    }

    #[test]
    fn an_engine_on_the_cpu(history in histories(12, small_dims()), dtype in 0..5usize) {
        let cpu = Cpu::new();
        match dtype {
            0 => an_engine_serves_requests::<_, f32, f32>(&cpu, &history)?,
            1 => an_engine_serves_requests::<_, f16, f16>(&cpu, &history)?,
            2 => an_engine_serves_requests::<_, bf16, F8E4M3>(&cpu, &history)?,
            3 => an_engine_serves_requests::<_, f32, F8E4M3>(&cpu, &history)?,
            _ => an_engine_serves_requests::<_, bf16, bf16>(&cpu, &history)?,
        }
    }
}

#[test]
fn refusals_change_nothing() {
    a_refused_update_leaves_the_plan::<_, f32>(&Cpu::new());
    writes_stay_inside_buffers(&Cpu::new());
}

#[test]
fn an_engine_on_each_instruction_set_and_one_thread() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    for instructions in InstructionSet::available() {
        let cpu = Cpu::new().with_instructions(instructions).unwrap().with_threads(1).unwrap();
        let history = histories(12, small_dims()).new_tree(&mut runner).unwrap().current();
        an_engine_serves_requests::<_, bf16, bf16>(&cpu, &history).unwrap();
        an_engine_serves_requests::<_, f16, F8E4M3>(&cpu, &history).unwrap();
    }
}

/// The instructions of a backend are those of its plans: other sets give other bits.
#[test]
fn plans_take_the_instructions_of_their_backend() {
    let shape = extents([1, 40, 300], [2, 1], [64, 64]);
    let mut rng = Rng::new(11);
    let query = Tensor::<bf16>::normal("query", shape.query_shape(), &mut rng);
    let [key, value] = ["key", "value"].map(|name| Tensor::<bf16>::normal(name, shape.key_shape(), &mut rng));
    let inputs = || Inputs::new(query.view(), key.view(), value.view());
    let batch = Batch::uniform(&shape, &Mask::Causal).unwrap();
    let config = PlanConfig::new();
    let mut results = Vec::new();
    for instructions in InstructionSet::available() {
        let cpu = Cpu::new().with_instructions(instructions).unwrap();
        let mut plans = [cpu.plan_for(&config, &batch).unwrap(), {
            let capacity = Capacity::new(batch.query_shape(), batch.key_shape(), 1, shape.query_len);
            let mut plan = cpu.plan(&config, &capacity).unwrap();
            cpu.update(&mut plan, &batch).unwrap();
            plan
        }];
        let expected = flash::Plan::for_batch(&config, batch.clone()).unwrap();
        let expected = expected.with_instructions(instructions).unwrap();
        let mut out = Tensor::<f32>::contiguous("out", shape.query_shape(), |_| f32::NAN);
        let mut workspace = Vec::with_capacity(expected.workspace_bytes());
        expected.run(inputs(), out.view_mut(), None, &mut workspace).unwrap();
        for plan in &mut plans {
            let mut got = Tensor::<f32>::contiguous("out", shape.query_shape(), |_| f32::NAN);
            let mut workspace = vec![0; cpu.workspace_bytes(plan)];
            cpu.attend(plan, inputs(), got.view_mut(), None, &mut workspace).unwrap();
            assert_eq!(got.bits(), out.bits(), "{instructions:?}");
        }
        results.push(out.bits());
    }
    let count = results.len();
    results.sort();
    results.dedup();
    assert!(count == 1 || results.len() > 1, "no set can be told from another");
}

/// The elements of a range, however it is written, as far as there are any.
#[test]
fn slices_end_with_their_buffer() {
    let cpu = Cpu::new();
    let mut buffer = cpu.buffer_of(&[0u32, 1, 2, 3, 4]).unwrap();
    assert_eq!(cpu.slice(&buffer, 1..3), [1, 2]);
    assert_eq!(cpu.slice(&buffer, 1..=3), [1, 2, 3]);
    assert_eq!(cpu.slice(&buffer, ..), [0, 1, 2, 3, 4]);
    assert_eq!(cpu.slice(&buffer, 3..9), [3, 4]);
    assert!(cpu.slice(&buffer, 7..usize::MAX).is_empty());
    let from_the_second = (std::ops::Bound::Excluded(0), std::ops::Bound::Unbounded);
    assert_eq!(cpu.slice_mut(&mut buffer, from_the_second), [1, 2, 3, 4]);
    let error = cpu.write(&mut buffer, 4, &[7, 8]).unwrap_err();
    assert!(matches!(error, Error::Value { argument: "data", .. }), "{error}");
    assert_eq!(buffer, [0, 1, 2, 3, 4]);
}

/// The index of the sequence that an error names, and its argument.
fn of_sequence(result: star_attention::Result<()>) -> (usize, &'static str) {
    match result.unwrap_err() {
        Error::Sequence { index, source } => match *source {
            Error::Value { argument, .. } => (index, argument),
            other => panic!("{other}"),
        },
        other => panic!("{other}"),
    }
}

/// Nothing is written where an append is refused.
#[test]
fn appends_that_are_refused() {
    let cpu = Cpu::new();
    let new = [1f32; 2 * 3 * 8];
    let refused = |places: [u32; 6], rotation: Option<(usize, [u32; 6], usize)>| {
        let mut cache = [vec![0f32; 4 * 2 * 8], vec![0f32; 4 * 2 * 8]];
        let [cache_key, cache_value] = &mut cache;
        let view = |name| Cpu::view(name, &new[..], [2, 3, 1, 8], [24, 8, 8, 1]).unwrap();
        let mut rows = Append::new(view("key"), view("value"), &places[..]);
        let (tables, positions);
        if let Some((rotated, of_rows, len)) = rotation {
            (tables, positions) = (vec![0.5f32; len], of_rows);
            rows = rows.with_rotation(Rotation {
                cos: &tables[..],
                sin: &tables[..],
                positions: &positions[..],
                rotated,
                interleaved: false,
            });
        }
        let result = cpu.append(
            rows,
            cpu.whole_mut("cache_key", cache_key, [4, 2, 1, 8]).unwrap(),
            cpu.whole_mut("cache_value", cache_value, [4, 2, 1, 8]).unwrap(),
        );
        if result.is_err() {
            assert!(cache.iter().flatten().all(|&x| x == 0.0), "wrote in spite of the error");
        }
        result
    };
    refused([0, 1, LEFT_OUT, LEFT_OUT, 7, 2], None).unwrap();
    assert_eq!(of_sequence(refused([0, 1, 2, 3, 8, 4], None)), (1, "places"));
    assert_eq!(of_sequence(refused([0, 1, 2, 3, 1, 4], None)), (1, "places"));
    assert_eq!(of_sequence(refused([0, 0, 2, 3, 1, 4], None)), (0, "places"));
    let places = [0, 1, 2, 3, LEFT_OUT, 5];
    refused(places, Some((4, [9, 0, 0, 0, 10, 0], 20))).unwrap();
    assert_eq!(of_sequence(refused(places, Some((4, [0, 0, 0, 0, 0, 10], 20)))), (1, "positions"));
    for rotated in [0, 3, 10] {
        let error = refused(places, Some((rotated, [0; 6], 20))).unwrap_err();
        assert!(matches!(error, Error::Value { argument: "rotated", .. }), "{error}");
    }
    let error = refused(places, Some((4, [0; 6], 21))).unwrap_err();
    assert!(matches!(error, Error::Shape { argument: "cos", .. }), "{error}");

    // Tables of unequal lengths, and positions for fewer rows.
    let mut cache = [vec![0f32; 64], vec![0f32; 64]];
    let [cache_key, cache_value] = &mut cache;
    let mut of_lens = |sin: usize, positions: usize| {
        let view = |name| Cpu::view(name, &new[..], [2, 3, 1, 8], [24, 8, 8, 1]).unwrap();
        let (table, numbers) = ([0.5f32; 20], [0u32; 6]);
        let rotation = Rotation {
            cos: &table[..],
            sin: &table[..sin],
            positions: &numbers[..positions],
            rotated: 4,
            interleaved: true,
        };
        let rows = Append::new(view("key"), view("value"), &places[..]).with_rotation(rotation);
        cpu.append(
            rows,
            cpu.whole_mut("cache_key", cache_key, [4, 2, 1, 8]).unwrap(),
            cpu.whole_mut("cache_value", cache_value, [4, 2, 1, 8]).unwrap(),
        )
    };
    of_lens(20, 6).unwrap();
    assert!(matches!(of_lens(18, 6).unwrap_err(), Error::Shape { argument: "sin", .. }));
    assert!(matches!(of_lens(20, 5).unwrap_err(), Error::Shape { argument: "positions", .. }));
}

/// Batches beyond a plan's capacity are refused, and the plan goes on with the one it had.
#[test]
fn batches_beyond_a_capacity() {
    let cpu = Cpu::new();
    let (query, key) = ([1, 8, 2, 8], [4, 2, 1, 8]);
    let capacity = Capacity::new(query, key, 2, 3).with_pages(4);
    let mut plan = cpu.plan(&PlanConfig::new(), &capacity).unwrap();
    let batch = |sequences: &[(usize, Keys)]| {
        let mut batch = Batch::new(query, key).unwrap();
        let mut start = 0;
        for (rows, keys) in sequences {
            batch.push(Sequence::new(0, start..start + rows, keys.clone(), Mask::Causal)).unwrap();
            start += rows;
        }
        batch
    };
    let pages = |len: usize| Keys::pages(len, (0..len.div_ceil(2) as u32).collect::<Vec<u32>>());
    cpu.update(&mut plan, &batch(&[(3, pages(5)), (1, pages(2))])).unwrap();
    let mut refused = |sequences: &[(usize, Keys)]| cpu.update(&mut plan, &batch(sequences)).unwrap_err();
    let error = refused(&[(1, pages(1)), (1, pages(1)), (1, pages(1))]);
    assert!(matches!(error, Error::Value { argument: "sequences", .. }), "{error}");
    assert!(matches!(refused(&[(1, pages(8)), (1, pages(1))]), Error::Value { argument: "pages", .. }));
    let (Error::Sequence { index: 1, source }, "rows") = (refused(&[(1, pages(1)), (4, pages(4))]), "rows")
    else {
        panic!("a sequence of too many rows")
    };
    assert!(matches!(*source, Error::Value { argument: "rows", .. }), "{source}");
    let error = refused(&[(1, Keys::rows(0, 0..1))]);
    assert!(matches!(error, Error::Sequence { index: 0, .. }), "{error}");
    let other = Batch::new([1, 9, 2, 8], key).unwrap();
    let error = cpu.update(&mut plan, &other).unwrap_err();
    assert!(matches!(error, Error::Shape { argument: "query", .. }), "{error}");
    let other = Batch::new(query, key).unwrap().with_value_dim(7).unwrap();
    let error = cpu.update(&mut plan, &other).unwrap_err();
    assert!(matches!(error, Error::Shape { argument: "value", .. }), "{error}");
    let mut of_seven = cpu.plan(&PlanConfig::new(), &capacity.clone().with_value_dim(7)).unwrap();
    cpu.update(&mut of_seven, &other).unwrap();
    let none = cpu.plan(&PlanConfig::new(), &capacity.with_value_dim(0)).map(drop).unwrap_err();
    assert!(matches!(none, Error::Shape { argument: "value", .. }), "{none}");
    let mut alone = cpu.plan_for(&PlanConfig::new(), &batch(&[])).unwrap();
    let error = cpu.update(&mut alone, &batch(&[])).unwrap_err();
    assert!(matches!(error, Error::Value { argument: "plan", .. }), "{error}");
}

/// A plan's workspace is enough in whichever pool of threads it is updated and used.
#[test]
fn workspaces_do_not_depend_on_the_pool() {
    let cpu = Cpu::new();
    let (query, key) = ([1, 64, 8, 64], [1, 2048, 8, 64]);
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    for (config, value_dim) in [(PlanConfig::new(), 64), (PlanConfig::new().with_split_keys(64), 300)] {
        let capacity = Capacity::new(query, key, 1, 64).with_value_dim(value_dim);
        let mut plan = pool(1).install(|| cpu.plan(&config, &capacity)).unwrap();
        let mut batch = Batch::new(query, key).unwrap().with_value_dim(value_dim).unwrap();
        batch.push(Sequence::new(0, 0..64, Keys::rows(0, 0..2048), Mask::Full)).unwrap();
        pool(3).install(|| {
            cpu.update(&mut plan, &batch).unwrap();
            let (queries, keys) = (vec![1f32; 64 * 8 * 64], vec![1f32; 2048 * 8 * 64]);
            let (values, mut out) = (vec![1f32; 2048 * 8 * value_dim], vec![0f32; 64 * 8 * value_dim]);
            let mut workspace = vec![0; cpu.workspace_bytes(&plan)];
            let inputs = Inputs::new(
                cpu.whole("query", &queries, query).unwrap(),
                cpu.whole("key", &keys, key).unwrap(),
                cpu.whole("value", &values, batch.value_shape()).unwrap(),
            );
            let to = cpu.whole_mut("out", &mut out, batch.out_shape()).unwrap();
            cpu.attend(&mut plan, inputs, to, None, &mut workspace).unwrap();
            assert!(out.iter().all(|&x| (x - 1.0).abs() < 1e-6));
        });
    }
}

/// An engine keeps plans in its own structs, and moves them between threads.
#[test]
fn plans_are_owned_and_send() {
    fn owned<T: Send + 'static>() {}
    owned::<<Cpu as Backend>::Plan>();
}

/// Extents and lengths that no memory has are errors, or plans of no work.
#[test]
fn absurd_extents() {
    const MAX: usize = usize::MAX;
    let cpu = Cpu::new();
    // Two rows of memory that seem to be many.
    let view = |name| Cpu::view(name, &[0f32; 8][..], [MAX, MAX, 1, 8], [0, 0, 0, 1]).unwrap();
    let mut cache = [[1f32; 8], [1f32; 8]].map(|row| row.to_vec());
    let [cache_key, cache_value] = &mut cache;
    let error = cpu
        .append(
            Append::new(view("key"), view("value"), &[0][..]),
            cpu.whole_mut("cache_key", cache_key, [1, 1, 1, 8]).unwrap(),
            cpu.whole_mut("cache_value", cache_value, [1, 1, 1, 8]).unwrap(),
        )
        .unwrap_err();
    assert!(matches!(error, Error::Shape { argument: "key", .. }), "{error}");
    assert!(cache.iter().flatten().all(|&x| x == 1.0));

    let none = star_attention::TensorViewMut::<f32>::new("out", &mut [], [MAX, 2, 0, 2], [0; 4]).unwrap();
    cpu.merge::<f32, f32>(Vec::new(), None, none, None).unwrap();

    let config = PlanConfig::new();
    let batch = Batch::new([1, 1, 1, 1 << 56], [1, 1, 1, 1 << 56]).unwrap();
    let error = cpu.plan_for(&config, &batch).map(drop).unwrap_err();
    assert!(matches!(error, Error::Value { argument: "head_dim", .. }), "{error}");
    let batch = Batch::new([1, 1, 1, 1], [1, 1, 1, 1]).unwrap().with_value_dim(1 << 56).unwrap();
    let error = cpu.plan_for(&config, &batch).map(drop).unwrap_err();
    assert!(matches!(error, Error::Value { argument: "value_dim", .. }), "{error}");

    let mut batch = Batch::new([1, 64, 1, 1], [1, 1 << 60, 1, 1]).unwrap();
    batch.push(Sequence::new(0, 0..32, Keys::rows(0, 0..1 << 60), Mask::Full)).unwrap();
    batch.push(Sequence::new(0, 32..64, Keys::rows(0, 0..1 << 60), Mask::Causal)).unwrap();
    cpu.plan_for(&config, &batch).map(drop).unwrap();
    let error = cpu.plan_for(&config.with_row_invariant(), &batch).map(drop).unwrap_err();
    assert!(matches!(error, Error::Value { argument: "split_keys", .. }), "{error}");

    let shape = extents([MAX, MAX, 1], [3, 0], [1, 1]);
    assert_eq!((shape.group(), shape.lse_len()), (0, MAX));
}

/// Whoever updates a plan, its instructions and threads are those that it was made with.
#[test]
fn plans_keep_their_instructions() {
    let portable = Cpu::new().with_instructions(InstructionSet::Portable).unwrap();
    let shape = extents([1, 20, 200], [1, 1], [64, 64]);
    let mut rng = Rng::new(12);
    let query = Tensor::<f32>::normal("query", shape.query_shape(), &mut rng);
    let key = Tensor::<f32>::normal("key", shape.key_shape(), &mut rng);
    let batch = Batch::uniform(&shape, &Mask::Full).unwrap();
    let capacity = Capacity::new(batch.query_shape(), batch.key_shape(), 1, shape.query_len);
    let mut bits = [portable, Cpu::new()].map(|updater| {
        let mut plan = portable.plan(&PlanConfig::new(), &capacity).unwrap();
        updater.update(&mut plan, &batch).unwrap();
        let mut out = Tensor::<f32>::contiguous("out", shape.query_shape(), |_| f32::NAN);
        let mut workspace = vec![0; portable.workspace_bytes(&plan)];
        let inputs = Inputs::new(query.view(), key.view(), key.view());
        updater.attend(&mut plan, inputs, out.view_mut(), None, &mut workspace).unwrap();
        out.bits()
    });
    let [of_portable, of_best] = &mut bits;
    assert_eq!(of_portable, of_best);
}
