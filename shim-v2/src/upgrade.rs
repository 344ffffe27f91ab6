//! Another program takes the shim's place in the same process.
//!
//! On SIGHUP the daemon executes its own file, which a newer version of the package may
//! have replaced. To its callers nothing happens: the process, the socket and all
//! connections stay, containers run on, and whoever waits for an end waits. Only requests
//! that come meanwhile take some milliseconds longer.
//!
//! What is under way is let come to its end first, for [`PATIENCE`]; if it does not, or
//! the other program cannot take over, everything stays as it is, and the state
//! directory says why.

use std::{
    convert::Infallible,
    fmt, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::PathBuf,
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use serde::Serialize;
use tokio::{
    task::{spawn_blocking, yield_now},
    time::{sleep, timeout},
};
use tracing::{info, warn};

use crate::{
    callers::Callers,
    carry::{self, Bag},
    daemon::{Carried, Going},
    error::{Error, Result, host},
    hooks::Host,
    io::streaming,
    log,
    pod::Pod,
    settings::Settings,
    statedir::{Held, HostProcess, StateDir, ended, signal},
};

/// Time for a shim to say what came of it: more than all that it waits for.
const ANSWER: Duration = Duration::from_secs(30);

/// What came of it for one shim.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "outcome")]
pub enum Outcome {
    /// It goes on as the other program.
    #[serde(rename = "taken over")]
    TakenOver {
        /// Its version.
        version: String,
    },
    /// It goes on as it was.
    #[serde(rename = "refused")]
    Refused {
        /// One line.
        reason: String,
    },
    /// It ended meanwhile.
    #[serde(rename = "ended")]
    Ended,
    /// It says nothing.
    #[serde(rename = "silent")]
    Silent,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::TakenOver { version } => write!(f, "goes on as version {version}"),
            Outcome::Refused { reason } => write!(f, "stays: {reason}"),
            Outcome::Ended => f.write_str("has ended"),
            Outcome::Silent => f.write_str("stays: its version cannot hand over"),
        }
    }
}

/// A shim that was asked to let another program take over.
#[derive(Debug)]
pub struct Asked {
    pod: StateDir,
    shim: HostProcess,
    process: OwnedFd,
    tries: u64,
    since: Instant,
}

impl Asked {
    /// Asks the shim of a pod; `None` if it does not live.
    #[must_use]
    pub fn of(pod: &StateDir) -> Option<Self> {
        let processes = pod.processes();
        let shim = processes.shim?;
        let process = shim.open().ok().flatten()?;
        signal(&process, Signal::HUP).ok()?;
        Some(Asked {
            pod: pod.clone(),
            shim,
            process,
            tries: processes.upgrade.map_or(0, |upgrade| upgrade.tries),
            since: Instant::now(),
        })
    }

    /// The pod.
    #[must_use]
    pub fn pod(&self) -> &StateDir {
        &self.pod
    }

    /// The shim's process.
    #[must_use]
    pub fn shim(&self) -> HostProcess {
        self.shim
    }

    /// Waits for what came of it.
    #[must_use]
    pub fn wait(self) -> Outcome {
        while self.since.elapsed() < ANSWER {
            match self.pod.processes().upgrade {
                Some(upgrade) if upgrade.tries > self.tries => {
                    return match upgrade.refused {
                        None => Outcome::TakenOver {
                            version: upgrade.version,
                        },
                        Some(reason) => Outcome::Refused { reason },
                    };
                }
                _ if ended(&self.process, LOOK_MS) => return Outcome::Ended,
                _ => {}
            }
        }
        Outcome::Silent
    }
}

/// Time for what is under way to come to its end.
const PATIENCE: Duration = Duration::from_secs(10);
/// Time for which new requests wait at once.
const HELD: Duration = Duration::from_millis(500);
/// How often it is looked whether it has, as far as nobody tells.
const LOOK: Duration = Duration::from_millis(20);
/// The same for who asked, in milliseconds.
const LOOK_MS: u32 = 20;
/// So many tasks pass an answer of the guest on, one to the next.
const STEPS: u32 = 4;
/// Time for the other program to say whether it can take over.
const ASK: Duration = Duration::from_secs(5);

/// Who takes over, and all that it gets.
#[derive(Debug)]
pub(crate) struct Successor {
    pub(crate) own: PathBuf,
    pub(crate) settings: Arc<Settings>,
    pub(crate) listener: UnixListener,
    pub(crate) socket: Option<PathBuf>,
    pub(crate) outside: Arc<Host>,
    pub(crate) callers: Callers,
    pub(crate) pod: Arc<Pod>,
    pub(crate) held: Arc<Held>,
}

