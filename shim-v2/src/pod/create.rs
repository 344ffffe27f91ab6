//! Create: from a request to a container whose first process waits.
//!
//! The VM boots while the files of the container are put up. What was done when a
//! step fails, or a Delete overtakes, is in [`Traces`] and taken back: first in the
//! guest, however late that answers, then on the host.

use std::{
    collections::BTreeMap,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use bulkhead_agent_api::spec::{Fate, Note, devices::HostDisk};
use bulkhead_agent_api::{
    DISKS_DIR, PRIVATE_DIR, SHARE_DIR,
    agent::{self, CreateRequest},
};
use bulkhead_vmm::hotplug::MOST_PLACES;
use containerd_shim_protos::{api::Mount, events::task::TaskCreate, protobuf::MessageField};
use tokio::{
    sync::{Mutex as AsyncMutex, Notify},
    task::JoinHandle,
    time::timeout,
};
use tracing::{info, warn};

use super::{Container, DIE, Pod, Slot, hold::network, last::run_last, making::Making};
use crate::{
    agent::ProcessName,
    disk::{self, Opened},
    error::{Error, Result},
    events::{Event, task_io},
    explain::Explanation,
    fate,
    guest::{Attached, Guest},
    hooks::{Hooks, Moment},
    io::{Stdio, Streams},
    lock::lock,
    mount,
    names::{self, ContainerId},
    options::Options,
    process::{Herald, Process},
    rootfs::{self, Source},
    share::ContainerShare,
    sockets::{HostSocket, Service},
    spec::{self, Limits, Prepared, Socket, Terminal},
    statedir::kept::Kept,
    vm,
};

/// Places for network interfaces. With all that a machine may have, no more fit.
const INTERFACES: u8 = 2;

/// A container that is asked for.
#[derive(Clone, Debug)]
pub struct Create {
    /// Its id.
    pub id: ContainerId,
    /// The directory with `config.json`.
    pub bundle: PathBuf,
    /// Mounts of the root file system; none: `root.path` is mounted.
    pub rootfs: Vec<Mount>,
    /// Streams of its first process.
    pub stdio: Stdio,
    /// What the caller sets for the pod.
    pub options: Options,
}

/// A creation under way.
#[derive(Debug, Default)]
pub(super) struct Creation {
    /// Asks it to give up.
    pub(super) cancel: Notify,
    /// It is over, one way or the other.
    pub(super) over: Notify,
    /// Of the container, once they are known.
    pub(super) limits: OnceLock<Limits>,
}

/// A reserved id; dropping it without a container frees the id.
struct Reserved<'a> {
    pod: &'a Pod,
    id: ContainerId,
    creation: Arc<Creation>,
    filled: bool,
}

impl Reserved<'_> {
    fn fill(mut self, container: Arc<Container>) {
        lock(&self.pod.slots).insert(self.id.clone(), Slot::Ready(container));
        self.filled = true;
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        if !self.filled {
            lock(&self.pod.slots).remove(&self.id);
        }
        // Whoever cancelled waits for this.
        self.creation.over.notify_waiters();
    }
}

impl Pod {
    /// Creates a container. Answers the pid.
    pub async fn create(self: &Arc<Self>, request: Create) -> Result<u32> {
        let reserved = self.reserve(&request.id)?;
        let creation = Arc::clone(&reserved.creation);
        let mut traces = Traces::default();
        let built = tokio::select! {
            built = self.build(&request, &creation, &mut traces) => built,
            () = creation.cancel.notified() => Err(Error::Cancelled(request.id.clone())),
        };
        let (guest, container) = match built {
            Ok(built) => built,
            Err(error) => {
                if matches!(error, Error::Deadline { .. }) {
                    self.doubt.notify_one();
                }
                traces.undo(self).await;
                self.keep_fate(&request.id, None).await;
                return Err(self.explained(error).await);
            }
        };
        reserved.fill(Arc::clone(&container));
        let pid = container.init.pid();
        let Stdio {
            stdin,
            stdout,
            stderr,
            terminal,
        } = &request.stdio;
        self.events.publish(Event::Create(Box::new(TaskCreate {
            container_id: request.id.to_string(),
            bundle: request.bundle.display().to_string(),
            rootfs: request.rootfs,
            io: MessageField::some(task_io(stdin, stdout, stderr, *terminal)),
            pid,
            ..TaskCreate::default()
        })));
        self.watch(&guest, &container, &container.init);
        self.watch_oom(&guest, &container);
        Ok(pid)
    }

