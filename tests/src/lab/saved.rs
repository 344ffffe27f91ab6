//! The lab host, booted once and saved; and saved again with its containerd, which a
//! person who only runs a container does not wait for.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use bulkhead_guest::Progress;

use super::disk::Contents;
use super::emulator::Emulator;
use super::image::Image;
use super::machine::{self, Clock, Machine, Parts};
use super::programs::Programs;
use super::session::{CORES, Lab};
use super::{root, store};
use bulkhead_guest::cache::{self, Entry};

/// Differences of the disk to the one below.
const DISK: &str = "disk.qcow2";
/// The machine's state, as QEMU writes it.
const STATE: &str = "state";

/// Longest time for the first boot.
const BOOT_TIMEOUT: Duration = Duration::from_secs(600);
/// Longest time for a step of the preparation, which has shorter deadlines itself.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(2400);

/// What both of the next need.
const STEPS: &str = include_str!("guest/steps");
/// What is done in the lab host when it has booted.
const PREPARE: &str = include_str!("guest/prepare");
/// What is done to have its containerd.
const CONTAINERD: &str = include_str!("guest/containerd");

/// A saved lab host.
#[derive(Debug)]
pub(crate) struct Saved {
    entry: Entry,
    /// What its disk lies on.
    _below: Option<Entry>,
}

impl Saved {
    /// Its disk: a qcow2 file.
    pub(crate) fn disk(&self) -> PathBuf {
        self.entry.file(DISK)
    }

    /// Its state, for QEMU.
    pub(crate) fn state(&self) -> PathBuf {
        self.entry.file(STATE)
    }
}

/// The saved lab host with its images and, if it shall have programs, with these and the
/// images known to its containerd: out of the cache, or booted now. It is named by the
/// content of all that.
pub(crate) fn ensure(
    lab: &Lab,
    emulator: &Emulator,
    root: &Entry,
    progress: &dyn Progress,
) -> Result<Saved> {
    let maker = Maker {
        lab,
        emulator,
        root,
        progress,
    };
    let booted = maker.booted()?;
    Ok(match &lab.programs {
        Some(programs) => Saved {
            entry: maker.with_programs(programs, &booted)?,
            _below: Some(booted),
        },
        None => Saved {
            entry: booted,
            _below: None,
        },
    })
}

struct Maker<'a> {
    lab: &'a Lab,
    emulator: &'a Emulator,
    root: &'a Entry,
    progress: &'a dyn Progress,
}

impl Maker<'_> {
    fn booted(&self) -> Result<Entry> {
        let Lab { cache, images, .. } = self.lab;
        let fingerprint = machine::fingerprint(self.emulator, self.lab.accelerator);
        let mut parts = vec![self.root.content(), &fingerprint, STEPS, PREPARE];
        parts.extend(images.iter().map(Image::content));
        let key = cache::key(parts);
        cache.entry("lab-booted", &key, self.progress, |entry, work| {
            let mut contents = contents(PREPARE);
            for image in images {
                contents = contents.with(Path::new("images").join(image.name), image.layout());
            }
            self.save(None, &contents, entry, work)
        })
    }

    fn with_programs(&self, programs: &Programs, booted: &Entry) -> Result<Entry> {
        let cache = &self.lab.cache;
        let configuration = programs.configuration();
        let mut parts = vec![booted.content(), STEPS, CONTAINERD, configuration];
        parts.extend(programs.contents());
        let key = cache::key(parts);
        cache.entry("lab-state", &key, self.progress, |entry, work| {
            let mut contents =
                contents(CONTAINERD).with_file("containerd.toml", configuration, 0o644);
            for directory in programs.directories() {
                contents = contents.with_content("programs", directory);
            }
            self.save(Some(booted), &contents, entry, work)
        })
    }

    /// Boots the lab host, or lets the one in `before` go on, runs the program of
    /// `contents` in it, and saves it in the new entry.
    fn save(
        &self,
        before: Option<&Entry>,
        contents: &Contents,
        entry: &Path,
        work: &Path,
    ) -> Result<()> {
        let progress = self.progress;
        let [kernel, initrd, disk] = root::paths(self.root);
        let disk = before.map_or(disk, |before| before.file(DISK));
        let overlay = entry.join(DISK);
        machine::overlay(&disk, "qcow2", &overlay)?;
        let store = store::disk(None, work)?;
        let second = work.join("second.img");
        contents.write(&second)?;
        let state = before.map(|before| before.file(STATE));

        progress.step(match state {
            Some(_) => "Restoring the lab host",
            None => "Booting the lab host for the first time",
        });
        let mut machine = Machine::start(
            self.emulator,
            &Parts {
                kernel: &kernel,
                initrd: &initrd,
                disk: &overlay,
                second: &second,
                store: &store,
                state: state.as_deref(),
                clock: Clock::Wall,
                accelerator: self.lab.accelerator,
                cores: &self.lab.cache.path().join(CORES),
                directory: work,
            },
        )?;
        if state.is_none() {
            machine.ready(BOOT_TIMEOUT, progress)?;
        }
        machine.go("program")?;
        machine.ready(PREPARE_TIMEOUT, progress)?;
        progress.step("Saving the lab host");
        let mut monitor = machine.monitor()?;
        monitor.save(STATE)?;
        monitor.quit()?;
        machine.wait()?;
        std::fs::rename(work.join(STATE), entry.join(STATE))?;
        Ok(())
    }
}

/// A second disk with this program.
fn contents(program: &str) -> Contents {
    Contents::default()
        .with_file("program", program, 0o755)
        .with_file("steps", STEPS, 0o644)
}
