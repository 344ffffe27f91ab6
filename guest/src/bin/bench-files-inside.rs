//! `bench-files-inside DIR`: operations on files in `DIR`; for each a line with what it
//! took in nanoseconds and how many interrupts of file systems came meanwhile. A static
//! program: it runs in any container, and without `DIR` as the first process of a virtual
//! machine, where it mounts the virtio-fs of the tag `share`.

#![expect(clippy::print_stdout, reason = "the lines are what it is for")]

use std::{
    fs::{self, File},
    io::{Read, Write},
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result};

const FOLDERS: usize = 10;
const FILES: usize = 1000;
const SMALL: [u8; 512] = [b's'; 512];
const LARGE_MIB: usize = 64;
const SYNCED_MIB: usize = 8;

/// The number of a file system among virtio's devices, as sysfs shows it.
const FILE_SYSTEM: &str = "0x001a";

fn main() -> Result<()> {
    // A container's first process has a number like that of a machine.
    let given = std::env::args().nth(1).filter(|dir| dir.starts_with('/'));
    let first = given.is_none();
    let place = given.map_or_else(prepare, |dir| Ok(PathBuf::from(dir)))?;
    let result = measure(&place);
    if let Err(error) = &result {
        println!("failed {error:#}");
    }
    if first {
        rustix::system::reboot(rustix::system::RebootCommand::Restart)?;
    }
    result
}

/// As the first process: mounts what is needed.
fn prepare() -> Result<PathBuf> {
    let flags = rustix::mount::MountFlags::empty();
    for (kind, source, target) in [
        ("proc", "proc", "/proc"),
        ("sysfs", "sys", "/sys"),
        ("devtmpfs", "dev", "/dev"),
        ("virtiofs", "share", "/share"),
    ] {
        fs::create_dir_all(target)?;
        // The kernel may have mounted /dev already.
        let mounted = rustix::mount::mount(source, target, kind, flags, None);
        if kind == "virtiofs" {
            mounted.context("Cannot mount the share")?;
        }
    }
    Ok(PathBuf::from("/share"))
}

fn measure(place: &Path) -> Result<()> {
    let tree = place.join("tree");
    let folder = |number: usize| tree.join((number % FOLDERS).to_string());
    let paths = |suffix: &str| -> Vec<PathBuf> {
        (0..FILES)
            .map(|number| folder(number).join(format!("{number}{suffix}")))
            .collect()
    };
    let (empty, small, moved) = (paths("e"), paths(""), paths("m"));
    let devices = file_systems()?;
    let step = |name: &str, work: &mut dyn FnMut() -> Result<()>| -> Result<()> {
        let interrupts = interrupts(&devices)?;
        let began = Instant::now();
        work().with_context(|| name.to_owned())?;
        let took = began.elapsed().as_nanos();
        let interrupts = self::interrupts(&devices)?.saturating_sub(interrupts);
        println!("{name} {took} {interrupts}");
        Ok(())
    };
    for number in 0..FOLDERS {
        fs::create_dir_all(folder(number))?;
    }
    step("create 1000 empty files", &mut || {
        for path in &empty {
            // As touch(1) and the shell do it.
            File::options().append(true).create(true).open(path)?;
        }
        Ok(())
    })?;
    step("create 1000 of 512 bytes", &mut || {
        for path in &small {
            File::create(path)?.write_all(&SMALL)?;
        }
        Ok(())
    })?;
    // Reading a directory changes its time of access, which the second pass asks for.
    find(&tree, false)?;
    find(&tree, false)?;
    step("find, warm", &mut || find(&tree, false).map(drop))?;
    // Writing has changed the attributes: they are asked for once more.
    find(&tree, true)?;
    step("ls -lR, warm", &mut || find(&tree, true).map(drop))?;
    step("stat 1000 files, warm", &mut || {
        for path in &small {
            path.symlink_metadata()?;
        }
        Ok(())
    })?;
    let read = || -> Result<()> {
        let mut buffer = [0; 4096];
        for path in &small {
            let mut file = File::open(path)?;
            while file.read(&mut buffer)? > 0 {}
        }
        Ok(())
    };
    read()?;
    step("read 1000 files, warm", &mut || read())?;
    step("rename 1000 files", &mut || {
        for (from, to) in small.iter().zip(&moved) {
            fs::rename(from, to)?;
        }
        Ok(())
    })?;
    step("remove 2000 files", &mut || {
        for path in empty.iter().chain(&moved) {
            fs::remove_file(path)?;
        }
        Ok(())
    })?;
    step("make 1000 directories", &mut || {
        for path in &small {
            fs::create_dir(path)?;
        }
        Ok(())
    })?;
    step("remove 1000 directories", &mut || {
        for path in &small {
            fs::remove_dir(path)?;
        }
        Ok(())
    })?;
    fs::remove_dir_all(&tree)?;

    let large = place.join("large");
    let piece = vec![b'l'; 1 << 20];
    step("write 64 MiB", &mut || {
        let mut file = File::create(&large)?;
        for _ in 0..LARGE_MIB {
            file.write_all(&piece)?;
        }
        Ok(())
    })?;
    let mut buffer = vec![0; 1 << 20];
    let mut read = || -> Result<()> {
        let mut file = File::open(&large)?;
        while file.read(&mut buffer)? > 0 {}
        Ok(())
    };
    step("read 64 MiB just written", &mut read)?;
    step("read 64 MiB again", &mut read)?;
    step("write 8 MiB, each synced", &mut || {
        let mut file = File::create(place.join("synced"))?;
        for _ in 0..SYNCED_MIB {
            file.write_all(&piece)?;
            file.sync_all()?;
        }
        Ok(())
    })
}

/// Walks the tree: how many names there are.
fn find(folder: &Path, attributes: bool) -> Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        count += 1;
        if attributes {
            entry.metadata()?;
        }
        if entry.file_type()?.is_dir() {
            count += find(&entry.path(), attributes)?;
        }
    }
    Ok(count)
}

/// The names of virtio's file systems, such as `virtio1`; none where there are none.
fn file_systems() -> Result<Vec<String>> {
    let Ok(devices) = fs::read_dir("/sys/bus/virtio/devices") else {
        return Ok(Vec::new());
    };
    let mut names = Vec::new();
    for device in devices {
        let device = device?;
        let kind = fs::read_to_string(device.path().join("device"))?;
        if kind.trim() == FILE_SYSTEM {
            names.push(device.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(names)
}

/// Interrupts of these devices so far, on all processors.
fn interrupts(devices: &[String]) -> Result<u64> {
    if devices.is_empty() {
        return Ok(0);
    }
    let table = fs::read_to_string("/proc/interrupts")?;
    // Such as ` 6:   1234   0  IO-APIC  6-edge  virtio1`.
    let lines = table.lines().filter(|line| {
        let name = line.split_whitespace().last();
        name.is_some_and(|name| devices.iter().any(|device| device == name))
    });
    let counts = lines.flat_map(|line| {
        let words = line.split_whitespace().skip(1);
        words.map_while(|word| word.parse::<u64>().ok())
    });
    Ok(counts.sum())
}
