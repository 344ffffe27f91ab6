//! What the processes of a running pod may do, held against the tables in the
//! source.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    collections::HashSet,
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use bulkhead_tests::{BUSYBOX, BUSYBOX_NAME, Command, Setting, bundle};
use bulkhead_vmm::jail::{
    posture,
    threads::{self, ThreadKind},
};
use serde_json::json;

/// The one process of this name.
fn process(name: &str) -> String {
    let pids = Command::new("pgrep", ["-x", name]).run().success();
    let mut pids = pids.lines().map(str::to_owned);
    let pid = pids.next().unwrap();
    assert_eq!(pids.next(), None);
    pid
}

#[test]
fn every_thread_of_the_vmm_has_what_the_table_says() {
    let _setting = Setting::put("most_vcpus = 2\n");
    let script = "echo ready; read line; echo $line > /file; cat /file";
    let run = ["run", "-i", "--rm", "--name", "seen", "--memory", "128m"];
    let command = [BUSYBOX, "--", "sh", "-c", script];
    let run = Command::bulkhead(run.into_iter().chain(command)).start();
    run.wait_for_output("ready");
    // Some threads come when the machine grows.
    let update = ["update", "--memory", "300m", "--cpus", "2", "seen"];
    Command::bulkhead(update).run().success();
    let vmm = Path::new("/proc").join(process("bulkhead-vmm"));
    let mut kinds = HashSet::new();
    let mut user = None;
    for task in fs::read_dir(vmm.join("task")).unwrap() {
        let task = task.unwrap().path();
        let read = |name: &str| fs::read_to_string(task.join(name)).unwrap();
        let name = read("comm");
        // KVM's own, which never leaves the kernel.
        if name.starts_with("kvm-") {
            continue;
        }
        let kind = ThreadKind::of(name.trim_end()).unwrap_or_else(|| panic!("{name}"));
        let status = read("status");
        let ids = status.lines().find_map(|line| line.strip_prefix("Uid:\t"));
        let id: u32 = ids.unwrap().split('\t').next().unwrap().parse().unwrap();
        if kind != ThreadKind::Files {
            assert_eq!(*user.get_or_insert(id), id, "{name}");
        }
        kinds.insert((kind, status));
    }
    // Far above what any account of the host has, and not root's.
    let user = user.unwrap();
    assert!(user > 0x7000_0000, "{user}");
    for (kind, status) in &kinds {
        posture::check(*kind, user, status).unwrap();
    }
    let kinds: HashSet<_> = kinds.into_iter().map(|(kind, _)| kind).collect();
    for kind in ThreadKind::ALL {
        assert_eq!(kinds.contains(&kind), kind != ThreadKind::Disk, "{kind:?}");
    }
    // It is still good for something.
    run.write("line\n");
    assert!(run.wait().success().ends_with("line\n"));
}

/// `/dev/null`, `/dev/kvm`, and `/dev/net/tun`, which opened anew is no interface before who
/// may administer a network makes it one.
const DEVICES: [u64; 3] = [0x103, 0xae8, 0xac8];

#[test]
fn the_vmm_holds_nothing_that_it_could_open_anew_and_is_not_its_own() {
    let run = [
        "run", "-i", "--rm", "--name", "held", BUSYBOX, "--", "sh", "-c",
    ];
    let run = Command::bulkhead(run.into_iter().chain(["echo ready; read line"]));
    let run = run.start();
    run.wait_for_output("ready");
    let pid = process("bulkhead-vmm");
    for fd in fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        let fd = fd.unwrap();
        // One that was closed meanwhile is not held.
        let (Ok(link), Ok(about)) = (fs::read_link(fd.path()), fs::metadata(fd.path())) else {
            continue;
        };
        let link = link.display().to_string();
        let kinds = ["anon_inode:", "socket:[", "pipe:["];
        let is_own = kinds.iter().any(|kind| link.starts_with(kind));
        let is_device = about.file_type().is_char_device() && DEVICES.contains(&about.rdev());
        let is_shared = link.starts_with("/held/");
        // Otherwise it only names something, such as the directory of descriptors.
        let number = fd.file_name().display().to_string();
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).unwrap_or_default();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:\t"));
        let flags = u32::from_str_radix(flags.unwrap_or("0"), 8).unwrap();
        let is_name = flags & libc::O_PATH.unsigned_abs() != 0;
        assert!(
            is_own || is_device || is_shared || is_name,
            "{link} {flags:o}"
        );
    }
    run.write("\n");
    run.wait().success();
}

