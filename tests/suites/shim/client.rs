//! A shim as containerd starts it, and calls of its Task service.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use bulkhead_tests::bundle;
use containerd_shim_protos::api::{CreateTaskRequest, CreateTaskResponse, Mount};
use serde_json::Value;
use tempfile::TempDir;

use crate::task::{BINARY, NAMESPACE, TASK_V3, Task};

/// A shim and its one container. Dropped, what is left of it is deleted.
pub(crate) struct Shim {
    pub(crate) task: Task,
    /// Of the container.
    pub(crate) id: String,
    dir: TempDir,
}

/// A mount of a root file system.
pub(crate) fn mount(kind: &str, source: &Path, options: &[&str]) -> Mount {
    Mount {
        type_: kind.into(),
        source: source.to_str().expect("UTF-8").into(),
        options: options.iter().map(ToString::to_string).collect(),
        ..Mount::default()
    }
}

impl Shim {
    /// Starts a shim for a bundle with this configuration.
    pub(crate) fn start(id: &str, config: &Value) -> Shim {
        let dir = tempfile::tempdir().expect("temporary directory");
        fs::write(dir.path().join("config.json"), config.to_string()).expect("config.json");
        let answer = action(id, dir.path(), "start");
        assert!(answer.status.success(), "{answer:?}");
        assert!(answer.stderr.is_empty(), "{answer:?}");
        let address = String::from_utf8(answer.stdout).expect("an address");
        Shim {
            task: Task::connect(&address, TASK_V3, id),
            id: id.into(),
            dir,
        }
    }

    /// The container's bundle.
    pub(crate) fn bundle(&self) -> &Path {
        self.dir.path()
    }

    /// Where output goes.
    fn output(&self) -> PathBuf {
        self.bundle().join("output")
    }

    /// What was written so far.
    pub(crate) fn said(&self) -> String {
        fs::read_to_string(self.output()).unwrap_or_default()
    }

    /// Creates the container; answers the pid.
    pub(crate) fn create(&self, rootfs: Vec<Mount>) -> ttrpc::Result<u32> {
        let output = format!("file://{}", self.output().display());
        let request = CreateTaskRequest {
            id: self.id.clone(),
            bundle: self.bundle().to_str().expect("UTF-8").into(),
            rootfs,
            stdout: output.clone(),
            stderr: output,
            ..CreateTaskRequest::default()
        };
        let answer = self.task.call::<CreateTaskResponse>("Create", &request);
        answer.map(|answer| answer.pid)
    }

    /// Lets its program run.
    pub(crate) fn start_program(&self) -> ttrpc::Result<()> {
        self.task.start("").map(drop)
    }

    /// Waits for the end of its program; answers the exit code.
    pub(crate) fn wait(&self) -> ttrpc::Result<u32> {
        self.task.wait("").map(|answer| answer.exit_status)
    }

    /// Sends SIGKILL.
    pub(crate) fn kill(&self) -> ttrpc::Result<()> {
        self.task.kill("", false).map(drop)
    }

    /// Deletes the container; answers the exit code.
    pub(crate) fn delete(&self) -> ttrpc::Result<u32> {
        self.task.delete("").map(|answer| answer.exit_status)
    }

    /// Ends the shim.
    pub(crate) fn shutdown(self) {
        // It may be gone before it answers.
        let _ = self.task.shutdown();
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        action(&self.id, self.dir.path(), "delete");
    }
}

/// Runs the binary as containerd does.
fn action(id: &str, bundle: &Path, action: &str) -> std::process::Output {
    Command::new(BINARY)
        .args(["-namespace", NAMESPACE, "-address", "", "-publish-binary"])
        .args(["", "-id", id])
        .arg(action)
        .current_dir(bundle)
        .stdin(Stdio::null())
        .output()
        .expect("the shim's binary")
}

/// An image with ext4 that holds busybox, in this file.
pub(crate) fn ext4(path: &Path) {
    let root = tempfile::tempdir().expect("temporary directory");
    bundle::busybox_root(root.path());
    for place in ["proc", "dev"] {
        fs::create_dir_all(root.path().join(place)).expect("a mount point");
    }
    let made = Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-d"])
        .arg(root.path())
        .arg(path)
        .arg("32M")
        .output()
        .expect("mke2fs");
    assert!(made.status.success(), "{made:?}");
}
