//! The command line: words, defaults and help. No behaviour.

pub(crate) mod network;

use std::{path::PathBuf, str::FromStr};

use bulkhead_client::ContainerId;
use clap::{Args, Parser, Subcommand};

/// Run containers, each in a virtual machine of its own.
#[derive(Debug, Parser)]
#[command(
    name = "bulkhead",
    version,
    max_term_width = 100,
    arg_required_else_help = true
)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a command in a new container.
    Run(Box<Run>),
    /// Run one more command in a running container.
    Exec(Exec),
    /// Send a signal to the first process of a container.
    Kill(Kill),
    /// Remove containers that have ended, with their files.
    Rm(Rm),
    /// List containers.
    #[command(visible_alias = "ps")]
    List(List),
    /// Let every process of a container stand still.
    Pause(Paused),
    /// Let the processes of a paused container go on.
    Resume(Paused),
    /// Change limits of a container.
    Update(Update),
    /// Show what containers have used.
    Stats(Stats),
    /// Look after the networks of containers.
    #[command(subcommand)]
    Network(network::Verb),
    /// Say whether this host can run containers in virtual machines, and if not why.
    Check(Check),
    /// Say what became of each field of a container's specification.
    Explain(Explain),
    /// Name the runtime in the configuration of containerd or Docker.
    Install(Install),
    /// Let the shims of pods that run go on with the program that is installed now.
    Upgrade(Upgrade),
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Write the manual pages into a directory.
    Man {
        /// The directory; it must exist.
        dir: PathBuf,
    },
}

/// Options of every process, the first one and an exec.
#[derive(Debug, Default, Args)]
pub(crate) struct Process {
    /// Give the command a terminal.
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Pass standard input on.
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Set a variable; without =VALUE it is passed on from here.
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<String>,
    /// Directory in the container where the command starts.
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// User, by name or number, and group of the command.
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,
}

const RUN_EXAMPLES: &str = "\
Examples:
  bulkhead run debian.tar -- cat /etc/os-release
  bulkhead run --rm -ti debian.tar -- bash
  bulkhead run --rm -v $PWD:/src:ro -w /src --memory 1g --cpus 2 gcc.tar -- make
  bulkhead run --rootfs /srv/rootfs -- /bin/sh -c 'uname -a'
  bulkhead run --rm --device /dev/sdb:r debian.tar -- head -c 512 /dev/sdb
  bulkhead run --rm -p 8080:80 --name web nginx.tar
  tar c . | bulkhead run --rm -i debian.tar -- tar t

The exit code is that of the command; 127 if it does not exist, 126 if it cannot be executed,
125 if bulkhead itself failed.";

/// Options of `run`.
#[derive(Debug, Args)]
#[command(after_help = RUN_EXAMPLES)]
pub(crate) struct Run {
    /// The image: an OCI image layout (a directory or a tar of one) or a tar of `docker save`.
    #[arg(required_unless_present_any = ["rootfs", "bundle"], conflicts_with_all = ["rootfs", "bundle"])]
    pub(crate) image: Option<PathBuf>,
    /// Take this directory as the root file system, and let the container write to it.
    #[arg(long, value_name = "DIR", conflicts_with = "bundle")]
    pub(crate) rootfs: Option<PathBuf>,
    /// Run an OCI bundle (config.json and a root file system) as it is.
    #[arg(
        long,
        value_name = "DIR",
        conflicts_with_all = ["env", "volume", "device", "workdir", "user", "cpus", "memory", "network", "publish", "dns", "hostname", "add_host", "ip", "read_only", "command", "tty"],
    )]
    pub(crate) bundle: Option<PathBuf>,
    /// The process.
    #[command(flatten)]
    pub(crate) process: Process,
    /// Show a directory or file of the host in the container.
    #[arg(short, long, value_name = "SRC:DST[:ro]")]
    pub(crate) volume: Vec<Volume>,
    /// Give the container a disk of the host (or /dev/fuse, /dev/net/tun); r: to read only.
    #[arg(long, value_name = "PATH[:DST][:r]")]
    pub(crate) device: Vec<Device>,
    /// Processors, such as 2 or 0.5.
    #[arg(long, value_name = "N")]
    pub(crate) cpus: Option<Cpus>,
    /// Memory, such as 512m or 2g (powers of 1024).
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory: Option<Memory>,
    /// Remove the container and its files when it ends.
    #[arg(long)]
    pub(crate) rm: bool,
    /// Name of the container; a random one if not given.
    #[arg(long, value_name = "ID")]
    pub(crate) name: Option<ContainerId>,
    /// The network.
    #[command(flatten)]
    pub(crate) network: network::Options,
    /// Refuse writes to the root file system.
    #[arg(long)]
    pub(crate) read_only: bool,
    /// The command and its arguments, in place of the image's.
    #[arg(last = true, value_name = "CMD")]
    pub(crate) command: Vec<String>,
}