/// The cgroup of the one VMM, below the root; it is alone there with what stands for
/// its container.
fn cgroup_of_the_vmm() -> PathBuf {
    let pid = process("bulkhead-vmm");
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let place = text.trim_end().strip_prefix("0::/").unwrap();
    let procs = fs::read_to_string(dir(place).join("cgroup.procs")).unwrap();
    let mut procs: Vec<&str> = procs.lines().collect();
    procs.retain(|other| *other != pid);
    assert_eq!(procs, [process("bulkhead-task")]);
    place.into()
}

/// The directory of a cgroup.
fn dir(place: impl AsRef<Path>) -> PathBuf {
    Path::new("/sys/fs/cgroup").join(place)
}

#[test]
fn the_vmm_lives_in_a_cgroup_of_its_own_that_limits_its_tasks() {
    let run = Command::bulkhead([
        "run",
        "-i",
        "--rm",
        "--name",
        "placed",
        BUSYBOX,
        "--",
        "sh",
        "-c",
        "echo ready; read line",
    ]);
    let run = run.start();
    run.wait_for_output("ready");
    let place = cgroup_of_the_vmm();
    assert!(
        place.starts_with("bulkhead") && place.ends_with("placed"),
        "{place:?}"
    );
    let number = |name: &str| -> u64 {
        let text = fs::read_to_string(dir(&place).join(name)).unwrap();
        text.trim_end().parse().unwrap()
    };
    // Memory and two interfaces may come. And 1,024 processes that stand for those of
    // containers.
    assert_eq!(number("pids.max"), threads::most(1, 2, 3) + 1024);
    let (now, most) = (number("pids.current"), number("pids.max"));
    assert!(now <= most, "{now} of {most}");
    // What the virtual machine costs can be seen.
    assert!(number("memory.current") > 0);
    run.write("\n");
    run.wait().success();
    assert!(!dir("bulkhead").exists());
}

#[test]
fn a_shim_that_is_killed_leaves_no_cgroup_f1() {
    let run = Command::bulkhead([
        "run",
        "--rm",
        BUSYBOX,
        "--",
        "sh",
        "-c",
        "echo ready; sleep 1000",
    ]);
    let run = run.start();
    run.wait_for_output("ready");
    let place = cgroup_of_the_vmm();
    let shim = ["-KILL", "-f", "containerd-shim-bulkhead-v2"];
    Command::new("pkill", shim).run().success();
    assert!(run.wait().code != 0);
    assert!(!dir(&place).exists() && !dir("bulkhead").exists());
}

#[test]
fn the_cgroup_is_where_the_specification_has_it() {
    for (path, place) in [
        ("/lab/pod/one", "lab/pod/one"),
        (
            "lab-pod.slice:bulkhead:one",
            "lab.slice/lab-pod.slice/bulkhead-one.scope",
        ),
    ] {
        let made = tempfile::tempdir().unwrap();
        let mut config = bundle::config("echo ready; read line");
        config["linux"]["cgroupsPath"] = json!(path);
        bundle::write(made.path(), &config);
        let run = [
            "run",
            "-i",
            "--rm",
            "--bundle",
            made.path().to_str().unwrap(),
        ];
        let run = Command::bulkhead(run).start();
        run.wait_for_output("ready");
        assert_eq!(cgroup_of_the_vmm(), Path::new(place));
        run.write("\n");
        run.wait().success();
        let top = Path::new(place).iter().next().unwrap();
        assert!(!dir(Path::new(top)).exists(), "{path}");
    }
}

#[test]
fn containerds_place_for_a_container_is_that_of_its_vmm() {
    let runtime = "io.containerd.bulkhead.v2";
    let run = [
        "run",
        "--runtime",
        runtime,
        "--detach",
        BUSYBOX_NAME,
        "placed",
        "sleep",
        "1000",
    ];
    Command::new("ctr", run).run().success();
    let place = cgroup_of_the_vmm();
    for end in [
        &["task", "kill", "--signal", "SIGKILL", "placed"][..],
        &["task", "rm", "--force", "placed"],
        &["container", "rm", "placed"],
    ] {
        // The second one comes too late if the first one was fast.
        let _ = Command::new("ctr", end).run();
    }
    assert_eq!(place, Path::new("default/placed"));
    assert!(!dir(&place).exists());
}