    /// Cancels a creation and waits until it has cleaned up.
    pub(super) async fn cancel_create(&self, id: &ContainerId) {
        let creation = match lock(&self.slots).get(id) {
            Some(Slot::Creating(creation)) => Arc::clone(creation),
            Some(Slot::Ready(_)) | None => return,
        };
        let over = creation.over.notified();
        creation.cancel.notify_one();
        if timeout(DIE * 2, over).await.is_err() {
            warn!(container = %id, "its creation does not end");
        }
    }
    fn reserve(&self, id: &ContainerId) -> Result<Reserved<'_>> {
        if self.stopping.load(Ordering::SeqCst) {
            return Err(Error::VmGone("the pod is being shut down".to_owned()));
        }
        let mut slots = lock(&self.slots);
        if slots.contains_key(id) {
            return Err(Error::ContainerExists(id.clone()));
        }
        let creation = Arc::new(Creation::default());
        slots.insert(id.clone(), Slot::Creating(Arc::clone(&creation)));
        Ok(Reserved {
            pod: self,
            id: id.clone(),
            creation,
            filled: false,
        })
    }

    async fn build(
        self: &Arc<Self>,
        request: &Create,
        creation: &Creation,
        traces: &mut Traces,
    ) -> Result<(Arc<dyn Guest>, Arc<Container>)> {
        request.stdio.check()?;
        request.options.log();
        let (settings, options) = (Arc::clone(&self.settings), request.options.clone());
        blocking("read the settings", move || {
            settings.fix(&options)?;
            Ok(())
        })
        .await?;
        let (id, bundle) = (request.id.clone(), request.bundle.clone());
        let terminal = Terminal::from(request.stdio.terminal);
        // The guest takes the root from where it is told that nobody else changes
        // it, if that is so.
        let root_share = match rootfs::is_private(&request.rootfs) {
            _ if request.rootfs.iter().any(disk::Root::is_meant) => DISKS_DIR,
            true => PRIVATE_DIR,
            false => SHARE_DIR,
        };
        let prepared = blocking("read the bundle", move || {
            read_bundle(&id, &bundle, terminal, root_share)
        })
        .await?;
        self.is_meant(&prepared.annotations)?;
        self.tell(&request.id, &prepared.fields)?;
        traces.told = self.keep_told(request, &prepared).await;
        let network = match prepared.network {
            Some(path) => Some(blocking("open a namespace", move || network(&path)).await?),
            None => None,
        };
        let root = Source::new(&request.rootfs, &request.bundle, &prepared.root)?;
        let (sockets, told_of_sockets) = find_sockets(prepared.sockets).await?;
        let expects_members = names::expects_members(&prepared.annotations);
        let places = places(&root, &prepared.disks, expects_members)?;
        let disks = open_disks(&root, prepared.disks).await?;
        let (share, id, volumes) = (
            Arc::clone(&self.share),
            request.id.clone(),
            prepared.volumes.clone(),
        );
        let Traces {
            mounting, files, ..
        } = &mut *traces;
        let work = tokio::task::spawn_blocking(move || share.add(&id, &root, &volumes));
        // At once: what fails beside it may do so before it is looked at.
        *mounting = Some(work);
        let put_up = async {
            let Some(work) = mounting.as_mut() else {
                return Ok(());
            };
            let result = work.await;
            // A handle that has answered must not be asked again.
            *mounting = None;
            *files = Some(result.unwrap_or_else(|error| Err(lost(&error)))?);
            Ok(())
        };
        let _ = creation.limits.set(prepared.limits);
        let pod = match expects_members {
            true => vm::Pod::Joined,
            false => vm::Pod::Single,
        };
        let mut shape = self.shape(prepared.limits, pod, places);
        if prepared.has_network {
            shape.interfaces = INTERFACES;
        }
        let boot = self.boot(shape, prepared.oom_score_adj, prepared.cgroup);
        let (guest, ()) = tokio::try_join!(boot, put_up)?;
        self.grow(&guest, None).await?;
        let (root_disk, host_disks) = disks.attach(&guest, &mut traces.disks).await?;
        let name = ProcessName {
            container: request.id.clone(),
            exec: None,
        };
        let holder = self.hold(&guest, &name, network.as_ref())?;
        let hooks = traces.hooks.insert(Hooks {
            host: Arc::clone(&self.host),
            id: request.id.clone(),
            bundle: request.bundle.clone(),
            annotations: prepared.annotations,
            lists: prepared.hooks,
        });
        for moment in [
            Moment::Prestart,
            Moment::CreateRuntime,
            Moment::CreateContainer,
        ] {
            hooks.run(moment, holder.pid()).await?;
        }
        let id = request.id.as_str();
        let opened = Streams::open(&request.stdio, id, &self.streams, guest.dialer());
        let (streams, mut stdio, room) = opened.await?;
        (stdio.columns, stdio.rows) = prepared.console;
        let message = CreateRequest {
            container_id: request.id.to_string(),
            spec: prepared.guest,
            stdio: Some(stdio).into(),
            seccomp_filter: prepared.filter.program,
            seccomp_flags: prepared.filter.flags,
            root_disk: root_disk.into(),
            host_disks,
            sockets: told_of_sockets,
            ..CreateRequest::default()
        };
        let agent = guest.agent().clone();
        let limit = agent.limits().create;
        let making = Making::begin(&guest, name.clone(), async move {
            let answer = agent.create(&message).await;
            drop(room);
            answer
        });
        let making = traces.making.insert(making);
        let fate = fate::Fate {
            pid: holder.pid(),
            end: None,
        };
        let kept = self.keep_fate(&request.id, Some(fate));
        let (made, ()) = tokio::join!(making.answer("Create", limit), kept);
        made?;
        let stdio = request.stdio.clone();
        let init = Process::new(name, stdio, prepared.console, None, self.herald());
        let init = Arc::new(init);
        init.attach(streams);
        let Some(hooks) = traces.hooks.take() else {
            return Err(Error::Cancelled(request.id.clone()));
        };
        self.keep(&guest, &init, holder);
        let container = Arc::new(Container {
            id: request.id.clone(),
            bundle: request.bundle.clone(),
            init,
            network,
            sends_as_others: prepared.sends_as_others,
            execs: Mutex::default(),
            files: Mutex::new(traces.files.take()),
            sockets: Service::begin(&guest, &request.id, sockets, &self.places),
            told: Mutex::new(traces.told.take()),
            hooks,
            disks: Mutex::new(std::mem::take(&mut traces.disks)),
            deleting: AsyncMutex::new(()),
            kill_unanswered: AtomicBool::new(false),
            ooms: AtomicU64::new(0),
            used: Mutex::default(),
            limits: Mutex::new(prepared.limits),
        });
        Ok((guest, container))
    }

    /// Refuses a container of another pod: callers may bring a member without asking this
    /// program first.
    fn is_meant(&self, annotations: &BTreeMap<String, String>) -> Result<()> {
        let own = self.dir.dir().group();
        match names::joins(annotations) {
            Some((what, other)) if other != own => Err(Error::Argument {
                what,
                value: other.to_owned(),
                reason: format!("this is the shim of pod {own:?}"),
            }),
            _ => Ok(()),
        }
    }

    /// Logs what is not done as a specification says; refuses it if it must be.
    pub(super) fn tell(&self, id: &ContainerId, fields: &[Note]) -> Result<()> {
        for note in fields.iter().filter(|note| note.is_remark()) {
            match note.fate {
                Fate::Missing => warn!(container = %id, "{note}"),
                _ => info!(container = %id, "{note}"),
            }
        }
        if self.settings.get().strict {
            spec::strictly(fields)?;
        }
        Ok(())
    }

    /// Keeps what became of the specification for those who ask.
    async fn keep_told(&self, request: &Create, prepared: &Prepared) -> Option<Kept> {
        let Create { id, bundle, .. } = request;
        let told = Explanation::of(&self.namespace, id, bundle, prepared).to_json();
        let (dir, id) = (Arc::clone(&self.dir), id.clone());
        let keep = move || {
            Kept::new(&dir, &id, &told?).map_err(|source| Error::Path {
                action: "write into",
                path: dir.dir().path().to_owned(),
                source,
            })
        };
        // No reason to have no container.
        blocking("keep what is told", keep)
            .await
            .inspect_err(|error| warn!(error = error.text(), "nobody can be told of it"))
            .ok()
    }

    /// Tells containerd of a process of this pod.
    pub(super) fn herald(&self) -> Herald {
        Herald {
            events: Arc::clone(&self.events),
        }
    }
}

