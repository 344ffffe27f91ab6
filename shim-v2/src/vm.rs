//! The pod's virtual machine: boot, the agent's connection, the end.
//!
//! A [`Vm`] that exists has an agent that greeted. Dropping it kills the VMM; the
//! thread that started the VMM reaps it. How it ended is kept in
//! [`Vm::ended`], and nobody needs the guest or a lock to kill it.

mod acceptor;
pub mod control;
pub(crate) mod cores;
pub mod holder;
mod size;
pub mod vmm;

use std::{
    fs::File,
    io,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::fs::OpenOptionsExt,
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use bulkhead_agent_api::{AGENT_PORT, PRIVATE_TAG, SHARE_TAG};
use bulkhead_vmm::{
    config as vmm_config,
    devices::limit::{Limit, Limits},
    jail::threads,
};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::Mutex,
    time::{Instant, timeout, timeout_at},
};
use tracing::info;

pub use self::size::{Pod, Shape, Size};
use self::{
    control::Control,
    holder::{HOLDERS, Holder},
    vmm::{End, Launch, Vmm},
};
use crate::{
    agent::{self, Agent},
    assets::Assets,
    carry::Bag,
    cgroup::{Cgroup, Place},
    config::{Config, Interface},
    error::{Error, Result, host},
    guest::{Boots, Guest},
    io::Dialer,
    mount,
    settings::Settings,
    statedir::{HostProcess, StateDir},
};

/// Base of the guest kernel's command line. Who waits in the kernel until all processors
/// have seen a change (of mounts, of cgroups) waits for no tick by it.
pub const CMDLINE: &str = "quiet panic=-1 reboot=k rcupdate.rcu_expedited=1";

/// Name of the listening socket of the vsock device.
const VSOCK: &str = "vsock.sock";

/// Time that the VMM gets to report before it is killed.
const REPORT: Duration = Duration::from_millis(500);
/// Time for a VMM that did not come up to be gone.
const GONE: Duration = Duration::from_secs(3);

/// What a boot needs.
#[derive(Debug)]
pub struct Boot<'a> {
    /// The administrator's settings.
    pub config: &'a Config,
    /// The pod's state.
    pub dir: &'a StateDir,
    /// How large it is.
    pub shape: Shape,
    /// `oom_score_adj` of the VMM.
    pub oom_score_adj: i32,
    /// Where its cgroup shall be, if not where its state directory says.
    pub cgroup: Option<Place>,
}

/// A virtual machine whose agent is ready.
#[derive(Debug)]
pub struct Vm {
    agent: Agent,
    dialer: Dialer,
    vmm: Vmm,
    /// The largest that it can become.
    most: Size,
    extent: Mutex<Extent>,
    /// What may pass each interface, and each disk.
    limits: (Interface, Limit),
}

/// How large it has become.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Extent {
    first: Size,
    most: Size,
    /// What it was asked to be last, and what it was then.
    asked: Size,
    now: Size,
    /// Processors that exist: those that are not online any more do, too.
    made: u8,
    /// The number of the device by which memory comes, once some has.
    device: Option<u8>,
}

impl Extent {
    fn of(shape: &Shape) -> Self {
        Extent {
            first: shape.first,
            most: shape.most,
            asked: shape.first,
            now: shape.first,
            made: shape.first.vcpus,
            device: None,
        }
    }

    /// The guest says what it has: never more than there is, whatever it says.
    fn is_told(&mut self, vcpus: u8, more_mib: u32) {
        let told = Size {
            vcpus,
            memory_mib: self.first.memory_mib.saturating_add(more_mib),
        };
        let there = Size {
            vcpus: self.made,
            memory_mib: self.most.memory_mib,
        };
        self.now = told.and(there);
    }
}