/// Options of `exec`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  bulkhead exec web ps\n  bulkhead exec -ti web sh")]
pub(crate) struct Exec {
    /// The process.
    #[command(flatten)]
    pub(crate) process: Process,
    /// The container.
    pub(crate) id: ContainerId,
    /// The command and its arguments.
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "CMD"
    )]
    pub(crate) command: Vec<String>,
}

/// Options of `kill`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  bulkhead kill web\n  bulkhead kill web HUP")]
pub(crate) struct Kill {
    /// The container.
    pub(crate) id: ContainerId,
    /// A name, with or without SIG, or a number.
    #[arg(default_value = "TERM")]
    pub(crate) signal: crate::signal::Number,
}

/// Options of `rm`.
#[derive(Debug, Args)]
pub(crate) struct Rm {
    /// Kill a container that still runs.
    #[arg(short, long)]
    pub(crate) force: bool,
    /// The containers.
    #[arg(required = true)]
    pub(crate) ids: Vec<ContainerId>,
}

/// Options of `list`.
#[derive(Debug, Args)]
pub(crate) struct List {
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of `pause` and `resume`.
#[derive(Debug, Args)]
pub(crate) struct Paused {
    /// The container.
    pub(crate) id: ContainerId,
}

/// Options of `update`: what is not given stays as it is.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  bulkhead update --memory 1g --cpus 1.5 web\n  bulkhead update --pids 200 web"
)]
#[group(required = true, multiple = true, args = ["cpus", "memory", "pids"])]
pub(crate) struct Update {
    /// The container.
    pub(crate) id: ContainerId,
    /// Processors, such as 2 or 0.5; no more than its virtual machine has.
    #[arg(long, value_name = "N")]
    pub(crate) cpus: Option<Cpus>,
    /// Memory, such as 512m or 2g (powers of 1024); no more than its virtual machine has.
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory: Option<Memory>,
    /// Processes and threads; -1 for no limit.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub(crate) pids: Option<i64>,
}

/// Options of `stats`.
#[derive(Debug, Args)]
pub(crate) struct Stats {
    /// How to print it.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(crate) format: Format,
    /// The containers; all that run if none is given.
    pub(crate) ids: Vec<ContainerId>,
}

/// How something is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// For people.
    Table,
    /// For programs.
    Json,
}

impl Format {
    /// What a flag `--json` stands for.
    pub(crate) fn of(json: bool) -> Format {
        if json { Format::Json } else { Format::Table }
    }
}

/// Options of `check`.
#[derive(Debug, Args)]
pub(crate) struct Check {
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

const EXPLAIN_EXAMPLES: &str = "\
Examples:
  bulkhead explain web
  bulkhead explain --namespace k8s.io 4f1e… --format json
  bulkhead explain --bundle DIR          what would become of it";

/// Options of `explain`.
#[derive(Debug, Args)]
#[command(after_help = EXPLAIN_EXAMPLES)]
pub(crate) struct Explain {
    /// The container, whoever started it.
    #[arg(required_unless_present = "bundle", conflicts_with = "bundle")]
    pub(crate) id: Option<ContainerId>,
    /// containerd's namespace, if containers of several have this id.
    #[arg(long, value_name = "NAME", conflicts_with = "bundle")]
    pub(crate) namespace: Option<String>,
    /// A bundle that need not run.
    #[arg(long, value_name = "DIR")]
    pub(crate) bundle: Option<PathBuf>,
    /// How it is printed.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(crate) format: Format,
}

const INSTALL_EXAMPLES: &str = "\
Examples:
  bulkhead install containerd --dry-run
  bulkhead install docker
  bulkhead install containerd --remove

What else stands in a file stays as it is. containerd finds the runtime without this where it is
named by its type: ctr run --runtime io.containerd.bulkhead.v2 IMAGE ID";

/// Options of `install`.
#[derive(Debug, Args)]
#[command(after_help = INSTALL_EXAMPLES)]
pub(crate) struct Install {
    /// Whose configuration.
    #[arg(value_enum)]
    pub(crate) engine: Engine,
    /// What the runtime is called there.
    #[arg(long, value_name = "NAME", default_value = "bulkhead", value_parser = runtime_name)]
    pub(crate) name: String,
    /// The engine's configuration file, if it is not at its usual place.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Print what would be written, and write nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Take the name away again.
    #[arg(long)]
    pub(crate) remove: bool,
}

/// Who starts containers by us.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Engine {
    /// containerd, for Kubernetes by its CRI plug-in.
    Containerd,
    /// Docker's daemon.
    Docker,
}

