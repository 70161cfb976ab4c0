//! argv -> [`weft::cli`] -> exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    let argv: Vec<String> = std::env::args_os().map(|a| a.to_string_lossy().into_owned()).collect();
    weft::cli::main(&argv)
}
