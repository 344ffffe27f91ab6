//! The daemon: what `start` runs in the background.
//!
//! Inherits the listening socket, makes its own mount namespace while it is
//! single-threaded, takes the pod's directory, tells `start` that it is ready, then
//! serves until Shutdown, SIGTERM, or ten minutes without a container.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, FromRawFd, OwnedFd, RawFd},
        unix::{fs::OpenOptionsExt, net::UnixListener as StdListener},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use containerd_shim_protos::{
    bootstrap_api::BootstrapParams,
    protobuf::Message,
    ttrpc::r#async::{Server, transport::Listener},
};
use tokio::{
    net::UnixListener,
    signal::unix::{SignalKind, signal},
    sync::Notify,
    time::{sleep, timeout},
};
use tracing::{info, warn};

use crate::{
    cgroup,
    error::{Error, Result, host},
    events::Publisher,
    flags::Flags,
    hooks::Host,
    io::{StreamHost, streaming::Hub},
    log,
    names::{GroupId, Namespace},
    options::{self, Options},
    pod::{Parts, Pod},
    settings::Settings,
    share::{Share, enter_private_namespace},
    statedir::{Held, StateDir},
    task::TaskService,
    vm::Kvm,
};

/// Environment variable with the number of the listening socket.
pub const LISTENER_FD: &str = "BULKHEAD_LISTENER_FD";
/// Environment variable with the container for which the pod is made.
pub const OWNER: &str = "BULKHEAD_OWNER";
/// What the daemon says on its standard output when it is ready.
pub const READY: &str = "ready\n";

/// Time without any container after which the shim ends.
const UNUSED: Duration = Duration::from_secs(600);
/// Time for the last answers to leave.
const CLOSE: Duration = Duration::from_millis(500);

/// Runs the daemon in the current directory, the bundle.
pub fn run(flags: &Flags) -> Result<()> {
    let namespace = Namespace::new(&flags.namespace)?;
    let group = GroupId::new(&flags.id)?;
    let listener = inherited_listener()?;
    let socket = listener
        .local_addr()
        .ok()
        .and_then(|address| address.as_pathname().map(Path::to_owned));
    let bundle = std::env::current_dir().map_err(host("find the bundle"))?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let outside = Host::here()?;
    enter_private_namespace()?;
    let options = handed_options()?;
    // Settings that cannot be used end the daemon, and `start` says why; but first there
    // must be a log.
    let settings = Settings::of_start(&options);
    let debug = flags.debug || settings.as_ref().is_ok_and(|of| of.get().debug);
    log::init(&bundle, debug);
    options.log();
    if !flags.ignored.is_empty() {
        info!(
            flags = flags.ignored.join(" "),
            "flags are not known and were ignored"
        );
    }
    let settings = Arc::new(settings?);
    if !options.shim_cgroup.is_empty() {
        cgroup::join(&options.shim_cgroup, std::process::id())?;
    }
    let dir = StateDir::of(&namespace, &group);
    let owner = std::env::var(OWNER).unwrap_or_default();
    let held = dir
        .take(&owner, socket.clone())
        .map_err(|source| Error::Path {
            action: "make the state directory",
            path: dir.path().to_owned(),
            source,
        })?;
    // The bundle may go before the daemon does.
    std::env::set_current_dir("/").map_err(host("leave the bundle"))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(host("start the runtime"))?;
    let given = Given {
        streams: StreamHost {
            namespace: namespace.clone(),
            mounts: Some(outside.mounts()),
            hub: Hub::new(socket.clone()),
        },
        namespace,
        settings,
        held: Arc::new(held),
        socket,
        outside: Arc::new(outside),
    };
    let result = runtime.block_on(serve(listener, given));
    // What still blocks in a thread (a mount on a dead server) must not keep the
    // process.
    runtime.shutdown_timeout(CLOSE);
    result
}

/// What the daemon found at its start.
#[derive(Debug)]
struct Given {
    namespace: Namespace,
    settings: Arc<Settings>,
    held: Arc<Held>,
    socket: Option<PathBuf>,
    outside: Arc<Host>,
    streams: StreamHost,
}

