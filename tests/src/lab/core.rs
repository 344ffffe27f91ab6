//! The one processor of this machine that a lab host runs on.
//!
//! QEMU's emulation of SVM changes a word of pending interrupts without a lock
//! (`do_vmexit`, `helper_vmrun`: `interrupt_request`), while its other thread adds the
//! interrupt of a timer there. On two processors the one now and then undoes the other:
//! then the lab host's kernel waits for a tick that has gone, until something else
//! interrupts it, and a test hangs for its twenty minutes. On one processor such a
//! change, an instruction, is whole.

use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;

/// A processor that other lab hosts of this user keep clear of while there are enough.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) number: usize,
    /// Locked while this lives, if it is one for itself.
    _lock: Option<File>,
}

impl Core {
    /// Takes one; `folder` is where it is known which are taken.
    pub(crate) fn take(folder: &Path) -> Result<Core> {
        fs::create_dir_all(folder).with_context(|| format!("Cannot make {}", folder.display()))?;
        let allowed = sched_getaffinity(Pid::from_raw(0))?;
        let allowed = |number: &usize| allowed.is_set(*number).unwrap_or(false);
        let all: Vec<usize> = (0..CpuSet::count()).filter(allowed).collect();
        for number in &all {
            let lock = File::create(folder.join(number.to_string()))?;
            if lock.try_lock().is_ok() {
                return Ok(Core {
                    number: *number,
                    _lock: Some(lock),
                });
            }
        }
        let any = usize::try_from(std::process::id())? % all.len().max(1);
        let number = all.get(any).copied();
        Ok(Core {
            number: number.context("This process may run on no processor")?,
            _lock: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_lab_host_has_a_processor_for_itself_while_there_are_enough() {
        let folder = tempfile::tempdir().unwrap();
        let processors = std::thread::available_parallelism().unwrap().get();
        let take = || Core::take(folder.path()).unwrap();
        let cores: Vec<Core> = (0..processors).map(|_| take()).collect();
        let mut numbers: Vec<usize> = cores.iter().map(|core| core.number).collect();
        numbers.dedup();
        assert_eq!(numbers.len(), processors);
        let shared = take();
        assert!(numbers.contains(&shared.number));
        drop(cores);
        assert_eq!(take().number, numbers[0]);
    }
}
