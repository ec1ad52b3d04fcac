//! The threads of a call on the CPU. Nothing here starts rayon's global pool.

mod common;

use common::{Rng, Tensor, named};
use rayon::ThreadPoolBuilder;
use star_attention::cpu::flash::Plan;
use star_attention::{Batch, Inputs, Keys, Mask, PlanConfig, Sequence};

/// A prefill, and a decode whose keys are split.
fn batch() -> Batch {
    let mut batch = Batch::new([2, 150, 4, 32], [2, 3000, 2, 32]).unwrap();
    batch.push(Sequence::new(0, 0..150, Keys::rows(0, 0..200), Mask::Causal)).unwrap();
    batch.push(Sequence::new(1, 0..1, Keys::rows(1, 0..3000), Mask::Causal)).unwrap();
    batch
}

fn plan() -> Plan {
    Plan::for_batch(&PlanConfig::new().with_split_keys(500), batch()).unwrap()
}

/// Output and log-sum-exp of the plan.
fn run(plan: &Plan) -> Vec<u32> {
    let mut rng = Rng::new(1);
    let query = Tensor::<f32>::normal("query", plan.batch().query_shape(), &mut rng);
    let keys = Tensor::<f32>::normal("key", plan.batch().key_shape(), &mut rng);
    let mut out = Tensor::<f32>::contiguous("out", query.shape(), |_| 0.0);
    let mut lse = vec![0.0; plan.batch().lse_len()];
    let inputs = Inputs::new(query.view(), keys.view(), keys.view());
    let mut workspace = Vec::with_capacity(plan.workspace_bytes());
    plan.run(inputs, out.view_mut(), Some(&mut lse), &mut workspace).unwrap();
    out.values().chain(lse).map(f32::to_bits).collect()
}

/// One thread is the caller's, as the global pool was never started; any number of them, in any
/// pool, gives the same bits.
#[test]
fn one_thread_starts_no_pool_and_more_change_no_bit() {
    let expected = run(&plan().with_threads(1).unwrap());
    ThreadPoolBuilder::new().num_threads(1).build_global().expect("no global pool so far");
    for pool in [1, 2, 4] {
        let pool = ThreadPoolBuilder::new().num_threads(pool).build().unwrap();
        for threads in [1, 2, 3, 100] {
            let got = pool.install(|| run(&plan().with_threads(threads).unwrap()));
            assert!(got == expected, "{threads} threads of {pool:?}");
        }
        assert!(pool.install(|| run(&plan())) == expected, "{pool:?}");
        // A plan whose workspace was made for another pool.
        let plan = plan();
        let bytes = plan.workspace_bytes();
        assert!(pool.install(|| run(&plan)) == expected, "{pool:?}");
        assert_eq!(pool.install(|| plan.workspace_bytes()), bytes);
    }
}

/// Buffers are those of the threads that there are and that are allowed.
#[test]
fn workspaces_are_for_the_threads_of_the_pool() {
    let pool = ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    let bytes = |threads| pool.install(|| plan().with_threads(threads).unwrap().workspace_bytes());
    let each = bytes(2) - bytes(1);
    assert!(each > 0);
    assert_eq!(bytes(3), bytes(2) + each);
    assert_eq!(bytes(100), bytes(3));
    assert_eq!(pool.install(|| plan().workspace_bytes()), bytes(3));
    assert_eq!(named(plan().with_threads(0).unwrap_err()), ("value", "threads"));
}
