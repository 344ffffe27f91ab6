//! What a container does, and its removal.
//!
//! The lock of a container says whether the process lives that runs it; only where it
//! does not its shim is asked, for a limited time: a shim that was stopped keeps
//! nobody waiting.

use std::{
    fs,
    os::fd::OwnedFd,
    path::Path,
    time::{Duration, Instant},
};

use containerd_shim_protos::api::Status;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use serde::Serialize;

use crate::{
    error::{Error, Result},
    id::ContainerId,
    paths,
    record::{self, Found, Record, Scratch},
    shim,
    task::Task,
};

/// How long a shim may take to say what its container does.
const ANSWER: Duration = Duration::from_secs(2);

/// How long a `bulkhead run` may take to end once its container is gone.
const END: Duration = Duration::from_secs(15);

/// How often the lock of an ending one is looked at; nothing tells when it is free.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// What a container does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It is being made.
    Starting,
    /// Its first process runs.
    Running,
    /// It ended, and everything was taken down.
    Exited,
    /// Neither: `bulkhead run` or the shim was killed.
    Dead,
    /// Its `bulkhead run` was killed, and its shim does not answer.
    Silent,
    /// What is remembered of it cannot be read.
    Damaged,
}

impl State {
    /// The state of a container that was found on disk.
    pub async fn of(found: &Found) -> Self {
        match &found.record {
            Ok(None) if found.alive => State::Starting,
            Ok(None) => State::Dead,
            Ok(Some(_)) if found.alive => State::Running,
            Ok(Some(record)) if record.exit_code.is_some() => State::Exited,
            Ok(Some(record)) => asked(&found.id, &record.bundle).await,
            Err(_) if found.alive => State::Running,
            Err(_) => match asked(&found.id, &paths::bundle(&found.id)).await {
                State::Dead => State::Damaged,
                state => state,
            },
        }
    }
}

/// What the shim of a container says.
async fn asked(id: &ContainerId, bundle: &Path) -> State {
    let answer = async {
        let task = connect(id, bundle).await?;
        task.state().await
    };
    match tokio::time::timeout(ANSWER, answer).await {
        Err(_) => State::Silent,
        Ok(Ok(answer)) if answer.status.enum_value_or_default() != Status::STOPPED => {
            State::Running
        }
        Ok(_) => State::Dead,
    }
}

/// Connects to the shim of a container, by the file that its start wrote into the
/// bundle.
pub async fn connect(id: &ContainerId, bundle: &Path) -> Result<Task> {
    let Ok(address) = fs::read_to_string(bundle.join("address")) else {
        return Err(Error::NotRunning(id.to_string()));
    };
    Task::connect(id, address.trim())
        .await
        .map_err(|_| Error::NotRunning(id.to_string()))
}

/// Removes a container with its files. One that has not ended is left alone, unless
/// `force` is wanted: then it is killed.
pub async fn remove(containers: &Path, id: &ContainerId, force: bool) -> Result<()> {
    let Some(found) = record::find(containers, id) else {
        return Err(Error::NoContainer(id.to_string()));
    };
    let state = State::of(&found).await;
    match state {
        State::Starting if !force => return Err(Error::Starting(id.to_string())),
        State::Running if !force => return Err(Error::Running(id.to_string())),
        State::Silent if !force => return Err(Error::Silent(id.to_string())),
        _ => {}
    }
    if state != State::Exited && state != State::Starting {
        // Its `bulkhead run` was killed, or force is wanted: what the shim holds goes.
        let bundle = match &found.record {
            Ok(Some(Record { bundle, .. })) => bundle.clone(),
            _ => paths::bundle(id),
        };
        let bundle = if bundle.is_dir() {
            &bundle
        } else {
            Path::new("/")
        };
        shim::clean_up(id, bundle)?;
    }
    if found.alive {
        let owner = record::owner(containers, id);
        let owner = owner.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        if let Some(owner) = &owner {
            // Where its container does not run yet it undoes by itself what it made.
            let _ = pidfd_send_signal(owner, Signal::TERM);
        }
        ended(containers, id, owner.as_ref()).await?;
    }
    Scratch::adopt(paths::bundle(id)).remove()?;
    Scratch::adopt(containers.join(id.as_str())).remove()
}

/// Waits for the end of the process that runs a container. Its lock may be gone before all
/// that it removes is.
async fn ended(containers: &Path, id: &ContainerId, owner: Option<&OwnedFd>) -> Result<()> {
    let start = Instant::now();
    let runs = |owner: &OwnedFd| {
        let mut about = [PollFd::new(owner, PollFlags::IN)];
        poll(&mut about, Some(&Timespec::default())) == Ok(0)
    };
    while owner.is_some_and(runs) || record::find(containers, id).is_some_and(|found| found.alive) {
        if start.elapsed() > END {
            let owner = record::owner(containers, id);
            let owner = owner.map_or_else(|| "?".to_owned(), |pid| pid.to_string());
            return Err(Error::Stubborn(id.to_string(), owner));
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixListener, path::PathBuf};

    use super::*;

    fn found(record: Result<Option<Record>>, alive: bool) -> Found {
        Found {
            id: "a".parse().unwrap(),
            record,
            alive,
        }
    }

    fn record(bundle: &Path, exit_code: Option<u32>) -> Record {
        let text = serde_json::json!({
            "id": "a", "source": "x", "command": [], "created": 1, "bundle": bundle,
            "exit_code": exit_code,
        });
        serde_json::from_value(text).unwrap()
    }

    #[tokio::test]
    async fn the_lock_and_the_record_say_what_a_container_does() {
        let none = PathBuf::from("/nonexistent");
        for (found, state) in [
            (found(Ok(None), true), State::Starting),
            (found(Ok(None), false), State::Dead),
            (found(Ok(Some(record(&none, None))), true), State::Running),
            (
                found(Ok(Some(record(&none, Some(0)))), false),
                State::Exited,
            ),
            (found(Ok(Some(record(&none, None))), false), State::Dead),
            (
                found(Err(Error::Call("damaged".to_owned())), false),
                State::Damaged,
            ),
        ] {
            assert_eq!(State::of(&found).await, state, "{found:?}");
        }
    }

    #[tokio::test]
    async fn a_shim_that_says_nothing_keeps_nobody_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        // Connections are taken by the kernel; nobody ever reads.
        let _listener = UnixListener::bind(&socket).unwrap();
        let address = format!("unix://{}", socket.display());
        fs::write(dir.path().join("address"), address).unwrap();
        let found = found(Ok(Some(record(dir.path(), None))), false);
        let start = Instant::now();
        assert_eq!(State::of(&found).await, State::Silent);
        assert!(start.elapsed() < Duration::from_secs(20));
    }

    #[tokio::test]
    async fn a_container_that_is_being_started_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let id: ContainerId = "a".parse().unwrap();
        let container = record::Container::make(dir.path(), &id).unwrap();
        let refusal = remove(dir.path(), &id, false).await.unwrap_err();
        assert!(matches!(refusal, Error::Starting(_)), "{refusal}");
        assert!(dir.path().join("a").is_dir());
        drop(container);
        let refusal = remove(dir.path(), &id, false).await.unwrap_err();
        assert!(matches!(refusal, Error::NoContainer(_)), "{refusal}");
    }
}
