//! The supervisor of a container, started and removed as containerd would.
//!
//! [`Shim`] is a guard: unless it was [closed](Shim::close), dropping it runs the
//! shim's `delete` action, which removes whatever a pod left behind.

use std::{
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use crate::{
    error::{Error, Result},
    id::ContainerId,
    paths,
    task::Task,
};

/// Name of the shim's binary.
pub const SHIM: &str = "containerd-shim-bulkhead-v2";

/// Finds a binary of ours: beside the running one first, then in PATH.
pub fn find_binary(name: &'static str) -> Result<PathBuf> {
    let beside = std::env::current_exe()
        .ok()
        .and_then(|exe| Some(exe.parent()?.to_owned()));
    let path = std::env::var_os("PATH").unwrap_or_default();
    beside
        .into_iter()
        .chain(std::env::split_paths(&path).filter(|dir| dir.is_absolute()))
        .map(|dir| dir.join(name))
        .find(|candidate| {
            rustix::fs::access(candidate, rustix::fs::Access::EXEC_OK).is_ok()
                && candidate.is_file()
        })
        .ok_or(Error::NoBinary(name))
}

/// A running shim, ended with all it holds when this is dropped.
#[derive(Debug)]
pub struct Shim {
    binary: PathBuf,
    id: ContainerId,
    bundle: PathBuf,
    address: String,
    armed: bool,
}

impl Shim {
    /// Starts the supervisor of `bundle`.
    pub fn start(id: &ContainerId, bundle: &Path) -> Result<Self> {
        let binary = find_binary(SHIM)?;
        // From here on there may be something to delete, whatever `start` says.
        let mut shim = Shim {
            binary,
            id: id.clone(),
            bundle: bundle.to_owned(),
            address: String::new(),
            armed: true,
        };
        let output = shim.call("start")?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr);
            let text = text.trim();
            let text = if text.is_empty() {
                output.status.to_string()
            } else {
                text.to_owned()
            };
            return Err(Error::ShimStart(text));
        }
        let answer = String::from_utf8_lossy(&output.stdout);
        shim.address = parse_address(answer.trim()).ok_or_else(|| {
            Error::ShimStart(format!(
                "it answered {:?}, which is no address",
                answer.trim()
            ))
        })?;
        Ok(shim)
    }

    /// Where it listens.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Ends the shim after the container was deleted.
    pub async fn close(mut self, task: &Task) {
        task.shutdown().await;
        self.armed = false;
    }

    fn call(&self, action: &str) -> Result<Output> {
        let mut command = Command::new(&self.binary);
        command.args([
            "-namespace",
            paths::NAMESPACE,
            "-address",
            "",
            "-publish-binary",
            "",
            "-id",
        ]);
        command.arg(self.id.as_str());
        if action == "delete" {
            command.arg("-bundle").arg(&self.bundle);
        }
        command.arg(action).current_dir(&self.bundle).env_clear();
        command.env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        );
        // Its own group, so that a key of our terminal does not reach it.
        command.stdin(Stdio::null()).process_group(0);
        command.output().map_err(|source| Error::Path {
            action: "run",
            path: self.binary.clone(),
            source,
        })
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        if self.armed {
            // The caller already reports why; what is left after this cannot be
            // helped from here.
            let _ = self.call("delete");
        }
    }
}

/// Removes what a dead shim left behind.
pub fn clean_up(id: &ContainerId, bundle: &Path) -> Result<()> {
    let binary = find_binary(SHIM)?;
    drop(Shim {
        binary,
        id: id.clone(),
        bundle: bundle.to_owned(),
        address: String::new(),
        armed: true,
    });
    Ok(())
}

/// The address in an answer of `start`: plain text or JSON.
fn parse_address(answer: &str) -> Option<String> {
    if answer.starts_with('{') {
        let value: serde_json::Value = serde_json::from_str(answer).ok()?;
        return value.get("address")?.as_str().and_then(parse_address);
    }
    let path = answer.strip_prefix("unix://").unwrap_or(answer);
    (path.starts_with('/') && !path.contains('\n')).then(|| format!("unix://{path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_an_address_is_understood() {
        for answer in [
            "unix:///run/s",
            "/run/s",
            r#"{"version":3,"address":"unix:///run/s","protocol":"ttrpc"}"#,
        ] {
            assert_eq!(
                parse_address(answer).as_deref(),
                Some("unix:///run/s"),
                "{answer}"
            );
        }
        for answer in ["", "oops", "{}", "/a\n/b"] {
            assert_eq!(parse_address(answer), None, "{answer}");
        }
    }
}
