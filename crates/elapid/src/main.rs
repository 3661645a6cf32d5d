//! The command line.

use std::process::ExitCode;

fn main() -> ExitCode {
    elapid::commands::main(std::env::args_os())
}
