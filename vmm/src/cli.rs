//! The command line.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{fd::IntoRawFd, unix::net::UnixListener},
    path::{Path, PathBuf},
    str::FromStr,
};

use anyhow::{Context, bail};
use bulkhead_vmm::config::{Config, Console, Disk, Fd, Policy, Share, Vsock};
use clap::Parser;

const EXAMPLES: &str = "\
Examples:
  A kernel with a console on this terminal (Ctrl-A x quits):
    bulkhead-vmm --kernel vmlinux --initramfs root.cpio --console \\
      --cmdline 'console=hvc0 reboot=k'
  Two processors, 1 GiB, a disk that the guest cannot write, a shared directory:
    bulkhead-vmm --kernel vmlinux --cpus 2 --memory 1G --console --rng \\
      --disk root.ext4:ro --share data=/srv/data \\
      --cmdline 'console=hvc0 root=/dev/vda ro'

Exit status:
  0 power off, 10 reboot, 11 guest panic, 12 triple fault, 13 KVM error,
  14 unknown exit, 15 refused, 16 device failed, 17 parent gone,
  18 blocked system call";

/// Runs one virtual machine with KVM, as long as its guest does.
#[derive(Debug, Parser)]
#[command(version, about, after_help = EXAMPLES, arg_required_else_help = true)]
pub(crate) struct Cli {
    /// Read the configuration, as JSON, from this inherited descriptor
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(3..), conflicts_with_all = ["kernel", "initramfs", "cmdline", "share", "disk", "vsock"])]
    pub(crate) config_fd: Option<i32>,

    /// Kernel: an uncompressed x86-64 ELF file (vmlinux)
    #[arg(long, value_name = "FILE", required_unless_present = "config_fd")]
    pub(crate) kernel: Option<PathBuf>,

    /// Initial RAM file system: a cpio archive
    #[arg(long, value_name = "FILE")]
    initramfs: Option<PathBuf>,

    /// Kernel command line; the virtio devices are added to it
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "console=hvc0 reboot=k panic=-1"
    )]
    cmdline: String,

    /// Guest memory: MiB, or a number with M or G
    #[arg(long, value_name = "SIZE", default_value = "256M")]
    memory: Mib,

    /// Virtual processors
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u8,

    /// A virtio console (hvc0) on standard input and output
    #[arg(long)]
    console: bool,

    /// A serial port (ttyS0) that prints to standard output
    #[arg(long)]
    pub(crate) serial: bool,

    /// An entropy device
    #[arg(long)]
    rng: bool,

    /// A raw disk image or block device; may be given again
    #[arg(long, value_name = "PATH[:ro]")]
    disk: Vec<String>,

    /// A directory that the guest mounts by its tag (virtiofs); may be given again
    #[arg(long, value_name = "TAG=DIR[:ro]")]
    share: Vec<String>,

    /// vsock device: programs connect to DIR/vsock.sock and write `CONNECT port`
    #[arg(long, value_name = "DIR")]
    vsock: Option<PathBuf>,

    /// Print what the machine cost as a JSON line on standard error
    #[arg(long)]
    pub(crate) stats: bool,
}

/// An amount of memory in MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mib(u32);

impl FromStr for Mib {
    type Err = String;

    fn from_str(text: &str) -> Result<Mib, String> {
        let (digits, factor) = match text.strip_suffix('G') {
            Some(digits) => (digits, 1024),
            None => (text.strip_suffix('M').unwrap_or(text), 1),
        };
        let number: Option<u32> = digits.parse().ok();
        number
            .and_then(|number| number.checked_mul(factor))
            .map(Mib)
            .ok_or_else(|| format!("{text:?} is no amount of memory such as 512M or 2G"))
    }
}

impl Cli {
    /// The configuration that the options stand for, with everything opened.
    /// `input` is where input for the console comes from.
    pub(crate) fn config(&self, input: impl FnOnce() -> io::Result<Fd>) -> anyhow::Result<Config> {
        let kernel = self.kernel.as_deref().unwrap_or_else(|| Path::new(""));
        let mut disks = Vec::new();
        for disk in &self.disk {
            let (path, read_only) = read_only(disk);
            let file = OpenOptions::new()
                .read(true)
                .write(!read_only)
                .open(path)
                .with_context(|| format!("Cannot open the disk {path:?}"))?;
            let fd = Fd(file.into_raw_fd());
            disks.push(Disk { fd, read_only });
        }
        let mut shares = Vec::new();
        for share in &self.share {
            let (share, read_only) = read_only(share);
            let Some((tag, dir)) = share.split_once('=') else {
                bail!("{share:?} is no share such as data=/srv/data");
            };
            shares.push(Share {
                tag: tag.to_owned(),
                dir: dir.into(),
                read_only,
                // Linux takes as many as it has processors.
                queues: self.cpus.clamp(1, 8),
                policy: Policy::Shared,
            });
        }
        Ok(Config {
            kvm: Fd(OpenOptions::new()
                .read(true)
                .write(true)
                .open("/dev/kvm")
                .context("Cannot open /dev/kvm")?
                .into_raw_fd()),
            kernel: open(kernel, "kernel")?,
            initramfs: self
                .initramfs
                .as_deref()
                .map(|path| open(path, "initramfs"))
                .transpose()?,
            cmdline: self.cmdline.clone(),
            vcpus: self.cpus,
            more_vcpus: 0,
            memory_mib: self.memory.0,
            more_memory_mib: 0,
            shares,
            vsock: self.vsock.as_deref().map(vsock).transpose()?,
            disks,
            places: 0,
            interfaces: 0,
            console: self.console.then(|| console(input)).transpose()?,
            rng: self.rng,
            // Only our own kernel would listen.
            notices: false,
            jail: None,
            control: None,
            report: None,
        })
    }
}

fn read_only(text: &str) -> (&str, bool) {
    text.strip_suffix(":ro")
        .map_or((text, false), |path| (path, true))
}

fn open(path: &Path, what: &str) -> anyhow::Result<Fd> {
    let file = File::open(path).with_context(|| format!("Cannot open the {what} {path:?}"))?;
    Ok(Fd(file.into_raw_fd()))
}

fn console(input: impl FnOnce() -> io::Result<Fd>) -> anyhow::Result<Console> {
    use std::os::fd::AsFd;
    let output = io::stdout().as_fd().try_clone_to_owned();
    Ok(Console {
        output: Some(Fd(output
            .context("Cannot use standard output")?
            .into_raw_fd())),
        input: Some(input().context("Cannot use standard input")?),
    })
}

fn vsock(dir: &Path) -> anyhow::Result<Vsock> {
    let path = dir.join("vsock.sock");
    let listener =
        UnixListener::bind(&path).with_context(|| format!("Cannot listen on {path:?}"))?;
    Ok(Vsock {
        guest_cid: 3,
        listener: Some(Fd(listener.into_raw_fd())),
        acceptor: None,
        ports: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn memory_is_given_in_mib_or_gib() {
        let check = |text: &str, mib| assert_eq!(text.parse::<Mib>().ok(), mib, "{text}");
        check("256", Some(Mib(256)));
        check("256M", Some(Mib(256)));
        check("2G", Some(Mib(2048)));
        check("", None);
        check("2T", None);
        check("-1", None);
        check("4194304G", None);
    }

    #[test]
    fn only_a_last_ro_makes_read_only() {
        assert_eq!(read_only("/a:ro"), ("/a", true));
        assert_eq!(read_only("/a:rox"), ("/a:rox", false));
        assert_eq!(read_only("/ro"), ("/ro", false));
    }
}
