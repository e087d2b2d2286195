//! The command line of a compiled model.
//!
//! The executable's `main`, which the compiler writes, calls [`moec_app_main`] with its arguments and the model's
//! descriptor; everything else is found from there. Linked as a static library that is carried inside the compiler.
//!
//! Deliberately absent: what a command computes, which is the runtime's; and anything about one particular model.
#![warn(missing_docs)]

mod args;
mod commands;
mod embedding;
mod expert_stats;
mod failure;
mod interrupt;
mod machine;
mod output;
mod progress;
mod serve;

use moec_abi::ModelDescriptor;
use moec_runtime::PayloadSource;
use std::ffi::{CStr, OsString, c_char, c_int};
use std::os::unix::ffi::OsStringExt;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs the command line of a compiled model; returns the exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
///
/// # Safety
/// `argv` holds `argc` C strings (or `argc` is 0), and `model` is the descriptor that a generated object exports.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moec_app_main(
    argc: c_int,
    argv: *const *const c_char,
    model: *const ModelDescriptor,
) -> c_int {
    // SAFETY: the caller vouches for `argv`.
    let args = unsafe { arguments(argc, argv) };
    let run = || {
        output::ignore_broken_pipes();
        // SAFETY: the caller vouches for the descriptor.
        unsafe { run(args, model, PayloadSource::Executable) }
    };
    // The panic hook has printed what happened.
    catch_unwind(AssertUnwindSafe(run)).unwrap_or(1)
}

/// # Safety
/// As for [`moec_app_main`].
unsafe fn arguments(argc: c_int, argv: *const *const c_char) -> Vec<OsString> {
    let count = if argv.is_null() { 0 } else { usize::try_from(argc).unwrap_or(0) };
    (0..count)
        .map(|i| {
            // SAFETY: the caller vouches for `count` C strings.
            let arg = unsafe { CStr::from_ptr(*argv.add(i)) };
            OsString::from_vec(arg.to_bytes().to_vec())
        })
        .collect()
}

/// # Safety
/// `model` as for [`moec_app_main`].
unsafe fn run(args: Vec<OsString>, model: *const ModelDescriptor, payload: PayloadSource) -> c_int {
    let cli = match args::parse(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Help goes to stdout and is no failure; usage errors go to stderr.
            error.print().ok();
            return error.exit_code();
        }
    };
    // SAFETY: the caller vouches for the descriptor.
    match unsafe { commands::dispatch(&cli, model, payload) } {
        Ok(status) => status,
        Err(failure) => failure.report(),
    }
}
