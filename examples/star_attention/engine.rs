//! What carries messages between ranks.

use super::llama::error::Result;
use star_attention::comm::{Collective, GroupConfig};

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Engine {
    /// Ranks are threads of this process
    Threads,
    /// Ranks are processes, started by mpirun
    Mpi,
}

impl Engine {
    /// The group that this process is a rank of; none if ranks are threads.
    pub fn group(self, config: &GroupConfig) -> Result<Option<Box<dyn Collective>>> {
        match self {
            Self::Threads => Ok(None),
            Self::Mpi => mpi(config).map(Some),
        }
    }
}

#[cfg(feature = "mpi")]
fn mpi(config: &GroupConfig) -> Result<Box<dyn Collective>> {
    Ok(Box::new(star_attention::comm::Mpi::init(config)?))
}

#[cfg(not(feature = "mpi"))]
fn mpi(_: &GroupConfig) -> Result<Box<dyn Collective>> {
    let reason = "this build has not the feature `mpi`".into();
    Err(star_attention::Error::Unavailable { what: "MPI", reason }.into())
}