const UPGRADE_EXAMPLES: &str = "\
Examples:
  bulkhead upgrade                     every pod of this host
  bulkhead upgrade --namespace k8s.io
  bulkhead upgrade web --format json

Containers run on, and whoever waits or reads notices nothing. What runs the virtual machine, and
what runs in it, stays as it was until the pod ends. The exit code is 125 if a shim goes on with
the program that it has.";

/// Options of `upgrade`.
#[derive(Debug, Args)]
#[command(after_help = UPGRADE_EXAMPLES)]
pub(crate) struct Upgrade {
    /// Containers, whoever started them; their pods are meant. All if none is given.
    pub(crate) ids: Vec<ContainerId>,
    /// Only pods of this namespace of containerd.
    #[arg(long, value_name = "NAME")]
    pub(crate) namespace: Option<String>,
    /// How the outcome is printed.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(crate) format: Format,
}

/// Kubernetes takes a handler's name for a DNS label.
fn runtime_name(text: &str) -> Result<String, String> {
    let byte = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let ends = [text.bytes().next(), text.bytes().last()];
    if text.len() <= 63 && text.bytes().all(byte) && !ends.contains(&Some(b'-')) && !text.is_empty()
    {
        Ok(text.to_owned())
    } else {
        Err("a name is 1 to 63 lower-case letters, digits and hyphens inside".to_owned())
    }
}

/// May the container write to a volume?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// No.
    ReadOnly,
    /// Yes.
    ReadWrite,
}

/// A directory or file of the host, and where it appears.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Volume {
    /// On the host; may be relative.
    pub(crate) source: PathBuf,
    /// In the container; absolute.
    pub(crate) destination: String,
    /// Writable or not.
    pub(crate) access: Access,
}

impl FromStr for Volume {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(':');
        let (Some(source), Some(destination)) = (parts.next(), parts.next()) else {
            return Err("a volume is SRC:DST or SRC:DST:ro".to_owned());
        };
        let access = match (parts.next(), parts.next()) {
            (None | Some("rw"), None) => Access::ReadWrite,
            (Some("ro"), None) => Access::ReadOnly,
            _ => return Err("after SRC:DST only :ro or :rw can follow".to_owned()),
        };
        if source.is_empty() {
            return Err("the source is empty; name a directory or file of the host".to_owned());
        }
        if !destination.starts_with('/') {
            return Err(format!(
                "the destination {destination:?} is not an absolute path"
            ));
        }
        Ok(Volume {
            source: source.into(),
            destination: destination.to_owned(),
            access,
        })
    }
}

/// A device of the host, and where it appears.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Device {
    /// On the host.
    pub(crate) source: PathBuf,
    /// In the container; absolute.
    pub(crate) destination: String,
    /// Writable or not.
    pub(crate) access: Access,
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts: Vec<&str> = text.split(':').collect();
        let access = match parts.last() {
            // With or without the right to make nodes, as others write it.
            Some(&("r" | "rm")) => Some(Access::ReadOnly),
            Some(&("rw" | "rwm")) => Some(Access::ReadWrite),
            _ => None,
        };
        if access.is_some() {
            parts.pop();
        }
        let (source, destination) = match parts[..] {
            [source] => (source, source),
            [source, destination] => (source, destination),
            _ => return Err("a device is PATH, PATH:DST, PATH:r or PATH:DST:r".to_owned()),
        };
        if let Some(bad) = [source, destination]
            .iter()
            .find(|path| !path.starts_with('/'))
        {
            return Err(format!("{bad:?} is not an absolute path"));
        }
        Ok(Device {
            source: source.into(),
            destination: destination.to_owned(),
            access: access.unwrap_or(Access::ReadWrite),
        })
    }
}

