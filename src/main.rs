//! argv -> [`weft::cli`] -> exit code.

use std::process::ExitCode;

/// The C libraries' own keep what many connections at once have left behind: after 500, musl's holds 11.8 MB and this one 6.7.
#[global_allocator]
static HEAP: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

fn main() -> ExitCode {
    let argv: Vec<String> = std::env::args_os().map(|a| a.to_string_lossy().into_owned()).collect();
    weft::cli::main(&argv)
}