impl Vm {
    /// Boots a virtual machine and waits for its agent.
    pub async fn boot(boot: Boot<'_>) -> Result<Self> {
        let begun = Instant::now();
        let deadline = begun + boot.config.boot_timeout();
        let config = boot.config.clone();
        let dir = boot.dir.clone();
        let (shape, oom_score_adj) = (boot.shape, boot.oom_score_adj);
        let place = boot.cgroup;
        let place = place.unwrap_or_else(|| Place::like(boot.dir.path()));
        let prepared = tokio::task::spawn_blocking(move || {
            prepare(&config, &dir, shape, oom_score_adj, &place)
        })
        .await
        .map_err(|error| host("prepare the virtual machine")(std::io::Error::other(error)))??;
        let (launch, acceptor) = prepared;
        let state =
            crate::mount::open_dir(boot.dir.path()).map_err(host("open the state directory"))?;
        let vmm = Vmm::launch(launch).await?;
        let limits = agent::Limits {
            create: boot.config.boot_timeout(),
            request: boot.config.rpc_timeout(),
        };
        let greeted = async {
            let stream = acceptor::accept(acceptor, AGENT_PORT)
                .await
                .map_err(|error| Error::Boot(format!("no connection from the agent: {error}")))?;
            Agent::greet(stream, limits).await
        };
        let result = tokio::select! {
            result = timeout_at(deadline, greeted) => result,
            end = vmm.ended() => Ok(Err(Error::Boot(end.reason))),
        };
        let error = match result {
            Ok(Ok(agent)) => {
                info!(
                    boot_ms = begun.elapsed().as_millis(),
                    vcpus = shape.first.vcpus,
                    memory_mib = shape.first.memory_mib,
                    "virtual machine is up"
                );
                return Ok(Vm {
                    agent,
                    dialer: Dialer::new(state, VSOCK),
                    vmm,
                    most: shape.most,
                    extent: Mutex::new(Extent::of(&shape)),
                    limits: (boot.config.interface, boot.config.disk),
                });
            }
            // The VMM's own end says more than a connection that closed.
            Ok(Err(error)) => match timeout(REPORT, vmm.ended()).await {
                Ok(end) => Error::Boot(end.reason),
                Err(_) => error,
            },
            Err(_) => {
                let standing = standing(vmm.control()).await;
                // Once the shim seems gone, the VMM reports what the console said.
                vmm.control().release();
                let console = match timeout(REPORT, vmm.ended()).await {
                    Ok(End { console, .. }) if !console.is_empty() => {
                        format!("; last words of the guest: {}", console.join(" | "))
                    }
                    _ => String::new(),
                };
                let limit = boot.config.boot_timeout_s;
                Error::Boot(format!(
                    "the agent did not connect within {limit} s; {standing}{console}"
                ))
            }
        };
        // Whoever tries again finds everything free.
        vmm.kill();
        let _ = timeout(GONE, vmm.gone()).await;
        Err(error)
    }
}

impl Vm {
    /// Bounds what may pass a device that was attached just now, if there is a bound; a
    /// device without the bound that it is to have is none.
    async fn limit(&self, device: u8, is_limited: bool, limits: Limits) -> Result<u8> {
        let control = self.vmm.control();
        if is_limited && let Err(error) = control.limit(device, limits).await {
            let _ = control.detach(device).await;
            return Err(error);
        }
        Ok(device)
    }
}

/// Where a machine stands that does not come up. The processors are stopped for it.
async fn standing(control: &Control) -> String {
    let told = async {
        // Those that do not stop are a part of the answer.
        let _ = timeout(REPORT, control.pause()).await;
        control.standing().await
    };
    match timeout(2 * REPORT, told).await {
        Ok(Ok(words)) => words,
        Ok(Err(error)) => error.to_string(),
        Err(_) => "the VMM does not say where it stands".to_owned(),
    }
}

/// What goes along of a virtual machine when the program changes.
#[derive(Debug, Serialize, Deserialize)]
pub struct Carried {
    agent: agent::Carried,
    next_stream: u64,
    vmm: vmm::Carried,
    extent: Extent,
}

/// Boots virtual machines for one pod.
#[derive(Debug)]
pub struct Kvm {
    /// The pod's settings.
    pub settings: Arc<Settings>,
    /// The pod's directory.
    pub dir: StateDir,
}

#[async_trait]
impl Boots for Kvm {
    async fn boot(
        &self,
        shape: Shape,
        oom_score_adj: i32,
        cgroup: Option<Place>,
    ) -> Result<Arc<dyn Guest>> {
        let own = std::fs::read_to_string("/proc/self/oom_score_adj").unwrap_or_default();
        let boot = Boot {
            config: self.settings.get(),
            dir: &self.dir,
            shape,
            oom_score_adj: oom_score(oom_score_adj, &own),
            cgroup,
        };
        Ok(Arc::new(Vm::boot(boot).await?))
    }

    fn unpack(&self, carried: Carried) -> Result<Arc<dyn Guest>> {
        let state = mount::open_dir(self.dir.path()).map_err(host("open the state directory"))?;
        Ok(Arc::new(Vm {
            vmm: Vmm::unpack(carried.vmm)?,
            agent: Agent::unpack(carried.agent)?,
            dialer: Dialer::unpack(state, VSOCK, carried.next_stream),
            most: carried.extent.most,
            extent: Mutex::new(carried.extent),
            limits: (self.settings.get().interface, self.settings.get().disk),
        }))
    }
}

