//! `bulkhead run`: from an image, a directory or a bundle to an exit code.
//!
//! Everything it makes is a guard, in the order of making: the container's
//! directory, its bundle, its network, the streams, the shim. A run that fails or is interrupted
//! anywhere leaves nothing.

use std::{
    fs,
    io::{self, Read, Write},
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown},
    path::{Path, PathBuf},
};

use bulkhead_client::{
    Container, ContainerId, Process, Record, Scratch, Shim, Signals, Streams, Task, attach,
    error::Error as ClientError, paths, record, streams::Wanted, task, terminal,
};
use bulkhead_image::{self as image, users::Identity};
use containerd_shim_protos::api::{CreateTaskRequest, Mount};

use crate::{
    args, clearing,
    error::{Error, Result, at, host, refused},
    network::Network,
    progress,
    spec::{self, Settings},
};

/// Runs a container; answers the exit code.
pub(crate) fn run(args: &args::Run) -> Result<u8> {
    require_root()?;
    let id = match &args.name {
        Some(id) => id.clone(),
        None => random_id()?,
    };
    let runtime = runtime()?;
    let result = runtime.block_on(async {
        let mut signals = Signals::take()?;
        let image = match args.image.clone() {
            Some(path) => {
                let opening = signals.or_stop(move |stop| {
                    let progress = progress::Bar::default();
                    image::open(&path, Path::new(paths::LAYERS), &progress, stop)
                });
                Some(opening.await??)
            }
            None => None,
        };
        let mut container = Container::make(Path::new(paths::CONTAINERS), &id)?;
        let own = Scratch::make(paths::bundle(&id)).map_err(at("make", paths::bundle(&id)))?;
        let network = match &args.bundle {
            // Whoever wrote the bundle has said what it is connected to.
            Some(_) => None,
            None => Some(Network::make(&args.network, &id, &hostname(args, &id))?),
        };
        let plan = Plan::new(args, image, &id, &container, own.path(), network.as_ref())?;
        let mut record = plan.record(&id);
        container.save(&record)?;
        let mut pod = Pod::start(
            &id,
            args.process.interactive,
            &plan,
            own.path(),
            &mut signals,
        )
        .await?;
        // The program runs: from here on nothing that fails takes its files away.
        if !args.rm {
            container.keep();
        }
        let result = pod.follow(&mut signals).await;
        record.exit_code = pod.status;
        let saved = if args.rm {
            Ok(())
        } else {
            container.save(&record)
        };
        let closed = pod.close().await;
        let status = result?;
        saved?;
        closed?;
        network.map_or(Ok(()), Network::leave)?;
        own.remove()?;
        Ok(exit_code(status))
    });
    clearing::all();
    result
}

/// Only root can do what follows.
pub(crate) fn require_root() -> Result<()> {
    if rustix::process::geteuid().is_root() {
        Ok(())
    } else {
        Err(Error::NotRoot)
    }
}

/// One thread is enough for a client.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    Ok(builder
        .enable_all()
        .build()
        .map_err(host("set up the event loop"))?)
}

/// The exit code of a process as ours.
pub(crate) fn exit_code(status: u32) -> u8 {
    u8::try_from(status & 0xff).unwrap_or(u8::MAX)
}

fn random_id() -> Result<ContainerId> {
    let mut bytes = [0_u8; 6];
    let mut source = fs::File::open("/dev/urandom").map_err(host("get random bytes"))?;
    source
        .read_exact(&mut bytes)
        .map_err(host("get random bytes"))?;
    hex::encode(bytes).parse().map_err(|reason| Error::Refused {
        what: "Id",
        value: String::new(),
        reason,
    })
}

/// The pod of a container whose program runs or has run. Dropping it kills what still
/// runs and takes all down.
struct Pod {
    shim: Shim,
    task: Task,
    process: Process,
    streams: Option<attach::Attached>,
    /// What the program ended with, as far as it is known.
    status: Option<u32>,
}

