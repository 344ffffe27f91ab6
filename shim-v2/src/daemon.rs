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
use futures::{StreamExt, stream};
use serde::{Deserialize, Serialize};
use tokio::{
    net::UnixListener,
    signal::unix::{SignalKind, signal},
    sync::Notify,
    time::{sleep, timeout},
};
use tracing::{info, warn};

use crate::{
    callers::{self, Callers, Connection},
    carry::{self, CarriedFd},
    cgroup,
    error::{Error, Result, host},
    events::Publisher,
    flags::Flags,
    hooks::Host,
    io::{StreamHost, streaming::Hub},
    log,
    names::{GroupId, Namespace},
    options::{self, Options},
    pod::{self, Parts, Pod},
    settings::Settings,
    share::{Share, enter_private_namespace},
    statedir::{Held, StateDir},
    task::TaskService,
    upgrade::Successor,
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

/// Runs the daemon in the current directory, the bundle; or goes on with that of another
/// program in the same process.
pub fn run(flags: &Flags) -> Result<()> {
    let taken = carry::received().map_err(host("take over from the program before"))?;
    let begun = match taken {
        Some(carried) => resume(flags, carried)?,
        None => begin(flags)?,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(host("start the runtime"))?;
    let result = runtime.block_on(serve(begun));
    // What still blocks in a thread (a mount on a dead server) must not keep the
    // process.
    runtime.shutdown_timeout(CLOSE);
    result
}

/// What the daemon found at its start.
#[derive(Debug)]
struct Begun {
    namespace: Namespace,
    settings: Arc<Settings>,
    held: Held,
    listener: StdListener,
    socket: Option<PathBuf>,
    outside: Arc<Host>,
    /// Its own program.
    own: PathBuf,
    /// What was going on already.
    carried: Option<Going>,
}

/// What goes along when the program changes.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Carried {
    pub(crate) log: log::Carried,
    pub(crate) own: PathBuf,
    pub(crate) settings: Settings,
    pub(crate) listener: CarriedFd,
    pub(crate) socket: Option<PathBuf>,
    pub(crate) outside: CarriedFd,
    pub(crate) going: Going,
}

/// What is going on.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Going {
    pub(crate) callers: Vec<callers::Carried>,
    pub(crate) pod: pod::Carried,
}

/// The answer to who asks whether this program can take over. It is refused if there is
/// something in `shown`, what it would get, and this is not understood.
pub fn carries(mut shown: impl Read) -> io::Result<String> {
    let mut text = Vec::new();
    shown.read_to_end(&mut text)?;
    carry::understood::<Carried>(&text)
}

fn begin(flags: &Flags) -> Result<Begun> {
    let namespace = Namespace::new(&flags.namespace)?;
    let group = GroupId::new(&flags.id)?;
    let listener = inherited_listener()?;
    let socket = listener
        .local_addr()
        .ok()
        .and_then(|address| address.as_pathname().map(Path::to_owned));
    let bundle = std::env::current_dir().map_err(host("find the bundle"))?;
    let own = std::env::current_exe().map_err(host("find the shim's own file"))?;
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
    Ok(Begun {
        namespace,
        settings,
        held,
        listener,
        socket,
        outside: Arc::new(outside),
        own,
        carried: None,
    })
}

/// Takes over from the program before this one in the same process.
fn resume(flags: &Flags, carried: Carried) -> Result<Begun> {
    log::unpack(carried.log);
    let failed = host("take over from the program before");
    let namespace = Namespace::new(&flags.namespace)?;
    let group = GroupId::new(&flags.id)?;
    let parts = || -> io::Result<_> {
        Ok((
            StateDir::of(&namespace, &group).unpack()?,
            StdListener::from(carried.listener.take()?),
            Host::unpack(carried.outside.take()?),
        ))
    };
    let (held, listener, outside) = parts().map_err(failed)?;
    Ok(Begun {
        settings: Arc::new(carried.settings),
        held,
        listener,
        socket: carried.socket,
        outside: Arc::new(outside),
        own: carried.own,
        carried: Some(carried.going),
        namespace,
    })
}