/// A VMM is never harder to kill than its shim, whatever its container wants.
/// `own` is the shim's own score as the kernel writes it.
fn oom_score(wanted: i32, own: &str) -> i32 {
    wanted.max(own.trim().parse().unwrap_or(0)).min(1000)
}

#[async_trait]
impl Guest for Vm {
    fn agent(&self) -> &Agent {
        &self.agent
    }

    fn dialer(&self) -> &Dialer {
        &self.dialer
    }

    fn process(&self) -> HostProcess {
        self.vmm.process()
    }

    async fn attach(&self, disk: File, read_only: bool) -> Result<u8> {
        let device = self.vmm.control().attach(disk, read_only).await?;
        let (_, limit) = self.limits;
        self.limit(device, limit != Limit::default(), Limits::Disk(limit))
            .await
    }

    async fn detach(&self, device: u8) -> Result<()> {
        self.vmm.control().detach(device).await
    }

    async fn attach_interface(&self, tap: File, mac: [u8; 6], mtu: u16) -> Result<u8> {
        let attached = self.vmm.control().attach_interface(tap, mac, mtu);
        let device = attached.await?;
        let (interface, _) = self.limits;
        let Interface { receive, transmit } = interface;
        let limits = Limits::Interface { receive, transmit };
        self.limit(device, interface != Interface::default(), limits)
            .await
    }

    fn network(&self) -> BorrowedFd<'_> {
        self.vmm.quarters().network()
    }

    fn most(&self) -> Size {
        self.most
    }

    async fn size(&self) -> Size {
        self.extent.lock().await.now
    }

    async fn resize(&self, to: Size) -> Result<Size> {
        let mut extent = self.extent.lock().await;
        let to = to.or(extent.first).and(extent.most);
        if to == extent.now && to == extent.asked {
            return Ok(to);
        }
        // If this fails nobody knows what it is.
        let before = std::mem::replace(&mut extent.asked, to);
        if to.vcpus > extent.made {
            self.vmm.control().processors(to.vcpus).await?;
            extent.made = to.vcpus;
        }
        if to.memory_mib != before.memory_mib || to.memory_mib != extent.now.memory_mib {
            let device = self.vmm.control().memory(to.memory_mib).await?;
            extent.device = Some(device);
        }
        let more_mib = to.memory_mib.saturating_sub(extent.first.memory_mib);
        let resized = self.agent.resize_machine(to.vcpus, more_mib, extent.device);
        let (vcpus, more_mib) = resized.await?;
        extent.is_told(vcpus, more_mib);
        info!(
            vcpus = extent.now.vcpus,
            memory_mib = extent.now.memory_mib,
            "the virtual machine has another size"
        );
        Ok(extent.now)
    }

    fn hold(&self, label: &str, network: Option<BorrowedFd<'_>>) -> Result<Holder> {
        self.vmm.quarters().hold(label, network)
    }

    fn carry(&self, bag: &mut Bag) -> io::Result<Option<Carried>> {
        let Ok(extent) = self.extent.try_lock() else {
            return Ok(None);
        };
        if self.agent.is_busy() {
            return Ok(None);
        }
        let Some(vmm) = self.vmm.carry(bag)? else {
            return Ok(None);
        };
        Ok(Some(Carried {
            agent: self.agent.carry(bag)?,
            next_stream: self.dialer.next(),
            vmm,
            extent: *extent,
        }))
    }

    fn kill(&self) {
        self.vmm.kill();
    }

    fn has_ended(&self) -> Option<End> {
        self.vmm.has_ended()
    }

    async fn ended(&self) -> End {
        self.vmm.ended().await
    }

    async fn gone(&self) {
        self.vmm.gone().await;
    }
}