impl Pod {
    /// Starts the supervisor and the program.
    async fn start(
        id: &ContainerId,
        stdin: bool,
        plan: &Plan,
        own: &Path,
        signals: &mut Signals,
    ) -> Result<Self> {
        let wanted = Wanted {
            stdin,
            terminal: plan.terminal,
        };
        let streams = Streams::new(own, "", wanted)?;
        let shim = Shim::start(id, &plan.bundle)?;
        let task = signals.or(Task::connect(id, shim.address())).await?;
        let [stdin, stdout, stderr] = streams.names();
        let mut request = CreateTaskRequest::new();
        request.id = id.to_string();
        request.bundle = plan.bundle.to_string_lossy().into_owned();
        request.rootfs.clone_from(&plan.rootfs);
        request.terminal = plan.terminal;
        request.stdin = stdin;
        request.stdout = stdout;
        request.stderr = stderr;
        signals.or(task.create(&request)).await?;
        let process = Process {
            id: id.clone(),
            exec_id: String::new(),
        };
        let attached = attach::start(&task, &process, streams, plan.terminal, signals).await?;
        Ok(Pod {
            shim,
            task,
            process,
            streams: Some(attached),
            status: None,
        })
    }

    /// Stays with the program to its end.
    async fn follow(&mut self, signals: &mut Signals) -> Result<u32> {
        let Some(mut attached) = self.streams.take() else {
            return Ok(0);
        };
        let result = attached.follow(signals).await;
        self.status = attached.status();
        let status = result?;
        // What the shim says of an end that nobody asked for is the cause; afterwards
        // it is gone with the pod.
        match task::reason(&self.process.id) {
            Some(reason) => Err(ClientError::Ended {
                reason,
                code: exit_code(status),
            }
            .into()),
            None => Ok(status),
        }
    }

    /// Takes the pod down in order, if the program's end is known; else by force.
    async fn close(self) -> Result<()> {
        if self.status.is_some() && task::reason(&self.process.id).is_none() {
            self.task.delete(&self.process).await?;
            self.shim.close(&self.task).await;
        }
        Ok(())
    }
}

/// A container that can be created: its bundle and root file system.
struct Plan {
    bundle: PathBuf,
    rootfs: Vec<Mount>,
    terminal: bool,
    source: String,
    command: Vec<String>,
    env: Vec<String>,
    home: String,
    cwd: String,
    /// Directories of the root file system, lowest first.
    roots: Vec<PathBuf>,
    /// Removes the shim's `address` from a bundle that is not ours.
    _address: Option<Leftover>,
}

/// A file that the shim leaves in the caller's bundle.
struct Leftover(PathBuf);

impl Drop for Leftover {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

impl Plan {
    fn new(
        args: &args::Run,
        image: Option<image::Image>,
        id: &ContainerId,
        container: &Container,
        own: &Path,
        network: Option<&Network>,
    ) -> Result<Self> {
        if let Some(bundle) = &args.bundle {
            return Plan::of_bundle(bundle);
        }
        let (rootfs, roots, config, source) = if let Some(image) = image {
            let (mount, upper) = overlay(&image.layers, container)?;
            let mut roots = image.layers;
            roots.push(upper);
            (
                mount,
                roots,
                image.config,
                args.image.clone().unwrap_or_default(),
            )
        } else {
            let dir = args.rootfs.clone().unwrap_or_default();
            let root = directory(&dir)?;
            let mut mount = Mount::new();
            mount.type_ = "bind".to_owned();
            mount.source = utf8(&root)?;
            mount.options = ["rbind", "rw"].map(str::to_owned).to_vec();
            (mount, vec![root], image::Config::default(), dir)
        };
        let (settings, env, home) = settings(args, id, &roots, &config, network)?;
        let text = serde_json::to_vec(&settings.spec())
            .map_err(|error| at::<std::io::Error>("write", own)(error.into()))?;
        let path = own.join("config.json");
        let mut file = fs::File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(at("make", &path))?;
        file.write_all(&text).map_err(at("write", &path))?;
        let path = own.join("rootfs");
        fs::create_dir(&path).map_err(at("make", &path))?;
        Ok(Plan {
            bundle: own.to_owned(),
            rootfs: vec![rootfs],
            terminal: args.process.tty,
            source: source.display().to_string(),
            command: settings.args,
            env,
            home,
            cwd: settings.cwd,
            roots,
            _address: None,
        })
    }

