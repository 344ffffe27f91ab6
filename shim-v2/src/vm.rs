//! The pod's virtual machine: boot, the agent's connection, the end.
//!
//! A [`Vm`] that exists has an agent that greeted. Dropping it kills the VMM; the
//! thread that started the VMM reaps it. How it ended is kept in
//! [`Vm::ended`], and nobody needs the guest or a lock to kill it.

mod acceptor;
pub mod control;
pub(crate) mod cores;
pub mod holder;
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
use bulkhead_vmm::{config as vmm_config, jail::threads};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout, timeout_at};
use tracing::info;

use self::{
    holder::{HOLDERS, Holder},
    vmm::{End, Launch, Vmm},
};
use crate::{
    agent::{self, Agent},
    assets::Assets,
    carry::Bag,
    cgroup::{Cgroup, Place},
    config::Config,
    error::{Error, Result, host},
    guest::{Boots, Guest},
    io::Dialer,
    mount,
    settings::Settings,
    spec::Limits,
    statedir::{HostProcess, StateDir},
};

/// Base of the guest kernel's command line.
pub const CMDLINE: &str = "quiet panic=-1 reboot=k";

/// Name of the listening socket of the vsock device.
const VSOCK: &str = "vsock.sock";

/// Time that the VMM gets to report before it is killed.
const REPORT: Duration = Duration::from_millis(500);
/// Time for a VMM that did not come up to be gone.
const GONE: Duration = Duration::from_secs(3);

/// Size of a virtual machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Virtual processors, 1 to 64.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Places for disks.
    pub places: u8,
}

impl Size {
    /// The size for a container with these limits on a host of so many processors
    /// and so much memory.
    ///
    /// Processors: the limit rounded up, at most those of the host. Memory: the
    /// limit and the guest's own need above it, at most the host's; without a
    /// limit what the configuration says.
    #[must_use]
    pub fn of(limits: Limits, config: &Config, host_cpus: u64, host_mib: u64) -> Self {
        let cpus = limits
            .cpus
            .unwrap_or_else(|| u64::from(config.vcpus))
            .clamp(1, host_cpus.clamp(1, 64));
        let most = host_mib.clamp(64, 1_048_576);
        let memory = match limits.memory {
            Some(bytes) => {
                (bytes.div_ceil(1 << 20)).saturating_add(u64::from(config.guest_overhead_mib))
            }
            None => u64::from(config.memory_mib),
        };
        Size {
            vcpus: u8::try_from(cpus).unwrap_or(1),
            memory_mib: u32::try_from(memory.min(most)).unwrap_or(config.memory_mib),
            places: 0,
        }
    }

    /// The size for a container on this host.
    #[must_use]
    pub fn on_this_host(limits: Limits, config: &Config) -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let info = rustix::system::sysinfo();
        let bytes = info.totalram.saturating_mul(u64::from(info.mem_unit));
        Self::of(
            limits,
            config,
            u64::try_from(cpus).unwrap_or(1),
            bytes >> 20,
        )
    }
}

/// What a boot needs.
#[derive(Debug)]
pub struct Boot<'a> {
    /// The administrator's settings.
    pub config: &'a Config,
    /// The pod's state.
    pub dir: &'a StateDir,
    /// The size.
    pub size: Size,
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
}

impl Vm {
    /// Boots a virtual machine and waits for its agent.
    pub async fn boot(boot: Boot<'_>) -> Result<Self> {
        let begun = Instant::now();
        let deadline = begun + boot.config.boot_timeout();
        let config = boot.config.clone();
        let dir = boot.dir.clone();
        let (size, oom_score_adj) = (boot.size, boot.oom_score_adj);
        let place = boot.cgroup;
        let place = place.unwrap_or_else(|| Place::like(boot.dir.path()));
        let prepared = tokio::task::spawn_blocking(move || {
            prepare(&config, &dir, size, oom_score_adj, &place)
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
                    vcpus = size.vcpus,
                    memory_mib = size.memory_mib,
                    "virtual machine is up"
                );
                return Ok(Vm {
                    agent,
                    dialer: Dialer::new(state, VSOCK),
                    vmm,
                });
            }
            // The VMM's own end says more than a connection that closed.
            Ok(Err(error)) => match timeout(REPORT, vmm.ended()).await {
                Ok(end) => Error::Boot(end.reason),
                Err(_) => error,
            },
            Err(_) => {
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
                    "the agent did not connect within {limit} s{console}"
                ))
            }
        };
        // Whoever tries again finds everything free.
        vmm.kill();
        let _ = timeout(GONE, vmm.gone()).await;
        Err(error)
    }
}

/// What goes along of a virtual machine when the program changes.
#[derive(Debug, Serialize, Deserialize)]
pub struct Carried {
    agent: agent::Carried,
    next_stream: u64,
    vmm: vmm::Carried,
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
        size: Size,
        oom_score_adj: i32,
        cgroup: Option<Place>,
    ) -> Result<Arc<dyn Guest>> {
        let own = std::fs::read_to_string("/proc/self/oom_score_adj").unwrap_or_default();
        let boot = Boot {
            config: self.settings.get(),
            dir: &self.dir,
            size,
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
        self.vmm.control().attach(disk, read_only).await
    }

    async fn detach(&self, device: u8) -> Result<()> {
        self.vmm.control().detach(device).await
    }

    fn hold(&self, label: &str, network: Option<BorrowedFd<'_>>) -> Result<Holder> {
        self.vmm.quarters().hold(label, network)
    }

    fn carry(&self, bag: &mut Bag) -> io::Result<Option<Carried>> {
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
    size: Size,
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
    let shares = shares(&dir.share(), size.vcpus);
    // Last: nothing that may still fail has to take it back.
    let tasks = threads::most(size.vcpus, shares.len(), size.places) + HOLDERS;
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
        vcpus: size.vcpus,
        memory_mib: size.memory_mib,
        places: size.places,
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
    fn a_vm_is_as_large_as_its_container_and_the_guest_itself_b11_cl_13() {
        let config = Config::default();
        let size = |cpus, memory| Size::of(Limits { cpus, memory }, &config, 8, 16_384);
        assert_eq!(
            size(None, None),
            Size {
                vcpus: 1,
                memory_mib: 512,
                places: 0,
            }
        );
        assert_eq!(
            size(Some(2), Some(256 << 20)),
            Size {
                vcpus: 2,
                memory_mib: 384,
                places: 0,
            }
        );
        assert_eq!(
            size(Some(100), Some(1 << 50)),
            Size {
                vcpus: 8,
                memory_mib: 16_384,
                places: 0,
            }
        );
        assert_eq!(
            size(Some(0), Some(1)),
            Size {
                vcpus: 1,
                memory_mib: 129,
                places: 0,
            }
        );
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
