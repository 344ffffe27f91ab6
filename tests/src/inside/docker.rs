//! A Docker daemon for tests that want one; at other times none runs.

use std::fs;

use serde_json::Value;

use crate::{BUSYBOX, Command};

/// The lab host starts no daemon without it.
const SETTINGS: &str = "/etc/docker/daemon.json";

/// A Docker daemon that knows the image as `busybox`; stopped when dropped.
#[derive(Debug)]
pub struct Daemon(());

impl Daemon {
    /// With these settings.
    ///
    /// # Panics
    ///
    /// It does not start, or does not take the image.
    #[must_use]
    pub fn start(settings: &Value) -> Daemon {
        let written = fs::create_dir_all("/etc/docker")
            .and_then(|()| fs::write(SETTINGS, settings.to_string()));
        written.expect("settings of Docker");
        let start = ["start", "docker.service"];
        Command::new("systemctl", start).run().success();
        let daemon = Daemon(());
        let blobs = fs::read_dir(format!("{BUSYBOX}/blobs/sha256")).expect("an image");
        let size = |blob: &fs::DirEntry| blob.metadata().map_or(0, |blob| blob.len());
        let layer = blobs.flatten().max_by_key(size).expect("a layer").path();
        let import = ["import", "--change", "ENV PATH=/bin"].map(Into::into);
        let import = import
            .into_iter()
            .chain([layer.into_os_string(), "busybox".into()]);
        Command::new("docker", import).run().success();
        daemon
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let stop = ["stop", "docker.service"];
        let _ = Command::new("systemctl", stop).run();
        let _ = fs::remove_file(SETTINGS);
        // containerd makes it for whoever comes first, and keeps it.
        let _ = fs::remove_dir("/run/containerd/io.containerd.runtime.v2.task/moby");
    }
}
