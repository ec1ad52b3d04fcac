//! Engines on the kernels: one loop for all backends, and graphs that stay valid while sequences
//! come and go.

use crate::either::Either;
use crate::properties::append::{appends, each_row_is_in_its_place};
use crate::properties::engine::{an_engine_serves_requests, histories};
use crate::properties::refusals::{a_refused_update_leaves_the_plan, writes_stay_inside_buffers};
use proptest::prelude::*;
use star_attention::cpu::Cpu;
use star_attention::cuda::simt::Simt;
use star_attention::cuda::{Cuda, HEAD_DIMS};
use star_attention::{Backend, bf16, f16};

fn a_quarter_of_the_cases() -> ProptestConfig {
    let config = ProptestConfig::default();
    ProptestConfig { cases: config.cases.div_ceil(4), ..config }
}

fn dims() -> impl Strategy<Value = (usize, usize)> {
    let equal = prop::sample::select(HEAD_DIMS.to_vec()).prop_map(|dim| (dim, dim));
    prop_oneof![4 => equal, 1 => prop::sample::select(vec![(192, 128), (64, 32)])]
}

/// The crate's backend on each device.
pub trait Engine: crate::backend::Backend + Sized {
    /// A stream of the device as a backend. `seed` draws the order of work, where it is drawn.
    fn cuda(seed: u64) -> Cuda<Self::Device> {
        Self::open(seed).as_cuda()
    }
}

impl<B: crate::backend::Backend> Engine for B {}

fn emulator(seed: u64) -> Cuda<Simt> {
    Simt::cuda(seed)
}

#[cfg(feature = "cuda")]
pub fn gpu() -> Cuda<star_attention::cuda::driver::Driver> {
    crate::backend::Gpu::cuda(0)
}

#[test]
fn refusals_change_nothing() {
    a_refused_update_leaves_the_plan::<_, bf16>(&emulator(1));
    writes_stay_inside_buffers(&emulator(1));
}

#[test]
#[cfg(feature = "cuda")]
#[ignore = "needs an NVIDIA GPU"]
fn refusals_change_nothing_on_a_gpu() {
    a_refused_update_leaves_the_plan::<_, bf16>(&gpu());
    writes_stay_inside_buffers(&gpu());
}

proptest! {
    #[test]
    fn rows_go_to_their_places(case in appends(), bf in any::<bool>()) {
        let backend = emulator(case.seed);
        match bf {
            true => each_row_is_in_its_place::<_, bf16, bf16>(&backend, &case)?,
            false => each_row_is_in_its_place::<_, f16, f16>(&backend, &case)?,
        }
    }

    #[test]
    #[cfg(feature = "cuda")]
    #[ignore = "needs an NVIDIA GPU"]
    fn an_engine_on_a_gpu(history in histories(12, dims()), bf in any::<bool>()) {
        match bf {
            true => an_engine_serves_requests::<_, bf16, bf16>(&gpu(), &history)?,
            false => an_engine_serves_requests::<_, f16, f16>(&gpu(), &history)?,
        }
    }
}

proptest! {
    // A step on the emulator takes some ten milliseconds.
    #![proptest_config(a_quarter_of_the_cases())]

    #[test]
    fn an_engine_on_the_emulator(history in histories(6, dims()), bf in any::<bool>()) {
        let backend = emulator(history.seed);
        match bf {
            true => an_engine_serves_requests::<_, bf16, bf16>(&backend, &history)?,
            false => an_engine_serves_requests::<_, f16, f16>(&backend, &history)?,
        }
    }

    #[test]
    fn an_engine_on_a_backend_chosen_at_run_time(history in histories(3, dims()), cpu in any::<bool>()) {
        let backend: Either<Cpu, Cuda<Simt>> =
            if cpu { Either::One(Cpu::new()) } else { Either::Other(emulator(history.seed)) };
        an_engine_serves_requests::<_, bf16, bf16>(&backend, &history)?;
    }
}

#[test]
fn plans_are_owned_and_send() {
    fn owned<T: Send + 'static>() {}
    owned::<<Cuda<Simt> as Backend>::Plan>();
    #[cfg(feature = "cuda")]
    owned::<<Cuda<star_attention::cuda::driver::Driver> as Backend>::Plan>();
}
