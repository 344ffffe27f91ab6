//! `bulkhead-agent`: PID 1 of the guest, or with the argument `init` the helper
//! that becomes a container's process.

use std::{env, process::ExitCode};

use bulkhead_agent::{boot, init};

fn main() -> ExitCode {
    let mut arguments = env::args_os().skip(1);
    if arguments.next().is_some_and(|first| first == "init") {
        return init::main();
    }
    boot::main()
}
