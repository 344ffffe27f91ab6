//! `bench-exec`: a command in a running container, from the start of the client to its
//! end, beside runc and crun. Runs in the lab host.
//!
//! Every runtime has one container that sleeps; `true` is executed in each in turn.
//! Fails when a goal is missed.

#![expect(clippy::print_stdout, reason = "the table is the program's purpose")]

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use bulkhead_bench::{Goals, OURS, RUNC, Running, SLEEP, Taken, Task, head, output, row};

/// The image, as a layout.
const LAYOUT: &str = "/usr/share/lab/images/busybox";

/// At most so much of runc's time, alone and behind containerd. crun is there to be seen.
const GOAL: f64 = 1.0;

/// A container of an OCI runtime; removed when dropped.
struct Bundle(&'static str, tempfile::TempDir);

impl Bundle {
    fn start(runtime: &'static str) -> Result<Bundle> {
        let folder = tempfile::tempdir()?;
        let root = folder.path().join("rootfs");
        fs::create_dir(&root)?;
        // The image's one layer, so that all run the same program.
        let blobs = fs::read_dir(Path::new(LAYOUT).join("blobs/sha256"))?;
        let layer = blobs
            .flatten()
            .max_by_key(|blob| blob.metadata().map_or(0, |status| status.len()))
            .context("The image has no layer")?
            .path();
        let untar = Command::new("tar")
            .arg("-C")
            .arg(&root)
            .arg("-xf")
            .arg(&layer)
            .status()?;
        ensure!(untar.success(), "Cannot unpack {}", layer.display());
        let place = folder.path().to_str().context("a plain name")?;
        output(&[runtime, "spec", "--bundle", place])
            .or_else(|_| output(&["sh", "-c", &format!("cd {place} && {runtime} spec")]))?;
        let path = folder.path().join("config.json");
        let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path)?)?;
        config["process"]["args"] = serde_json::json!(SLEEP);
        config["process"]["terminal"] = serde_json::json!(false);
        fs::write(&path, config.to_string())?;
        let bundle = Bundle(runtime, folder);
        // Its container keeps what it writes to open.
        let place = bundle.1.path().display();
        let run = format!(
            "{runtime} run -d --bundle {place} bench >{place}/log 2>&1 </dev/null || {{ cat {place}/log >&2; exit 1; }}",
        );
        output(&["sh", "-c", &run])?;
        Ok(bundle)
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let _ = output(&[self.0, "delete", "--force", "bench"]);
    }
}

fn main() -> Result<()> {
    let rounds: usize = std::env::args()
        .nth(1)
        .map_or(Ok(5), |n| n.parse())
        .context("Usage: bench-exec [ROUNDS]")?;
    let ready = Path::new("/tmp/bench-exec-ready");
    let _alone = Running::start(Command::new("bulkhead").args([
        "run",
        "--rm",
        "--name",
        "bench",
        "-v",
        "/tmp:/host",
        LAYOUT,
        "--",
        "sh",
        "-c",
        "touch /host/bench-exec-ready; sleep 100000",
    ]))?;
    let _ours = Task::start("bench-ours", OURS)?;
    let _runc = Task::start("bench-runc", RUNC)?;
    let _bare = [Bundle::start("runc")?, Bundle::start("crun")?];
    while !ready.exists() {
        std::thread::yield_now();
    }
    fs::remove_file(ready)?;

    let ctr = |id| vec!["ctr", "task", "exec", "--exec-id", "e", id, "true"];
    let ways: [(&str, Vec<&str>); 5] = [
        ("bulkhead exec", vec!["bulkhead", "exec", "bench", "true"]),
        ("ctr exec, bulkhead", ctr("bench-ours")),
        ("ctr exec, runc", ctr("bench-runc")),
        ("runc exec", vec!["runc", "exec", "bench", "true"]),
        ("crun exec", vec!["crun", "exec", "bench", "true"]),
    ];
    let taken = Taken::measure(&ways, rounds)?;
    let (ms, exits) = (|name| taken.ms(name), |name| taken.exits(name));
    println!("exec: a command in a running container, virtual ms, {rounds} rounds, medians");
    let (ours, runc, crun) = (ms("bulkhead exec"), ms("runc exec"), ms("crun exec"));
    head("bulkhead exec", &["runc exec", "crun exec"]);
    row("whole command", ours, &[runc, crun]);
    row("exits, all guests", exits("bulkhead exec"), &[]);
    let (behind, its) = (ms("ctr exec, bulkhead"), ms("ctr exec, runc"));
    head("ctr, bulkhead", &["ctr, runc"]);
    row("whole command", behind, &[its]);
    row("exits, all guests", exits("ctr exec, bulkhead"), &[]);
    let mut goals = Goals::default();
    goals.at_most("the time beside runc's", ours / runc, GOAL);
    goals.at_most("the time beside runc's behind ctr", behind / its, GOAL);
    goals.kept()
}