/// What a creation that does not come to its end must take back.
#[derive(Debug, Default)]
struct Traces {
    /// In the guest.
    making: Option<Making>,
    /// On the host, while they are put up.
    mounting: Option<JoinHandle<Result<ContainerShare>>>,
    /// On the host, where the guest may still use them.
    files: Option<ContainerShare>,
    /// What became of the specification.
    told: Option<Kept>,
    /// Those of the end run as soon as those of the beginning may have.
    hooks: Option<Hooks>,
    /// In the VMM.
    disks: Vec<Attached>,
}

impl Traces {
    async fn undo(self, pod: &Pod) {
        if let Some(making) = self.making {
            // The id is not free before; but a guest that does not answer keeps it
            // to itself.
            let undone = pod.undo(making);
            if timeout(DIE, undone).await.is_err() {
                warn!("the guest does not take a container back yet");
            }
        }
        for disk in self.disks {
            disk.detach().await;
        }
        let mut files = self.files;
        if let Some(mounting) = self.mounting {
            // The id is not free before: but who mounts from a dead server waits long.
            match timeout(DIE, mounting).await {
                Ok(Ok(Ok(mounted))) => files = Some(mounted),
                Ok(_) => {}
                Err(_) => warn!("the container's files are still being put up"),
            }
        }
        let _ = tokio::task::spawn_blocking(move || drop(files)).await;
        if let Some(hooks) = &self.hooks {
            run_last(hooks).await;
        }
    }
}

