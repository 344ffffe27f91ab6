//! How things end: processes, containers, the guest, its agent.
//!
//! Every process that exists in the guest has a task here that waits for its end.
//! The end of a first process is told by [`Pod::conclude`] alone, after those of all
//! execs of its container.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use containerd_shim_protos::{cgroups_v2::metrics::Metrics, events::task::TaskOOM};
use futures::future::join_all;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::{Container, DIE, DRAIN, KILLED, Pod};
use crate::{
    clock,
    error::Error,
    events::Event,
    fate::{Ending, Fate},
    guest::Guest,
    lock::lock,
    process::{Exit, Process},
    state::State,
    vm::vmm::End,
};

/// Time for what is on its way when somebody else holds a process's output.
const TAIL: Duration = Duration::from_millis(200);
/// Time from a sign of life to the next look for one.
const BEAT: Duration = Duration::from_secs(3);
/// So many looks without a sign of life are its end.
const MISSES: u32 = 3;
/// A guest that always has news is heard so often.
const NEWS: Duration = Duration::from_secs(1);
/// Exit status of what ended with its agent.
const LOST: u8 = 255;

/// The end of a process as far as the guest tells it.
struct Seen {
    exit: Exit,
    oom_kills: u64,
    drain: Duration,
    used: Option<Box<Metrics>>,
}

impl Pod {
    /// Watches the guest, its agent and its clock.
    pub(super) fn watch_all(self: &Arc<Self>, guest: &Arc<dyn Guest>) {
        tokio::spawn(Arc::clone(self).watch_guest(Arc::clone(guest)));
        tokio::spawn(Arc::clone(self).watch_agent(Arc::clone(guest)));
        tokio::spawn(clock::follow(Arc::clone(guest)));
    }

    /// Waits for the end of a process in the guest, or of the VM, and records it.
    pub(super) fn watch(
        self: &Arc<Self>,
        guest: &Arc<dyn Guest>,
        container: &Arc<Container>,
        process: &Arc<Process>,
    ) {
        let (pod, guest) = (Arc::clone(self), Arc::clone(guest));
        let (container, process) = (Arc::clone(container), Arc::clone(process));
        tokio::spawn(async move {
            let seen = pod.see_end(&*guest, &process).await;
            pod.tell_oom(&container, seen.oom_kills);
            if let Some(used) = seen.used {
                container.has_used(*used);
            }
            if process.name.exec.is_some() {
                process.drained(seen.drain).await;
                process.end(seen.exit);
            } else {
                pod.conclude(&container, seen.exit, seen.drain).await;
            }
        });
    }

    async fn see_end(&self, guest: &dyn Guest, process: &Process) -> Seen {
        let seen = |status, drain| Seen {
            exit: Exit::now(status),
            oom_kills: 0,
            drain,
            used: None,
        };
        match guest.agent().wait(&process.name).await {
            Ok(ended) => {
                // The agent has waited for the output already.
                let drain = if ended.output_open { TAIL } else { DRAIN };
                Seen {
                    oom_kills: ended.oom_kills,
                    used: ended.stats,
                    ..seen(ended.status, drain)
                }
            }
            Err(Error::VmGone(_)) => {
                let end = self.lost(guest).await;
                // Before anybody learns of the exit and asks why.
                self.write_reason(&end).await;
                seen(end.status, DRAIN)
            }
            Err(error) => {
                warn!(process = %process.name, error = error.text(), "its end is not known");
                seen(LOST, DRAIN)
            }
        }
    }

    /// Ends a container: its execs, then its first process, whose output gets
    /// `drain` to be delivered.
    pub(super) async fn conclude(&self, container: &Container, exit: Exit, drain: Duration) {
        let execs: Vec<Arc<Process>> = {
            let mut execs = lock(&container.execs);
            execs.closed = true;
            execs.all.values().cloned().collect()
        };
        // They die with the first process; their watchers tell how.
        let ends = execs.iter().map(|exec| async {
            exec.settled().await;
            if exec.state() == State::Live {
                exec.exit().await;
            }
        });
        let execs_end = async {
            let _ = timeout(DIE, join_all(ends)).await;
            for exec in &execs {
                exec.end(Exit::now(KILLED));
            }
        };
        tokio::join!(execs_end, container.init.drained(drain));
        let fate = Fate {
            pid: container.init.pid(),
            end: Some(Ending::from(&exit)),
        };
        self.keep_fate(&container.id, Some(fate)).await;
        container.init.end(exit);
    }

