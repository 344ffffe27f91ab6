//! The lab host, booted once and saved.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use bulkhead_guest_kernel::Progress;

use super::cache::{self, Cache, Entry};
use super::disk::Contents;
use super::emulator::Emulator;
use super::image::Image;
use super::machine::{self, Clock, Machine, Parts};
use super::{root, store};

/// Differences of the disk to the root disk.
pub(crate) const DISK: &str = "disk.qcow2";
/// The machine's state, as QEMU writes it.
pub(crate) const STATE: &str = "state";

/// Longest time for the first boot.
const BOOT_TIMEOUT: Duration = Duration::from_secs(300);
/// Longest time for importing the images.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(900);

/// The saved lab host with `images` known to its containerd: out of the cache,
/// or booted now.
pub(crate) fn ensure(
    cache: &Cache,
    emulator: &Emulator,
    root: &Entry,
    images: &[Image],
    progress: &dyn Progress,
) -> Result<Entry> {
    let fingerprint = machine::fingerprint(emulator);
    let (name, script) = root::prepare_script();
    let mut parts = vec![root.key(), &fingerprint, script];
    parts.extend(images.iter().map(Image::key));
    cache.entry("lab-state", &cache::key(parts), |entry| {
        let work = tempfile::Builder::new()
            .prefix("work-")
            .tempdir_in(entry.parent().context("An entry lies in a folder")?)?;
        let [kernel, initrd, disk] = root::paths(root);
        let overlay = entry.join(DISK);
        machine::overlay(&disk, "qcow2", &overlay)?;
        let store = store::disk(None, work.path())?;
        let second = work.path().join("second.img");
        let mut contents = Contents::default().with_script(name, script);
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
                directory: work.path(),
            },
        )?;
        machine.ready(BOOT_TIMEOUT)?;
        progress.step("Importing images in the lab host");
        machine.go(name)?;
        machine.ready(PREPARE_TIMEOUT)?;
        progress.step("Saving the lab host");
        let mut monitor = machine.monitor()?;
        monitor.save(STATE)?;
        monitor.quit()?;
        machine.wait()?;
        std::fs::rename(work.path().join(STATE), entry.join(STATE))?;
        Ok(())
    })
}
