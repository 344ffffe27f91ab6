//! Hooks of a container in the guest: its own programs that run before the one that it
//! was made for.
//!
//! Each runs as a further process would, with the rights of the first one, while that
//! waits. The guest knows neither bundle nor annotations: the state names `/` and none.

use std::{
    fs::File,
    io::{self, Seek, Write},
    os::fd::OwnedFd,
    time::Duration,
};

use rustix::{
    fs::{MemfdFlags, memfd_create},
    pipe::{PipeFlags, pipe_with},
    process::{Signal, pidfd_send_signal},
};
use tokio::{io::AsyncReadExt, net::unix::pipe::Receiver, time::timeout};

use super::{Container, Containers, cgroup_fd, give_to_user};
use crate::{
    channel::{Failure, FailureKind, Fds, Job, Place},
    error::{Doing, Error},
    launch::launch,
    reaper::ended,
    spec::plan::{ContainerPlan, Hook, Namespace, ProcessPlan, guest_id},
};

/// Last bytes of a hook's output that go into an error.
const OUTPUT_MAX: usize = 512;

/// The hooks of a container that has any.
#[derive(Debug)]
pub(super) struct Hooks {
    list: Vec<Hook>,
    /// Whose rights they have.
    process: ProcessPlan,
    /// Whether its first process has number 1.
    own_pids: bool,
}

impl Hooks {
    pub(super) fn of(plan: &ContainerPlan) -> Option<Self> {
        let list = plan.hooks.start_container.clone();
        (!list.is_empty()).then(|| Hooks {
            list,
            process: plan.process.clone(),
            own_pids: plan.namespaces.pid == Namespace::Own,
        })
    }
}

impl Containers {
    /// Runs the hooks before the start, one after the other, until one fails.
    pub(super) async fn run_hooks(&self, container: &Container) -> Result<(), Error> {
        let Some(hooks) = &container.hooks else {
            return Ok(());
        };
        let state = serde_json::json!({
            "ociVersion": "1.3.0",
            "id": container.id,
            "status": "created",
            "pid": if hooks.own_pids { 1 } else { container.init.pid },
            "bundle": "/",
        })
        .to_string();
        for (number, hook) in hooks.list.iter().enumerate() {
            let ran = self.run_hook(container, &hooks.process, hook, &state);
            ran.await.map_err(|reason| {
                let path = hook.path.display();
                Error::Init(Failure {
                    text: format!("hooks.startContainer[{number}] {path}: {reason}"),
                    kind: FailureKind::Step,
                    errno: None,
                })
            })?;
        }
        Ok(())
    }

    async fn run_hook(
        &self,
        container: &Container,
        process: &ProcessPlan,
        hook: &Hook,
        state: &str,
    ) -> Result<(), String> {
        let (mut output, said) = pipe().map_err(|error| error.to_string())?;
        let plan = ProcessPlan {
            args: hook.args.clone(),
            hook: Some(hook.path.clone()),
            env: hook.env.clone(),
            cwd: "/".into(),
            terminal: None,
            ..process.clone()
        };
        let launched = async {
            let fds = Fds {
                stdio: [
                    input(state).doing("tell a hook the state")?,
                    said.try_clone().doing("hear a hook")?,
                    said,
                ],
                cgroup: cgroup_fd(&*container.cgroup()?)?,
                container: Some(
                    container
                        .init
                        .pidfd
                        .try_clone()
                        .doing("refer to the container")?,
                ),
            };
            give_to_user(&fds.stdio, guest_id(&container.uid_maps, plan.uid))?;
            let job = Job::Exec {
                process: Box::new(plan),
                container: self.place(container),
            };
            let launched = launch(&self.config.helper, &self.reaper, &job, fds).await?;
            let (pidfd, exit) = (launched.pidfd.clone(), launched.exit.clone());
            launched.into_waiting().start().await?;
            Ok::<_, Error>((pidfd, exit))
        };
        let (pidfd, exit) = launched.await.map_err(|error| error.to_string())?;
        let mut last = Vec::new();
        let over = async {
            tokio::select! {
                exit = ended(exit) => exit,
                // Its output never ends for us: only its end does.
                exit = hear(&mut output, &mut last) => exit,
            }
        };
        let reason = match timeout(hook.limit(), over).await {
            Ok(Some(exit)) if exit.status == 0 => return Ok(()),
            Ok(Some(exit)) => format!("it ended with status {}", exit.status),
            Ok(None) => "its end is not known".to_owned(),
            Err(_) => {
                // One that has just ended needs no signal.
                let _ = pidfd_send_signal(&*pidfd, Signal::KILL);
                format!("it was killed after {} s", hook.limit().as_secs())
            }
        };
        let _ = timeout(Duration::ZERO, hear::<()>(&mut output, &mut last)).await;
        let words = String::from_utf8_lossy(&last);
        Err(match words.trim() {
            "" => reason,
            words => format!("{reason}: {words}"),
        })
    }

    /// Where a further process of a container goes.
    pub(super) fn place(&self, container: &Container) -> Place {
        Place {
            init: container.init.pid,
            cgroup: self.last_names_of_cgroup(&container.id),
            own_user: !container.uid_maps.is_empty(),
            keyring: container.keyring.clone(),
        }
    }
}

/// All of the state, and then its end, whether anybody reads it or not.
fn input(state: &str) -> io::Result<OwnedFd> {
    let mut file = File::from(memfd_create("state", MemfdFlags::CLOEXEC)?);
    file.write_all(state.as_bytes())?;
    file.rewind()?;
    Ok(file.into())
}

fn pipe() -> io::Result<(Receiver, OwnedFd)> {
    let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
    Ok((Receiver::from_owned_fd(ours)?, theirs))
}

/// Keeps the end of what a hook says; never comes to an end itself.
async fn hear<T>(output: &mut Receiver, last: &mut Vec<u8>) -> T {
    let mut piece = [0; 4096];
    while let Ok(length @ 1..) = output.read(&mut piece).await {
        last.extend(piece.iter().take(length));
        let excess = last.len().saturating_sub(OUTPUT_MAX);
        last.drain(..excess);
    }
    std::future::pending().await
}
