use super::*;

#[test]
fn a_process_is_known_by_its_start_not_by_its_number_lc_50() {
    let mut child = std::process::Command::new("sleep")
        .arg("60")
        .spawn()
        .unwrap();
    let process = HostProcess::of(child.id().cast_signed()).unwrap();
    let other = HostProcess {
        start_time: process.start_time + 1,
        ..process
    };
    assert!(other.open().unwrap().is_none());
    let fd = process.open().unwrap().unwrap();
    assert!(!ended(&fd, 10));
    signal(&fd, Signal::KILL).unwrap();
    assert!(ended(&fd, 5000));
    child.wait().unwrap();
    assert!(process.open().unwrap().is_none());
    signal(&fd, Signal::KILL).unwrap();
}

fn state_dir(root: &tempfile::TempDir) -> StateDir {
    StateDir {
        path: root.path().join("ns/pod"),
    }
}

/// A process that has ended and was reaped.
fn dead() -> HostProcess {
    let mut child = std::process::Command::new("true").spawn().unwrap();
    let process = HostProcess::of(child.id().cast_signed()).unwrap();
    child.wait().unwrap();
    process
}

fn entries(dir: &Path) -> Vec<std::ffi::OsString> {
    let entries = fs::read_dir(dir).unwrap();
    entries.map(|entry| entry.unwrap().file_name()).collect()
}

#[test]
fn removal_is_idempotent_and_touches_only_known_names_lc_49() {
    let root = tempfile::tempdir().unwrap();
    let dir = state_dir(&root);
    let held = dir.take("pod", Some("/x".into())).unwrap();
    held.write_reason("guest panic").unwrap();
    assert_eq!(dir.processes().socket, Some("/x".into()));
    assert_eq!(dir.processes().owner.as_deref(), Some("pod"));
    held.remove().unwrap();
    assert!(
        entries(root.path()).is_empty(),
        "no lock file is left either"
    );
    held.remove().unwrap();
    drop(held);
    let held = dir.take("pod", None).unwrap();
    fs::write(dir.share().join("precious"), "x").unwrap();
    assert!(held.remove().is_err());
    assert!(dir.share().join("precious").exists());
}

#[test]
fn what_a_full_disk_left_behind_is_in_nobodys_way_f9() {
    let root = tempfile::tempdir().unwrap();
    let dir = state_dir(&root);
    let held = dir.take("pod", None).unwrap();
    for name in ["reason.new", "processes.json.new"] {
        fs::write(dir.path().join(name), "hal").unwrap();
    }
    held.remove().unwrap();
    assert!(!dir.exists());
}

#[test]
fn half_a_file_does_not_stay_on_a_full_disk_f9() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let mount = root.path().to_owned();
    std::thread::spawn(move || {
        crate::share::enter_private_namespace().unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("t", &mount, "tmpfs", flags, c"size=64k").unwrap();
        let dir = StateDir {
            path: mount.join("ns/pod"),
        };
        let held = dir.take("pod", None).unwrap();
        let error = held.write_reason(&"x".repeat(1 << 20)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
        assert!(!dir.path().join("reason.new").exists());
        held.remove().unwrap();
        assert!(!dir.exists());
    })
    .join()
    .unwrap();
}

#[test]
fn a_lock_that_cannot_be_had_leaves_nothing_f8() {
    let root = tempfile::tempdir().unwrap();
    let dir = state_dir(&root);
    fs::create_dir_all(dir.path().with_file_name(".pod.lock")).unwrap();
    dir.lock().unwrap_err();
    fs::remove_dir(dir.path().with_file_name(".pod.lock")).unwrap();
    let link = dir.path().with_file_name(".pod.lock");
    std::os::unix::fs::symlink("/dev/null", link).unwrap();
    dir.take("pod", None).unwrap_err();
    assert!(!dir.exists());
}

#[test]
fn a_shim_at_its_end_leaves_its_successors_directory_alone() {
    let root = tempfile::tempdir().unwrap();
    let dir = state_dir(&root);
    let first = dir.take("pod", None).unwrap();
    // Another shim has taken over meanwhile.
    let mut processes = dir.processes();
    processes.shim = Some(dead());
    dir.record(&processes).unwrap();
    fs::write(dir.path().join("vsock.sock"), "").unwrap();
    first.write_reason("not this pod's").unwrap();
    first.record_vmm(dead()).unwrap();
    drop(first);
    assert_eq!(dir.processes(), processes);
    assert!(dir.share().is_dir() && dir.path().join("vsock.sock").exists());
    assert!(!dir.path().join("reason").exists());
}

#[test]
fn a_dead_shims_directory_is_taken_over_and_a_living_ones_is_not() {
    let root = tempfile::tempdir().unwrap();
    let dir = state_dir(&root);
    let held = dir.take("pod", None).unwrap();
    let error = dir.take("pod", None).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
    let mut processes = dir.processes();
    processes.shim = Some(dead());
    dir.record(&processes).unwrap();
    let successor = dir.take("pod", None).unwrap();
    assert_eq!(dir.processes().shim, Some(successor.me));
    // This process is both: tell the first one apart.
    std::mem::forget(held);
    drop(successor);
    assert!(entries(root.path()).is_empty());
}

#[test]
fn a_lock_has_one_holder_although_its_file_comes_and_goes() {
    let root = tempfile::tempdir().unwrap();
    let dir = state_dir(&root);
    let inside = std::sync::atomic::AtomicU32::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..50 {
                    let _lock = dir.lock().unwrap();
                    assert_eq!(inside.fetch_add(1, std::sync::atomic::Ordering::SeqCst), 0);
                    std::thread::yield_now();
                    inside.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                }
            });
        }
    });
    assert!(entries(root.path()).is_empty());
}