async fn serve(listener: StdListener, given: Given) -> Result<()> {
    let Given {
        namespace,
        settings,
        held,
        socket,
        outside,
        streams,
    } = given;
    let share = Share::mount(&held.dir().share())?;
    let address = std::env::var("TTRPC_ADDRESS").unwrap_or_default();
    let events = Publisher::new(&namespace, &address);
    let hypervisor = Arc::new(Kvm {
        settings: Arc::clone(&settings),
        dir: held.dir().clone(),
    });
    let pod = Pod::new(Parts {
        namespace,
        settings,
        dir: held,
        share,
        events,
        hypervisor,
        host: outside,
        streams,
    });
    let end = Arc::new(Notify::new());
    let service = TaskService::new(Arc::clone(&pod), socket, Arc::clone(&end));
    listener
        .set_nonblocking(true)
        .map_err(host("make the socket non-blocking"))?;
    let listener = UnixListener::from_std(listener).map_err(host("watch the socket"))?;
    let mut server = Server::new()
        .add_listener(only_root(listener))
        .register_service(service.clone().services());
    server
        .start()
        .await
        .map_err(|error| host("serve")(io::Error::other(error)))?;
    let mut term = signal(SignalKind::terminate()).map_err(host("watch SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(host("watch SIGINT"))?;
    // The end of whoever started us is no reason to end.
    let _hangup = signal(SignalKind::hangup()).map_err(host("watch SIGHUP"))?;
    // Other shims take them as a wish to log what they do.
    let mut dump = signal(SignalKind::user_defined1()).map_err(host("watch SIGUSR1"))?;
    let _user2 = signal(SignalKind::user_defined2()).map_err(host("watch SIGUSR2"))?;
    say_ready()?;
    tokio::select! {
        () = end.notified() => {}
        _ = term.recv() => {
            info!("SIGTERM");
            service.stop().await;
        }
        _ = interrupt.recv() => {
            info!("SIGINT");
            service.stop().await;
        }
        () = unused(&pod) => {
            info!("nobody needs this shim");
            service.stop().await;
        }
        () = async { while dump.recv().await.is_some() { pod.log_state() } } => {}
    }
    let _ = timeout(CLOSE, server.shutdown()).await;
    info!("shim ends");
    Ok(())
}

/// Waits until the pod has been without a VM and containers for long.
pub(crate) async fn unused(pod: &Pod) {
    loop {
        sleep(UNUSED).await;
        if pod.is_empty() && pod.is_new() {
            return;
        }
    }
}

/// Connections of the shim's own user; others are closed unheard.
fn only_root(listener: UnixListener) -> Listener {
    let own = rustix::process::geteuid().as_raw();
    Listener::new(futures::stream::unfold(
        listener,
        move |listener| async move {
            loop {
                match listener.accept().await {
                    Ok((stream, _)) => match stream.peer_cred() {
                        Ok(peer) if peer.uid() == own => return Some((Ok(stream), listener)),
                        _ => warn!("a connection of another user was closed"),
                    },
                    Err(error) => {
                        // Out of descriptors: some will be closed.
                        warn!(%error, "cannot accept a connection");
                        sleep(Duration::from_millis(50)).await;
                    }
                }
            }
        },
    ))
}

fn inherited_listener() -> Result<StdListener> {
    let wrong = || host("take the socket from start")(io::Error::from(io::ErrorKind::InvalidInput));
    let number: RawFd = std::env::var(LISTENER_FD)
        .ok()
        .and_then(|text| text.parse().ok())
        .ok_or_else(wrong)?;
    if number <= 2 {
        return Err(wrong());
    }
    // SAFETY: `start` let exactly this descriptor be inherited, and nothing else in
    // this process knows of it; a wrong number fails in the first call upon it.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    rustix::io::fcntl_setfd(fd.as_fd(), rustix::io::FdFlags::CLOEXEC)
        .map_err(host("take the socket from start"))?;
    Ok(StdListener::from(fd))
}

/// The options that `start` hands over on our standard input, and lets go of it.
fn handed_options() -> Result<Options> {
    let failed = "take the options from start";
    let mut bytes = Vec::new();
    io::stdin().read_to_end(&mut bytes).map_err(host(failed))?;
    rustix::stdio::dup2_stdin(null()?).map_err(host(failed))?;
    let params = BootstrapParams::parse_from_bytes(&bytes);
    let params = params.map_err(|error| host(failed)(io::Error::other(error)))?;
    Ok(Options::read(&options::unpack(params)))
}

fn null() -> Result<File> {
    let flags = rustix::fs::OFlags::CLOEXEC.bits().cast_signed();
    File::options()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open("/dev/null")
        .map_err(host("open /dev/null"))
}

/// Tells `start`, which waits on our standard output, and lets go of it.
fn say_ready() -> Result<()> {
    let mut stdout = io::stdout();
    stdout
        .write_all(READY.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(host("tell start"))?;
    rustix::stdio::dup2_stdout(null()?).map_err(host("let go of start"))
}