    /// A bundle of the caller is run as it is.
    fn of_bundle(dir: &Path) -> Result<Self> {
        let bundle = directory(dir)?;
        let path = bundle.join("config.json");
        let text = fs::read(&path).map_err(at("read", &path))?;
        let spec: serde_json::Value = serde_json::from_slice(&text)
            .map_err(|error| at::<std::io::Error>("understand", &path)(error.into()))?;
        let process = spec.get("process");
        let words = |name: &str| -> Vec<String> {
            let list = process.and_then(|process| process.get(name)?.as_array());
            list.into_iter()
                .flatten()
                .filter_map(|word| word.as_str().map(str::to_owned))
                .collect()
        };
        let command = words("args");
        if command.is_empty() {
            return Err(Error::Refused {
                what: "Bundle",
                value: dir.display().to_string(),
                reason: "process.args of its config.json names no program to run".to_owned(),
            });
        }
        let terminal = process
            .and_then(|process| process.get("terminal")?.as_bool())
            .unwrap_or(false);
        let cwd = process
            .and_then(|process| process.get("cwd")?.as_str())
            .unwrap_or("/");
        let root = spec.get("root").and_then(|root| root.get("path")?.as_str());
        let root = root
            .map(|root| bundle.join(root))
            .filter(|root| root.is_dir());
        Ok(Plan {
            _address: Some(Leftover(bundle.join("address"))),
            roots: root.into_iter().collect(),
            bundle,
            rootfs: Vec::new(),
            terminal,
            source: dir.display().to_string(),
            command,
            env: words("env"),
            // Whoever wrote the bundle has said where, or it is nowhere.
            home: String::new(),
            cwd: cwd.to_owned(),
        })
    }

