//! `delete`: removes what a pod left behind, from its id alone.
//!
//! Needs no living shim, no guest, no bundle; whatever is gone already is no error.
//! It may meet a shim that is in the middle of its own end, and for a container whose
//! pod has another name (a label groups them) a shim in full health: that one is
//! asked, a dead one's pod is removed. Takes less than five seconds, which
//! containerd gives it. Mounts need no care: they ended with the shim's mount
//! namespace.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use containerd_shim_protos::{
    api::{DeleteRequest, DeleteResponse, KillRequest, ShutdownRequest, WaitRequest},
    protobuf::{Message, MessageField, well_known_types::timestamp::Timestamp},
    shim_async::{Client, TaskClient},
};
use rustix::process::Signal;
use tokio::{net::UnixStream, time::timeout};
use ttrpc::r#async::transport::Socket;

use crate::{
    cgroup,
    error::{Error, Result, host},
    explain::Explanation,
    fate::{self, Ending, Fate},
    flags::Flags,
    hooks::{Hooks, Host, Moment},
    mount,
    names::{ContainerId, Group, GroupId, Namespace, Role},
    start,
    statedir::{Processes, StateDir, ended, kept, kill, signal},
};

/// Time for all of it.
const ALL: Duration = Duration::from_millis(4500);
/// Time for the shim to end in order once its VM is gone.
const ORDERLY_MS: u32 = 800;
/// Time for a killed shim to be gone.
const KILLED_MS: u32 = 1000;
/// Time for the shim of a group to let go of one container.
const ASK: Duration = Duration::from_millis(2500);
/// Time for the hooks of the end.
const LAST: Duration = Duration::from_millis(2500);
/// Exit status of a task of which no end was recorded: it died with its VM, as of
/// SIGKILL.
const STATUS: u32 = 137;

/// When all must be done.
#[derive(Clone, Copy, Debug)]
struct End(Instant);

impl End {
    /// So much for one step, as far as there is still time.
    fn at_most(self, limit: Duration) -> Duration {
        limit.min(self.0.saturating_duration_since(Instant::now()))
    }
}

/// Cleans up and returns what must be printed.
pub fn run(flags: &Flags) -> Result<Vec<u8>> {
    let time = End(Instant::now() + ALL);
    let namespace = Namespace::new(&flags.namespace)?;
    let id = ContainerId::new(&flags.id)?;
    let bundle = bundle(flags);
    let own = StateDir::of(&namespace, &GroupId::new(id.as_str())?);
    // Before the directory goes.
    let mut fate = fate::of(own.path(), &id);
    end(&own, time)?;
    for (group, role) in groups(&namespace, &id, bundle.as_deref()) {
        let processes = group.processes();
        if is_alive(&processes) {
            fate = ask(&processes, &id, role, time).or(fate);
        } else {
            fate = fate::of(group.path(), &id).or(fate);
            end(&group, time)?;
        }
    }
    if let Some(bundle) = bundle {
        // By whoever mounted it there; containerd gives up on a busy one.
        let _ = mount::detach(&bundle.join("rootfs"));
    }
    answer(fate)
        .write_to_bytes()
        .map_err(|error| host("encode the answer")(io::Error::other(error)))
}

/// What must be printed: how the container ended, if that is known.
fn answer(fate: Option<Fate>) -> DeleteResponse {
    let end = fate.and_then(|fate| fate.end);
    DeleteResponse {
        pid: fate.map_or(0, |fate| fate.pid),
        exit_status: end.map_or(STATUS, |end| end.status.into()),
        exited_at: MessageField::some(end.map_or_else(Timestamp::now, |end| end.at())),
        ..DeleteResponse::default()
    }
}

fn bundle(flags: &Flags) -> Option<PathBuf> {
    if flags.bundle.is_empty() {
        std::env::current_dir().ok()
    } else {
        Some(PathBuf::from(&flags.bundle))
    }
}

/// Pods of another name in which the container may be, and what it is to them: that of
/// its labels, and those that were made for it.
fn groups(namespace: &Namespace, id: &ContainerId, bundle: Option<&Path>) -> Vec<(StateDir, Role)> {
    let spec = bundle.and_then(|bundle| start::spec(bundle).ok().flatten());
    let named = Group::of(id, spec.as_ref()).ok();
    let role = |dir: &StateDir| {
        let name = dir.path().file_name().and_then(|name| name.to_str());
        match &named {
            _ if name == Some(id.as_str()) => None,
            Some(group) if name == Some(group.id.as_str()) => Some(group.role),
            _ if dir.processes().owner.as_deref() == Some(id.as_str()) => Some(Role::Owner),
            _ => None,
        }
    };
    StateDir::all(namespace)
        .into_iter()
        .filter_map(|dir| role(&dir).map(|role| (dir, role)))
        .collect()
}

fn is_alive(processes: &Processes) -> bool {
    let shim = processes.shim.and_then(|shim| shim.open().ok().flatten());
    shim.is_some_and(|shim| !ended(&shim, 0))
}