async fn serve(begun: Begun) -> Result<()> {
    let Begun {
        namespace,
        settings,
        held,
        listener,
        socket,
        outside,
        own,
        carried,
    } = begun;
    let mut term = signal(SignalKind::terminate()).map_err(host("watch SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(host("watch SIGINT"))?;
    let mut hangup = signal(SignalKind::hangup()).map_err(host("watch SIGHUP"))?;
    // Other shims take them as a wish to log what they do.
    let mut dump = signal(SignalKind::user_defined1()).map_err(host("watch SIGUSR1"))?;
    let _user2 = signal(SignalKind::user_defined2()).map_err(host("watch SIGUSR2"))?;
    let held = Arc::new(held);
    let taken = carried.is_some();
    if taken {
        // Before there is a thread or a child that would have them blocked as well.
        carry::listens().map_err(host("listen to signals"))?;
    }
    let (callers, carried) = match carried {
        Some(going) => (going.callers, Some(going.pod)),
        None => (Vec::new(), None),
    };
    let share = match &carried {
        None => Share::mount(&held.dir().share())?,
        Some(_) => Share::unpack(&held.dir().share()),
    };
    let address = std::env::var("TTRPC_ADDRESS").unwrap_or_default();
    let (events, carried) = match carried {
        None => (Vec::new(), None),
        Some(mut pod) => (std::mem::take(&mut pod.events), Some(pod)),
    };
    let events = Publisher::unpack(&namespace, &address, events);
    let hypervisor = Arc::new(Kvm {
        settings: Arc::clone(&settings),
        dir: held.dir().clone(),
    });
    let parts = Parts {
        streams: StreamHost {
            namespace: namespace.clone(),
            mounts: Some(outside.mounts()),
            hub: Hub::new(socket.clone()),
        },
        namespace,
        settings: Arc::clone(&settings),
        dir: Arc::clone(&held),
        share,
        events,
        hypervisor,
        host: Arc::clone(&outside),
    };
    let pod = match carried {
        None => Pod::new(parts),
        Some(carried) => Pod::unpack(parts, carried)?,
    };
    let end = Arc::new(Notify::new());
    let service = TaskService::new(Arc::clone(&pod), socket.clone(), Arc::clone(&end));
    let services = service.clone().services();
    let connections = Callers::of(&services);
    let again = connections.unpack(callers);
    let again = again.map_err(host("take over the connections of callers"))?;
    listener
        .set_nonblocking(true)
        .map_err(host("make the socket non-blocking"))?;
    let own_listener = listener
        .try_clone()
        .map_err(host("keep the socket for who comes next"))?;
    let listener = UnixListener::from_std(listener).map_err(host("watch the socket"))?;
    let mut server = Server::new()
        .add_listener(only_root(again, listener, connections.clone()))
        .register_service(services)
        .register_service(callers::refusals());
    server
        .start()
        .await
        .map_err(|error| host("serve")(io::Error::other(error)))?;
    let successor = Successor {
        own,
        settings,
        listener: own_listener,
        socket,
        outside,
        callers: connections,
        pod: Arc::clone(&pod),
        held,
    };
    match taken {
        false => say_ready()?,
        true => successor.record(None).await,
    }
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
        () = async { while hangup.recv().await.is_some() { successor.take_over().await } } => {}
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

/// Connections that were there, and new ones of the shim's own user; others are closed
/// unheard.
fn only_root(again: Vec<Connection>, listener: UnixListener, callers: Callers) -> Listener {
    let own = rustix::process::geteuid().as_raw();
    let new = futures::stream::unfold((listener, callers), move |(listener, callers)| async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => match stream.peer_cred() {
                    Ok(peer) if peer.uid() == own => {
                        let connection = callers.connection(stream);
                        return Some((Ok(connection), (listener, callers)));
                    }
                    _ => warn!("a connection of another user was closed"),
                },
                Err(error) => {
                    // Out of descriptors: some will be closed.
                    warn!(%error, "cannot accept a connection");
                    sleep(Duration::from_millis(50)).await;
                }
            }
        }
    });
    Listener::new(stream::iter(again.into_iter().map(Ok)).chain(new))
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