impl Successor {
    /// Lets it take over; returns only if that was refused.
    pub(crate) async fn take_over(&self) {
        info!(program = %self.own.display(), "another program is to take over");
        let Err(error) = self.try_it().await;
        warn!(error = error.text(), "this program goes on");
        self.record(Some(error.text())).await;
    }

    /// Records what came of it, for who asked for it.
    pub(crate) async fn record(&self, refused: Option<String>) {
        if refused.is_none() {
            info!(
                version = env!("CARGO_PKG_VERSION"),
                "this program has taken over"
            );
        }
        let held = Arc::clone(&self.held);
        let recorded = spawn_blocking(move || held.record_upgrade(refused)).await;
        if let Err(error) = recorded.unwrap_or_else(|error| Err(io::Error::other(error))) {
            warn!(%error, "what came of it cannot be recorded");
        }
    }

    async fn try_it(&self) -> Result<Infallible> {
        self.ask(Stdio::null()).await?;
        // They last as long as their processes.
        if self.callers.is_asked(streaming::SERVICE, streaming::METHOD) {
            return Err(Error::Busy("a stream of containerd's".to_owned()));
        }
        match timeout(PATIENCE, self.when_still()).await {
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Error::Busy(self.busy().unwrap_or_default())),
        }
    }

    /// Hands over in a moment in which nothing is under way. New requests wait for that
    /// only where it is near. What the other program would get it is shown first, in
    /// another such moment.
    async fn when_still(&self) -> Result<Infallible> {
        let mut is_understood = false;
        loop {
            while self.busy().is_some() {
                self.news().await;
            }
            let gate = self.callers.close();
            let mut bag = Bag::default();
            if let Ok(packed) = timeout(HELD, self.pack(&mut bag)).await {
                let carried = packed.map_err(host("pack what goes along"))?;
                if !is_understood {
                    let shown = carry::shown(&carried).map_err(host("show what goes along"))?;
                    drop((gate, bag));
                    self.ask(shown.into()).await?;
                    is_understood = true;
                    continue;
                }
                // Nothing else has run since it was packed.
                return Err(Error::Path {
                    action: "execute",
                    path: self.own.clone(),
                    source: carry::execute(&self.own, &carried, bag),
                });
            }
            drop(gate);
            self.news().await;
        }
    }

    /// Waits until something may have come to its end.
    async fn news(&self) {
        tokio::select! {
            () = self.callers.answered() => {}
            () = sleep(LOOK) => {}
        }
    }

    /// Asks the other program whether it can take over, and whether it understands what it
    /// would get, if that is shown.
    async fn ask(&self, shown: Stdio) -> Result<()> {
        let mut command = Command::new(&self.own);
        command
            .arg("-carries")
            .env_clear()
            .stdin(shown)
            .stderr(Stdio::null());
        let asked = timeout(ASK, spawn_blocking(move || command.output())).await;
        let said = asked
            .unwrap_or_else(|_| Ok(Err(io::ErrorKind::TimedOut.into())))
            .unwrap_or_else(|error| Err(io::Error::other(error)));
        let said = said.map_err(|source| Error::Path {
            action: "ask",
            path: self.own.clone(),
            source,
        })?;
        if said.stdout == carry::version().as_bytes() {
            return Ok(());
        }
        Err(Error::Argument {
            what: "The shim's file",
            value: self.own.display().to_string(),
            reason: "it cannot take over what this version has; new pods get it".to_owned(),
        })
    }

    fn busy(&self) -> Option<String> {
        self.callers.busy().or_else(|| self.pod.busy())
    }

    /// Is nothing under way, nor about to be by what was heard just now?
    async fn is_still(&self) -> bool {
        let heard = self.pod.heard();
        for _ in 0..STEPS {
            if self.busy().is_some() {
                return false;
            }
            // Whoever has an answer of the guest comes to know of it.
            yield_now().await;
        }
        self.busy().is_none() && self.pod.heard() == heard
    }

    /// Packs what goes along as soon as nothing is under way. Returns in the same moment.
    async fn pack(&self, bag: &mut Bag) -> io::Result<Carried> {
        loop {
            if self.is_still().await {
                if let Some(pod) = self.pod.carry(bag)? {
                    return Ok(Carried {
                        log: log::carry(bag)?,
                        own: self.own.clone(),
                        settings: Settings::clone(&self.settings),
                        listener: bag.put(&self.listener)?,
                        socket: self.socket.clone(),
                        outside: bag.put(self.outside.mounts().as_fd())?,
                        going: Going {
                            callers: self.callers.carry(bag)?,
                            pod,
                        },
                    });
                }
                *bag = Bag::default();
            }
            self.news().await;
        }
    }
}
