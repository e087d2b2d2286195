//! Ctrl-C, SIGTERM and SIGHUP: the first one asks the command to end at the next token, the second one ends it.

use crate::failure::INTERRUPTED;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Starts listening; the flag is set when the user wants to end.
pub fn listen() -> Arc<AtomicBool> {
    let flag = Arc::new(AtomicBool::new(false));
    let set = flag.clone();
    // Where no handler can be installed the signals keep their usual effect, which is to end the process.
    ctrlc::set_handler(move || {
        if set.swap(true, Ordering::SeqCst) {
            std::process::exit(INTERRUPTED);
        }
    })
    .ok();
    flag
}

/// As [`listen`], for a program that goes on: while `busy` the signal sets the flag; a second one, or one at rest, calls
/// `before_end` and ends the process.
pub fn listen_while(busy: &Arc<AtomicBool>, before_end: impl Fn() + Send + 'static) -> Arc<AtomicBool> {
    let flag = Arc::new(AtomicBool::new(false));
    let (set, busy) = (flag.clone(), busy.clone());
    ctrlc::set_handler(move || {
        if set.swap(true, Ordering::SeqCst) || !busy.load(Ordering::SeqCst) {
            before_end();
            std::process::exit(INTERRUPTED);
        }
    })
    .ok();
    flag
}
