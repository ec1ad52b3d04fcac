//! What every command line of these examples does with options and errors.

use super::error::Result;
use super::fail::fail;
use super::threads::tame_candle;
use clap::Parser;
use std::process::ExitCode;

/// The program: parses options and does the work with them. What went wrong is told in one line,
/// with exit code 2.
///
/// # Safety
/// Called first in `main`: the caller is the only thread.
pub unsafe fn main<A: Parser>(work: impl FnOnce(&A) -> Result<()>) -> ExitCode {
    // SAFETY: there is no other thread, as the caller promises.
    unsafe { tame_candle() };
    let args = match A::try_parse() {
        Ok(args) => args,
        Err(error) if !error.use_stderr() => {
            print!("{error}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            // The first paragraph says what is wrong; usage follows.
            let text = error.to_string();
            return fail(text.split("\n\n").next().unwrap_or_default());
        }
    };
    match work(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&format!("error: {error}")),
    }
}
