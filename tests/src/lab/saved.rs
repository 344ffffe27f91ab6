//! The lab host, booted once and saved.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use bulkhead_guest::Progress;

use super::disk::Contents;
use super::emulator::Emulator;
use super::image::Image;
use super::machine::{self, Clock, Machine, Parts};
use super::session::Lab;
use super::{root, store};
use bulkhead_guest::cache::{self, Entry};

/// Differences of the disk to the root disk.
pub(crate) const DISK: &str = "disk.qcow2";
/// The machine's state, as QEMU writes it.
pub(crate) const STATE: &str = "state";

/// Longest time for the first boot.
const BOOT_TIMEOUT: Duration = Duration::from_secs(600);
/// Longest time for a step of the preparation, which has shorter deadlines itself.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(2400);

/// What is done in the lab host before it is saved.
const PREPARE: &str = include_str!("guest/prepare");

/// The saved lab host with its programs, and its images known to its containerd: out
/// of the cache, or booted now. It is named by the content of all that.
pub(crate) fn ensure(
    lab: &Lab,
    emulator: &Emulator,
    root: &Entry,
    progress: &dyn Progress,
) -> Result<Entry> {
    let Lab {
        cache,
        programs,
        images,
        accelerator,
    } = lab;
    let fingerprint = machine::fingerprint(emulator, *accelerator);
    let configuration = programs.configuration();
    let mut parts = vec![root.content(), &fingerprint, PREPARE, configuration];
    parts.extend(programs.contents());
    parts.extend(images.iter().map(Image::content));
    cache.entry("lab-state", &cache::key(parts), progress, |entry, work| {
        let [kernel, initrd, disk] = root::paths(root);
        let overlay = entry.join(DISK);
        machine::overlay(&disk, "qcow2", &overlay)?;
        let store = store::disk(None, work)?;
        let second = work.join("second.img");
        let mut contents = Contents::default()
            .with_file("prepare", PREPARE, 0o755)
            .with_file("containerd.toml", configuration, 0o644);
        for directory in programs.directories() {
            contents = contents.with_content("programs", directory);
        }
        for image in images {
            contents = contents.with(Path::new("images").join(image.name), image.layout());
        }
        contents.write(&second)?;

        progress.step("Booting the lab host for the first time");
        let mut machine = Machine::start(
            emulator,
            &Parts {
                kernel: &kernel,
                initrd: &initrd,
                disk: &overlay,
                second: &second,
                store: &store,
                state: None,
                clock: Clock::Wall,
                accelerator: *accelerator,
                directory: work,
            },
        )?;
        machine.ready(BOOT_TIMEOUT, progress)?;
        machine.go("prepare")?;
        machine.ready(PREPARE_TIMEOUT, progress)?;
        progress.step("Saving the lab host");
        let mut monitor = machine.monitor()?;
        monitor.save(STATE)?;
        monitor.quit()?;
        machine.wait()?;
        std::fs::rename(work.join(STATE), entry.join(STATE))?;
        Ok(())
    })
}