    /// Tells of the OOM killer when it strikes in a container.
    pub(super) fn watch_oom(self: &Arc<Self>, guest: &Arc<dyn Guest>, container: &Arc<Container>) {
        let (pod, guest) = (Arc::clone(self), Arc::clone(guest));
        let container = Arc::clone(container);
        tokio::spawn(async move {
            loop {
                let seen = container.ooms.load(Ordering::SeqCst);
                let kills = tokio::select! {
                    kills = guest.agent().wait_oom(&container.id, seen) => kills,
                    _ = container.init.exit() => return,
                };
                match kills {
                    Ok(kills) if kills > seen => pod.tell_oom(&container, kills),
                    // The container is gone; if only the agent says so, the exit
                    // tells what there was.
                    _ => return,
                }
                sleep(NEWS).await;
            }
        });
    }

    /// Tells that the OOM killer has struck, if that is news.
    fn tell_oom(&self, container: &Container, kills: u64) {
        if container.ooms.fetch_max(kills, Ordering::SeqCst) >= kills {
            return;
        }
        info!(container = %container.id, kills, "the OOM killer struck");
        // CRI-O looks for this file.
        let _ = std::fs::File::create_new(container.bundle.join("oom"));
        self.events.publish(Event::Oom(TaskOOM {
            container_id: container.id.to_string(),
            ..TaskOOM::default()
        }));
    }

    /// Waits for the end of a guest whose agent cannot be reached any more; ends it
    /// if it does not end by itself.
    pub(super) async fn lost(&self, guest: &dyn Guest) -> End {
        if timeout(DRAIN, guest.ended()).await.is_err() {
            warn!("killing the VM: its agent is gone");
            guest.kill();
        }
        match timeout(DIE, guest.ended()).await {
            Ok(end) => self.verdict(end),
            Err(_) => End {
                status: KILLED,
                reason: "the VMM was killed and does not end".to_owned(),
                console: Vec::new(),
            },
        }
    }

    /// How the guest ended: if the shim had to end it, for what reason.
    pub(super) fn verdict(&self, end: End) -> End {
        self.failure.get().cloned().unwrap_or(end)
    }

    /// Tells of the end of the guest that nobody asked for.
    pub(super) async fn watch_guest(self: Arc<Self>, guest: Arc<dyn Guest>) {
        let end = self.verdict(guest.ended().await);
        if self.stopping.load(Ordering::SeqCst) {
            return;
        }
        warn!(status = end.status, reason = end.reason, "the VM ended");
        for line in &end.console {
            warn!(message_of = "guest", "{line}");
        }
        self.write_reason(&end).await;
    }

    /// Leaves the reason of an end that nobody asked for where clients look for it.
    async fn write_reason(&self, end: &End) {
        if self.stopping.load(Ordering::SeqCst) {
            return;
        }
        let (dir, reason) = (Arc::clone(&self.dir), end.reason.clone());
        // In a task of its own: without a thread to be had this panics, and whoever
        // tells of the end must not.
        let write = async { tokio::task::spawn_blocking(move || dir.write_reason(&reason)).await };
        match tokio::spawn(write).await {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(error))) => warn!(%error, "cannot write the reason"),
            Ok(Err(error)) | Err(error) => warn!(%error, "cannot write the reason"),
        }
    }

    /// Looks now and then, and whenever it let somebody wait in vain, whether the
    /// agent lives. A guest whose agent does not is ended.
    pub(super) async fn watch_agent(self: Arc<Self>, guest: Arc<dyn Guest>) {
        let mut missed = 0;
        while missed < MISSES {
            if missed == 0 {
                tokio::select! {
                    () = sleep(BEAT) => {}
                    () = self.doubt.notified() => {}
                    _ = guest.ended() => return,
                }
            }
            let sign = tokio::select! {
                sign = guest.agent().ping() => sign,
                _ = guest.ended() => return,
            };
            match sign {
                Err(Error::Deadline { .. }) => missed += 1,
                Err(Error::VmGone(_)) => {
                    self.lost(&*guest).await;
                    return;
                }
                // Even a refusal is a sign of life.
                _ => missed = 0,
            }
        }
        let failure = End {
            status: LOST,
            reason: "agent unresponsive".to_owned(),
            console: Vec::new(),
        };
        let _ = self.failure.set(failure);
        guest.kill();
    }
}