/// Opens the root file system, if it is a disk, and block devices of the host.
async fn open_disks(root: &Source, devices: Vec<HostDisk>) -> Result<Opened> {
    if !matches!(root, Source::Disk(_)) && devices.is_empty() {
        return Ok(Opened::default());
    }
    let root = root.clone();
    blocking("open the disks", move || Opened::new(&root, &devices)).await
}

/// The places for disks that the machine is started with: all that there can be, if more
/// containers will join, of which nobody knows yet what they need.
fn places(root: &Source, devices: &[HostDisk], expects_members: bool) -> Result<u8> {
    let disks = usize::from(matches!(root, Source::Disk(_))) + devices.len();
    let places = u8::try_from(disks).ok();
    let places = places.filter(|places| *places <= MOST_PLACES);
    let all = |places| if expects_members { MOST_PLACES } else { places };
    places.map(all).ok_or_else(|| Error::Argument {
        what: "linux.devices",
        value: format!("{disks} disks"),
        reason: format!("a virtual machine has {MOST_PLACES} at most, that of the root included"),
    })
}

/// Finds the sockets of the host, and what the guest is told of them.
async fn find_sockets(wanted: Vec<Socket>) -> Result<(Vec<HostSocket>, Vec<agent::Socket>)> {
    let find = move || wanted.iter().map(HostSocket::find).collect();
    blocking("find the sockets", find).await
}

/// Runs what may block away from the requests.
async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let worked = tokio::task::spawn_blocking(work).await;
    worked.map_err(|error| {
        warn!(what, "could not be done");
        lost(&error)
    })?
}

/// What a thread that panicked leaves.
fn lost(error: &tokio::task::JoinError) -> Error {
    warn!(%error, "a thread of Create is lost");
    Error::Panicked("Create")
}

fn read_bundle(
    id: &ContainerId,
    bundle: &Path,
    terminal: Terminal,
    root_share: &str,
) -> Result<Prepared> {
    check_bundle(bundle)?;
    let spec = spec::read(bundle)?;
    Ok(spec::prepare(id, spec, terminal, root_share, mount::look)?)
}

/// A bundle that somebody else can change is no bundle.
fn check_bundle(bundle: &Path) -> Result<()> {
    let refuse = |reason: &str| Error::Argument {
        what: "Bundle",
        value: bundle.display().to_string(),
        reason: reason.to_owned(),
    };
    if !bundle.is_absolute() {
        return Err(refuse("it is not an absolute path"));
    }
    let meta = std::fs::metadata(bundle).map_err(|source| Error::Path {
        action: "look at the bundle",
        path: bundle.to_owned(),
        source,
    })?;
    if !meta.is_dir() {
        return Err(refuse("it is not a directory"));
    }
    if meta.uid() != rustix::process::geteuid().as_raw() {
        return Err(refuse("it belongs to another user"));
    }
    if meta.mode() & 0o002 != 0 {
        return Err(refuse("everybody can write to it"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    #[test]
    fn a_bundle_must_be_a_directory_of_ours_b19() {
        let dir = tempfile::tempdir().unwrap();
        check_bundle(dir.path()).unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        assert!(check_bundle(&dir.path().join("file")).is_err());
        assert!(check_bundle(Path::new("relative")).is_err());
        let missing = check_bundle(&dir.path().join("missing")).unwrap_err();
        assert_eq!(missing.code(), ttrpc::Code::NOT_FOUND);
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(check_bundle(dir.path()).is_err());
        if rustix::process::geteuid().is_root() {
            fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
            std::os::unix::fs::chown(dir.path(), Some(1000), None).unwrap();
            assert!(check_bundle(dir.path()).is_err());
        }
    }

    #[test]
    fn a_specification_that_is_too_long_is_refused_b1() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(
            dir.path().join("config.json"),
            vec![b' '; crate::json::MAX_BYTES + 1],
        )
        .unwrap();
        let id = ContainerId::new("c").unwrap();
        let error = read_bundle(&id, dir.path(), Terminal::No, SHARE_DIR).unwrap_err();
        assert_eq!(
            error.code(),
            ttrpc::Code::INVALID_ARGUMENT,
            "{}",
            error.text()
        );
    }
}
