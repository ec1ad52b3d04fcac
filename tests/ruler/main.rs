//! The accuracy example: what its samples hold, how answers are scored, and that an interrupted run
//! goes on.
#![cfg(feature = "candle")]

// The example's own modules; what its command line uses is not all used here.
#[path = "../model/byte_level.rs"]
mod byte_level;
#[allow(dead_code)]
#[path = "../../examples/ruler/chart.rs"]
mod chart;
#[allow(dead_code)]
#[path = "../model/checkpoint.rs"]
mod checkpoint;
#[allow(dead_code)]
#[path = "../../examples/ruler/english.rs"]
mod english;
#[allow(dead_code)]
#[path = "../../examples/ruler/fit.rs"]
mod fit;
#[allow(dead_code)]
#[path = "../../examples/ruler/language.rs"]
mod language;
#[path = "../../examples/llama/mod.rs"]
mod llama;
#[allow(dead_code)]
#[path = "../../examples/ruler/mass.rs"]
mod mass;
#[path = "../../examples/ruler/plot.rs"]
mod plot;
#[allow(dead_code)]
#[path = "../../examples/ruler/record.rs"]
mod record;
#[allow(dead_code)]
#[path = "../../examples/ruler/report.rs"]
mod report;
#[allow(dead_code)]
#[path = "../../examples/ruler/sample.rs"]
mod sample;
#[allow(dead_code)]
#[path = "../../examples/ruler/samples.rs"]
mod samples;
#[allow(dead_code)]
#[path = "../../examples/ruler/setting.rs"]
mod setting;
#[allow(dead_code)]
#[path = "../../examples/ruler/small.rs"]
mod small;
#[allow(dead_code)]
#[path = "../../examples/ruler/statistics.rs"]
mod statistics;
#[allow(dead_code)]
#[path = "../../examples/ruler/suite.rs"]
mod suite;
#[allow(dead_code)]
#[path = "../../examples/ruler/task.rs"]
mod task;
#[allow(dead_code)]
#[path = "../../examples/ruler/tasks/mod.rs"]
mod tasks;

mod facts;
mod runs;
mod scores;