/// Opens everything that the VMM gets; a blocking function.
fn prepare(
    config: &Config,
    dir: &StateDir,
    shape: Shape,
    oom_score_adj: i32,
    place: &Place,
) -> Result<(Launch, OwnedFd)> {
    let kvm = open_kvm(Path::new("/dev/kvm"))?;
    let assets = Assets::open(&config.assets_dir, Path::new(crate::statedir::RUN_DIR))?;
    let own = std::env::current_exe().map_err(host("find the shim's own file"))?;
    let binary = vmm::find(&own)?;
    let listener = listen(dir)?;
    let (ours, theirs) = acceptor::pair()?;
    let mut cmdline = CMDLINE.to_owned();
    if config.guest_console {
        cmdline.push_str(" console=hvc0");
    }
    if !config.kernel_cmdline.is_empty() {
        cmdline.push(' ');
        cmdline.push_str(&config.kernel_cmdline);
    }
    let shares = shares(&dir.share(), shape.first.vcpus);
    // Last: nothing that may still fail has to take it back.
    let tasks = threads::most(shape.most.vcpus, shares.len(), shape.all_places()) + HOLDERS;
    let cgroup = Cgroup::make(place, tasks, dir.path())?;
    let launch = Launch {
        binary,
        kvm,
        kernel: assets.kernel,
        root: assets.root,
        listener: listener.into(),
        acceptor: theirs,
        console: config.guest_console,
        cmdline,
        shape,
        share: dir.share(),
        shares,
        oom_score_adj,
        cgroup,
    };
    Ok((launch, ours))
}

/// The pod's share under each policy: the guest reaches what belongs to one
/// container alone by the one, and all else by the other.
fn shares(dir: &Path, vcpus: u8) -> Vec<vmm_config::Share> {
    [
        (SHARE_TAG, vmm_config::Policy::Shared),
        (PRIVATE_TAG, vmm_config::Policy::Private),
    ]
    .map(|(tag, policy)| vmm_config::Share {
        tag: tag.to_owned(),
        dir: dir.to_owned(),
        read_only: false,
        // Linux has one for each of its processors.
        queues: vcpus.clamp(1, 8),
        policy,
    })
    .into()
}

/// Opens the KVM device, or says what is in the way.
fn open_kvm(path: &Path) -> Result<OwnedFd> {
    let flags = rustix::fs::OFlags::CLOEXEC.bits().cast_signed();
    match File::options()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path)
    {
        Ok(file) => Ok(file.into()),
        Err(source) => {
            let advice = match source.raw_os_error() {
                Some(libc::ENOENT) => {
                    "load kvm_intel or kvm_amd; virtualisation must be on in the firmware, or nested in a VM"
                }
                Some(libc::EACCES | libc::EPERM) => {
                    "the shim must run as root, outside of a sandbox"
                }
                Some(libc::EBUSY) => "another hypervisor holds the processor's virtualisation",
                Some(libc::ENODEV | libc::ENXIO) => {
                    "the processor cannot virtualise, or it is switched off"
                }
                _ => "see the kernel log",
            };
            Err(Error::Kvm { advice, source })
        }
    }
}

fn listen(dir: &StateDir) -> Result<UnixListener> {
    use std::os::fd::AsRawFd;
    let place = mount::open_dir(dir.path()).map_err(host("open the state directory"))?;
    // A VM that did not come up may have left one.
    let _ = std::fs::remove_file(dir.path().join(VSOCK));
    let path: PathBuf = format!("/proc/self/fd/{}/{VSOCK}", place.as_raw_fd()).into();
    UnixListener::bind(path).map_err(host("bind the vsock socket"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_never_has_more_than_there_is_whatever_it_says() {
        let size = |vcpus, memory_mib| Size { vcpus, memory_mib };
        let mut extent = Extent::of(&Shape {
            most: size(4, 1_024),
            ..Shape::fixed(size(1, 512))
        });
        for (told, now) in [
            ((1, 0), size(1, 512)),
            ((1, 512), size(1, 1_024)),
            ((9, 513), size(1, 1_024)),
            ((0, u32::MAX), size(0, 1_024)),
        ] {
            extent.is_told(told.0, told.1);
            assert_eq!(extent.now, now, "{told:?}");
        }
    }

    #[test]
    fn a_vmm_is_never_harder_to_kill_than_its_shim_lc_45() {
        for (wanted, own, score) in [
            (-1000, "-998\n", -998),
            (0, "-998\n", 0),
            (1000, "0\n", 1000),
            (-500, "", 0),
        ] {
            assert_eq!(oom_score(wanted, own), score, "{wanted} {own:?}");
        }
    }

    #[test]
    fn without_kvm_the_error_says_what_to_do_f29() {
        let error = open_kvm(Path::new("/dev/no-kvm")).unwrap_err();
        assert_eq!(error.code(), ttrpc::Code::FAILED_PRECONDITION);
        let text = error.text();
        assert!(
            text.contains("/dev/kvm") && text.contains("load kvm") && text.contains("No such file"),
            "{text}"
        );
    }
}