    fn record(&self, id: &ContainerId) -> Record {
        Record {
            id: id.to_string(),
            source: self.source.clone(),
            command: self.command.clone(),
            created: record::now(),
            bundle: self.bundle.clone(),
            env: self.env.clone(),
            home: self.home.clone(),
            cwd: self.cwd.clone(),
            roots: self.roots.clone(),
            exit_code: None,
        }
    }
}

/// What the container is; its environment without the home of its user, which an exec
/// as somebody else does not share; and that home.
fn settings(
    args: &args::Run,
    id: &ContainerId,
    roots: &[PathBuf],
    config: &image::Config,
    network: Option<&Network>,
) -> Result<(Settings, Vec<String>, String)> {
    let process = &args.process;
    let user = process.user.as_deref().unwrap_or(&config.user);
    let Identity { user, home } = image::users::look_up(roots, user)?;
    let mut env = config.env.clone();
    spec::merge_env(&mut env, &process.env, own_env);
    spec::default_env(&mut env, "PATH", spec::PATH);
    let hostname = hostname(args, id);
    spec::default_env(&mut env, "HOSTNAME", &hostname);
    if process.tty {
        spec::default_env(&mut env, "TERM", &own_term());
    }
    let cwd = match &process.workdir {
        Some(dir) => working_dir(dir)?,
        // Some builders leave out the slash.
        None => format!("/{}", config.working_dir.trim_start_matches('/')),
    };
    let told = env.clone();
    spec::default_env(&mut env, "HOME", &home);
    let command = command(&args.command, config)?;
    let mut volumes = Vec::new();
    for volume in &args.volume {
        let source = volume
            .source
            .canonicalize()
            .map_err(at("use as a volume", &volume.source))?;
        volumes.push((utf8(&source)?, volume.destination.clone(), volume.access));
    }
    for (source, destination) in network.into_iter().flat_map(Network::files) {
        // What the caller puts there is what they want.
        if volumes
            .iter()
            .all(|(_, taken, _)| Path::new(taken) != Path::new(destination))
        {
            volumes.push((
                utf8(source)?,
                (*destination).to_owned(),
                args::Access::ReadWrite,
            ));
        }
    }
    let devices: Result<_> = args.device.iter().map(device).collect();
    let settings = Settings {
        args: command,
        env,
        cwd,
        user,
        terminal: process.tty.then(terminal::size),
        hostname,
        read_only: args.read_only,
        volumes,
        devices: devices?,
        network: network.and_then(Network::namespace),
        cpus: args.cpus.map(|cpus| cpus.thousandths),
        memory: args.memory.map(|memory| memory.bytes),
    };
    Ok((settings, told, home))
}

/// What the container calls itself.
fn hostname(args: &args::Run, id: &ContainerId) -> String {
    let given = args.network.hostname.clone();
    given.unwrap_or_else(|| id.as_str().chars().take(64).collect())
}

/// Looks at the node of a device that the caller names.
fn device(wanted: &args::Device) -> Result<spec::Device> {
    let found = fs::metadata(&wanted.source).map_err(at("use as a device", &wanted.source))?;
    let kind = match found.file_type() {
        kind if kind.is_block_device() => "b",
        kind if kind.is_char_device() => "c",
        _ => {
            let reason = io::Error::other("it is no device; --volume shows files and directories");
            return Err(at("use as a device", &wanted.source)(reason).into());
        }
    };
    let number = found.rdev();
    Ok(spec::Device {
        kind,
        numbers: (rustix::fs::major(number), rustix::fs::minor(number)),
        path: wanted.destination.clone(),
        access: wanted.access,
    })
}

/// A directory that the caller names.
pub(crate) fn working_dir(dir: &str) -> Result<String> {
    if dir.starts_with('/') {
        return Ok(dir.to_owned());
    }
    let reason = "it must be an absolute path in the container";
    Err(refused("Working directory", dir, reason))
}

/// The kind of our own terminal.
pub(crate) fn own_term() -> String {
    own_env("TERM").unwrap_or_else(|| "xterm".to_owned())
}

/// What runs: the image's entry point, followed by the caller's words or else the
/// image's.
fn command(words: &[String], config: &image::Config) -> Result<Vec<String>> {
    let mut command = config.entrypoint.clone();
    command.extend_from_slice(if words.is_empty() { &config.cmd } else { words });
    if command.is_empty() {
        return Err(refused(
            "Command",
            "",
            "the image names none; give one after --",
        ));
    }
    Ok(command)
}

/// The image's layers under a writable one of the container's own, which is answered
/// too.
fn overlay(layers: &[PathBuf], container: &Container) -> Result<(Mount, PathBuf)> {
    let (upper, work) = (container.dir("upper")?, container.dir("work")?);
    let empty;
    let layers = if layers.is_empty() {
        empty = [container.dir("empty")?];
        &empty
    } else {
        layers
    };
    // The mount shows the root directory of the uppermost layer: give it the
    // image's owner and mode.
    if let Some(top) = layers.last() {
        let meta = fs::metadata(top).map_err(at("use the layer", top))?;
        chown(&upper, Some(meta.uid()), Some(meta.gid()))
            .map_err(at("give an owner to", &upper))?;
        let mode = fs::Permissions::from_mode(meta.mode() & 0o7777);
        fs::set_permissions(&upper, mode).map_err(at("give a mode to", &upper))?;
    }
    let lower = layers
        .iter()
        .rev()
        .map(|layer| utf8(layer))
        .collect::<Result<Vec<_>>>()?
        .join(":");
    let mut mount = Mount::new();
    mount.type_ = "overlay".to_owned();
    mount.source = "overlay".to_owned();
    mount.options = vec![
        format!("lowerdir={lower}"),
        format!("upperdir={}", utf8(&upper)?),
        format!("workdir={}", utf8(&work)?),
    ];
    Ok((mount, upper))
}

fn directory(dir: &Path) -> Result<PathBuf> {
    let path = dir.canonicalize().map_err(at("open", dir))?;
    if !path.is_dir() {
        return Err(refused(
            "Path",
            &dir.display().to_string(),
            "it is not a directory",
        ));
    }
    Ok(path)
}

fn utf8(path: &Path) -> Result<String> {
    let text = path.to_str().map(str::to_owned);
    text.ok_or_else(|| refused("Path", &path.to_string_lossy(), "it is not valid UTF-8"))
}

/// A variable of our own environment.
pub(crate) fn own_env(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_callers_words_replace_the_images_but_not_its_entry_point() {
        let words = |list: &[&str]| {
            list.iter()
                .map(|word| (*word).to_owned())
                .collect::<Vec<_>>()
        };
        let config = image::Config {
            entrypoint: words(&["e"]),
            cmd: words(&["c"]),
            ..image::Config::default()
        };
        assert_eq!(command(&[], &config).unwrap(), ["e", "c"]);
        assert_eq!(
            command(&words(&["x", "y"]), &config).unwrap(),
            ["e", "x", "y"]
        );
        assert!(command(&[], &image::Config::default()).is_err());
    }

    #[test]
    fn a_bundle_without_args_is_refused_b3() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["{}", r#"{"process":{"args":[]}}"#] {
            fs::write(dir.path().join("config.json"), text).unwrap();
            let error = Plan::of_bundle(dir.path()).err().unwrap();
            assert!(error.text().contains("process.args"), "{}", error.text());
        }
        fs::write(dir.path().join("config.json"), "nonsense").unwrap();
        assert!(
            Plan::of_bundle(dir.path())
                .err()
                .unwrap()
                .text()
                .contains("config.json")
        );
    }
}