/// Processor time, in thousandths of a processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cpus {
    /// 10 to 64,000.
    pub(crate) thousandths: u32,
}

impl FromStr for Cpus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
        let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
        if text.is_empty()
            || whole.is_empty()
            || fraction.len() > 3
            || !digits(whole)
            || !digits(fraction)
        {
            return Err("give a number such as 2 or 0.5".to_owned());
        }
        let whole: u32 = whole
            .parse()
            .map_err(|_| "at most 64 processors".to_owned())?;
        let fraction: u32 = format!("{fraction:0<3}")
            .parse()
            .map_err(|_| "give a number".to_owned())?;
        match whole
            .checked_mul(1000)
            .and_then(|whole| whole.checked_add(fraction))
        {
            Some(thousandths @ 10..=64_000) => Ok(Cpus { thousandths }),
            _ => Err("it must lie between 0.01 and 64".to_owned()),
        }
    }
}

/// An amount of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Memory {
    /// At least 4 MiB.
    pub(crate) bytes: u64,
}

impl FromStr for Memory {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let end = text
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(end);
        let shift = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kb" | "ki" | "kib" => 10,
            "m" | "mb" | "mi" | "mib" => 20,
            "g" | "gb" | "gi" | "gib" => 30,
            "t" | "tb" | "ti" | "tib" => 40,
            _ => return Err(format!("{unit:?} is no unit; give a number and k, m or g")),
        };
        let bytes = number
            .parse::<u64>()
            .ok()
            .and_then(|number| number.checked_mul(1 << shift));
        match bytes {
            Some(bytes) if bytes >> 60 != 0 => Err("that is more than any machine has".to_owned()),
            Some(bytes) if bytes < 4 << 20 => Err("a container needs at least 4m".to_owned()),
            Some(bytes) => Ok(Memory { bytes }),
            None => Err("give a number such as 512m or 2g".to_owned()),
        }
    }
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
    fn memory_is_counted_in_powers_of_1024() {
        for (text, bytes) in [
            ("4194304", 4 << 20),
            ("512m", 512 << 20),
            ("2G", 2 << 30),
            ("1GiB", 1 << 30),
        ] {
            assert_eq!(text.parse(), Ok(Memory { bytes }), "{text}");
        }
        for text in [
            "",
            "m",
            "-1m",
            "1e9",
            "12EiB",
            "1k",
            "99999999999999999999",
            "16777216t",
        ] {
            assert!(text.parse::<Memory>().is_err(), "{text}");
        }
    }

    #[test]
    fn processors_have_three_decimals_at_most() {
        for (text, thousandths) in [("1", 1000), ("0.5", 500), ("2.25", 2250), ("0.01", 10)] {
            assert_eq!(text.parse(), Ok(Cpus { thousandths }), "{text}");
        }
        for text in [
            "",
            "0",
            "-1",
            "1e3",
            "NaN",
            ".5",
            "65",
            "0.0001",
            "9999999999",
        ] {
            assert!(text.parse::<Cpus>().is_err(), "{text}");
        }
    }

    #[test]
    fn devices_that_are_not_understood_are_refused() {
        let device = |text: &str| {
            let device: Device = text.parse().unwrap();
            (device.destination, device.access)
        };
        assert_eq!(device("/a"), ("/a".to_owned(), Access::ReadWrite));
        assert_eq!(device("/a:r"), ("/a".to_owned(), Access::ReadOnly));
        assert_eq!(device("/a:/b"), ("/b".to_owned(), Access::ReadWrite));
        assert_eq!(device("/a:/b:rm"), ("/b".to_owned(), Access::ReadOnly));
        for text in ["", "r", "a", "/a:b", "/a:/b:x", "/a:/b:r:r", "/a:ro"] {
            assert!(text.parse::<Device>().is_err(), "{text}");
        }
    }

    #[test]
    fn volumes_that_are_not_understood_are_refused() {
        let volume: Volume = "a/b:/c:ro".parse().unwrap();
        assert_eq!(
            (volume.destination.as_str(), volume.access),
            ("/c", Access::ReadOnly)
        );
        for text in ["", "/a", "/a:b", ":/b", "/a:/b:x", "/a:/b:ro:ro"] {
            assert!(text.parse::<Volume>().is_err(), "{text}");
        }
    }
}
