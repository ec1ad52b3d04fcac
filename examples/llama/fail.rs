//! How a program ends that cannot do what it was asked for.

use std::io::Write;
use std::process::ExitCode;

/// Says why in one line on standard error; the exit code is 2.
pub fn fail(why: &str) -> ExitCode {
    let line = why.split_whitespace().collect::<Vec<_>>().join(" ") + "\n";
    // In one piece, so that the lines of processes do not mix. With standard error closed, the exit
    // code tells.
    let _ = std::io::stderr().write_all(line.as_bytes());
    ExitCode::from(2)
}
