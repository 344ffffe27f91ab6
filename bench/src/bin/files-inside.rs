//! `bench-files-inside DIR`: operations on files in `DIR`, and what each took in
//! nanoseconds, a line each. A static program: it runs in any container, and as the first
//! process of a virtual machine, where it mounts the virtio-fs of the tag `share`.

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

fn main() -> Result<()> {
    let first = std::process::id() == 1;
    let place = if first {
        prepare()?
    } else {
        PathBuf::from(
            std::env::args()
                .nth(1)
                .context("Usage: bench-files-inside DIR")?,
        )
    };
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
    let small: Vec<PathBuf> = (0..FILES)
        .map(|number| {
            tree.join((number % FOLDERS).to_string())
                .join(number.to_string())
        })
        .collect();
    let step = |name: &str, work: &mut dyn FnMut() -> Result<()>| -> Result<()> {
        let began = Instant::now();
        work().with_context(|| name.to_owned())?;
        println!("{name} {}", began.elapsed().as_nanos());
        Ok(())
    };
    step("create 1000 files", &mut || {
        for folder in 0..FOLDERS {
            fs::create_dir_all(tree.join(folder.to_string()))?;
        }
        for path in &small {
            File::create_new(path)?.write_all(&SMALL)?;
        }
        Ok(())
    })?;
    find(&tree, false)?;
    step("find, warm", &mut || find(&tree, false).map(drop))?;
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
    let large = place.join("large");
    let piece = vec![b'l'; 1 << 20];
    step("write 64 MiB", &mut || {
        let mut file = File::create(&large)?;
        for _ in 0..LARGE_MIB {
            file.write_all(&piece)?;
        }
        Ok(())
    })?;
    step("read 64 MiB just written", &mut || {
        let mut file = File::open(&large)?;
        let mut buffer = vec![0; 1 << 20];
        while file.read(&mut buffer)? > 0 {}
        Ok(())
    })?;
    step("write 8 MiB, each synced", &mut || {
        let mut file = File::create(place.join("synced"))?;
        for _ in 0..SYNCED_MIB {
            file.write_all(&piece)?;
            file.sync_all()?;
        }
        Ok(())
    })?;
    step("remove 1000 files", &mut || {
        for path in &small {
            fs::remove_file(path)?;
        }
        fs::remove_dir_all(&tree)?;
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