/// Asks a living shim to let go of one container, and to end if the pod was made for it
/// and nothing else is there. Answers how the container ended, if the shim says so.
fn ask(processes: &Processes, id: &ContainerId, role: Role, time: End) -> Option<Fate> {
    let socket = processes.socket.as_ref()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .ok()?;
    // Whether it has done so or not, nothing more is to be done.
    let limit = time.at_most(ASK);
    let asked = runtime.block_on(async { timeout(limit, let_go(socket, id, role)).await });
    asked.ok()?.ok()?
}

async fn let_go(socket: &Path, id: &ContainerId, role: Role) -> io::Result<Option<Fate>> {
    let stream = UnixStream::connect(socket).await?;
    let task = TaskClient::new(Client::new(Socket::new(stream)));
    let context = || ttrpc::context::with_timeout(0);
    let id = id.to_string();
    let delete = DeleteRequest {
        id: id.clone(),
        ..DeleteRequest::default()
    };
    let mut deleted = task.delete(context(), &delete).await;
    if deleted.is_err() {
        let kill = KillRequest {
            id: id.clone(),
            signal: libc::SIGKILL.unsigned_abs(),
            all: true,
            ..KillRequest::default()
        };
        let wait = WaitRequest {
            id: id.clone(),
            ..WaitRequest::default()
        };
        // Each of them fails if there is no such container any more.
        if task.kill(context(), &kill).await.is_ok() {
            let _ = task.wait(context(), &wait).await;
            deleted = task.delete(context(), &delete).await;
        }
    }
    let shutdown = ShutdownRequest {
        id,
        ..ShutdownRequest::default()
    };
    if role == Role::Owner {
        let _ = task.shutdown(context(), &shutdown).await;
    }
    Ok(deleted.ok().map(|answer| Fate {
        pid: answer.pid,
        end: Some(Ending {
            status: u8::try_from(answer.exit_status).unwrap_or(u8::MAX),
            seconds: answer.exited_at.seconds,
            nanos: answer.exited_at.nanos,
        }),
    }))
}

/// Ends the processes of a pod and removes its directory and socket.
fn end(dir: &StateDir, time: End) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    let processes = dir.processes();
    kill(processes.vmm);
    if let Some(shim) = processes.shim.and_then(|shim| shim.open().ok().flatten()) {
        // With its VM gone it tells the ends of its tasks and cleans up itself.
        let _ = signal(&shim, Signal::TERM);
        if !ended(&shim, ORDERLY_MS) {
            let _ = signal(&shim, Signal::KILL);
            ended(&shim, KILLED_MS);
        }
    }
    let failed = |source| Error::Path {
        action: "remove",
        path: dir.path().to_owned(),
        source,
    };
    // Without a lock (a full disk) there is nobody to be protected from either.
    let _lock = dir.lock().ok();
    let now = dir.processes();
    if now.shim != processes.shim && is_alive(&now) {
        // Another shim has begun here since.
        return Ok(());
    }
    // A VM that was started in the meantime.
    kill(now.vmm);
    if let Err(error) = cgroup::remove_recorded(dir.path(), time.at_most(cgroup::LEAVE_DELETE)) {
        // containerd takes that for a warning.
        eprintln!("{}", error.text());
    }
    if let Some(socket) = processes.socket {
        remove_dead_socket(&socket);
    }
    run_last(dir, time.at_most(LAST));
    dir.remove().map_err(failed)
}

/// Runs the hooks that the shim would have run at the end of its containers.
fn run_last(dir: &StateDir, limit: Duration) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let (Ok(runtime), Ok(host)) = (runtime, Host::here()) else {
        return;
    };
    let host = Arc::new(host);
    let told = kept::all(dir).into_iter();
    let told = told.filter_map(|path| Explanation::read(&path).ok());
    let all = told.filter_map(|told| Hooks::of_the_end(&host, told));
    let run = async {
        for hooks in all {
            if let Err(error) = hooks.run(Moment::Poststop, 0).await {
                eprintln!("{}", error.text());
            }
        }
    };
    if runtime
        .block_on(async { timeout(limit, run).await })
        .is_err()
    {
        eprintln!("The hooks of the end take too long");
    }
    runtime.shutdown_background();
}

/// Removes a socket unless somebody listens on it: then it is another shim's.
fn remove_dead_socket(path: &Path) {
    if !start::is_alive(path) {
        let _ = fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_has_no_more_time_than_there_is_for_all_of_them_lc_51() {
        let left = End(Instant::now() + Duration::from_millis(100));
        assert!(left.at_most(LAST) <= Duration::from_millis(100));
        assert_eq!(End(Instant::now()).at_most(LAST), Duration::ZERO);
        assert_eq!(End(Instant::now() + ALL).at_most(ASK), ASK);
        // What has no other limit than its own comes first.
        let first = u64::from(1000 + ORDERLY_MS + KILLED_MS + 1000);
        assert!(Duration::from_millis(first) < ALL);
    }
}
