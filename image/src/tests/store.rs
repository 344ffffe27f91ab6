//! Layers on disk: whole or not there, shared by processes, cleared when nobody needs
//! them.

use std::{
    collections::HashSet,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    process::{Command, Stdio},
    sync::{
        Mutex,
        atomic::Ordering,
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::Duration,
};

use super::*;

const PATIENCE: Duration = Duration::from_secs(60);

fn names(store: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(store)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn unpacking_stops_when_it_is_asked_to() {
    let layout = Layout::of(&[tar_of(&[file("a", "x")])]);
    assert!(open(layout.path(), &layout.store(), &(), &AtomicBool::new(true)).is_err());
    assert_eq!(names(&layout.store()), [".lock"]);
}

/// Tells when another process is waited for.
struct Waiting(Mutex<mpsc::Sender<()>>);

impl Progress for Waiting {
    fn waiting(&self) {
        self.0.lock().unwrap().send(()).unwrap();
    }
}

#[test]
fn waiting_for_another_process_that_unpacks_stops_when_it_is_asked_to() {
    let layout = Layout::of(&[tar_of(&[file("a", "x")])]);
    fs::create_dir(layout.store()).unwrap();
    let lock = File::create(layout.store().join(".lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let (sender, waiting) = mpsc::channel();
    let (done, ended) = mpsc::channel();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let result = open(
                layout.path(),
                &layout.store(),
                &Waiting(Mutex::new(sender)),
                &stop,
            );
            done.send(result).unwrap();
        });
        waiting.recv_timeout(PATIENCE).unwrap();
        assert!(matches!(
            ended.recv_timeout(Duration::from_millis(200)),
            Err(RecvTimeoutError::Timeout)
        ));
        stop.store(true, Ordering::Relaxed);
        let result = ended.recv_timeout(PATIENCE).unwrap();
        assert!(result.is_err());
    });
    drop(lock);
    assert!(layout.open().is_ok());
}

#[test]
fn two_that_unpack_at_once_make_each_layer_once() {
    let tars: Vec<_> = (0..6)
        .map(|number| tar_of(&[file(&format!("f{number}"), "x")]))
        .collect();
    let layout = Layout::of(&tars);
    let inode = |image: &Image| fs::metadata(image.layers.last().unwrap()).unwrap().ino();
    let (one, other) = thread::scope(|scope| {
        let (one, other) = (scope.spawn(|| layout.open()), scope.spawn(|| layout.open()));
        (one.join().unwrap().unwrap(), other.join().unwrap().unwrap())
    });
    assert_eq!(one.layers, other.layers);
    assert_eq!(inode(&one), inode(&other));
    assert_eq!(names(&layout.store()).len(), 7);
}

/// Where a process that is to be killed finds its image.
const VICTIM: &str = "BULKHEAD_TEST_VICTIM";

/// Says how far it is, and then waits for its end.
struct Stuck(u64);

impl Progress for Stuck {
    fn read(&self, _: u64) {
        println!("stuck {}", self.0);
        loop {
            thread::park();
        }
    }
}

#[test]
fn a_kill_in_the_middle_leaves_only_what_the_next_run_clears() {
    if !is_root() {
        return;
    }
    if let Some(path) = std::env::var_os(VICTIM) {
        let path = PathBuf::from(path);
        // Ends by being killed.
        let _ = open(
            &path,
            &path.join("store"),
            &Stuck(0),
            &AtomicBool::new(false),
        );
        return;
    }
    let layout = Layout::of(&[tar_of(&[file("a", "x")]), tar_of(&[file("b", "y")])]);
    // The first layer is there, the second is being unpacked onto it.
    let first = Layout::of(&[tar_of(&[file("a", "x")])]);
    open(first.path(), &layout.store(), &(), &AtomicBool::new(false)).unwrap();
    let mut victim = Command::new(std::env::current_exe().unwrap());
    victim
        .arg0("victim")
        .args(["--exact", "--nocapture"])
        .arg("tests::store::a_kill_in_the_middle_leaves_only_what_the_next_run_clears")
        .env(VICTIM, layout.path())
        .stdout(Stdio::piped());
    let mut victim = victim.spawn().unwrap();
    let (sender, lines) = mpsc::channel();
    let stdout = victim.stdout.take().unwrap();
    thread::spawn(move || {
        for line in std::io::BufRead::lines(std::io::BufReader::new(stdout)) {
            let _ = sender.send(line.unwrap());
        }
    });
    loop {
        let line = lines.recv_timeout(PATIENCE).unwrap();
        if line.contains("stuck") {
            break;
        }
    }
    let left = |name: &String| name.starts_with(".unpacking-");
    assert!(names(&layout.store()).iter().any(left));
    victim.kill().unwrap();
    victim.wait().unwrap();
    // Its overlay went with it: what is left can be removed.
    let image = layout.open().unwrap();
    assert!(!names(&layout.store()).iter().any(left));
    assert_eq!(fs::read_to_string(image.layers[1].join("b")).unwrap(), "y");
}

#[test]
fn a_full_store_is_told_as_such_and_nothing_half_done_stays() {
    if !is_root() {
        return;
    }
    // A file system of two megabytes that nobody else sees.
    let test = || {
        let layout = Layout::of(&[
            tar_of(&[file("small", "x")]),
            tar_of(&[file("big", &"x".repeat(4 << 20))]),
        ]);
        let none = None::<&Path>;
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        let flags = nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_PRIVATE;
        nix::mount::mount(none, "/", none, flags, none).unwrap();
        fs::create_dir(layout.store()).unwrap();
        nix::mount::mount(
            Some("tmpfs"),
            &layout.store(),
            Some("tmpfs"),
            nix::mount::MsFlags::empty(),
            Some("size=2m"),
        )
        .unwrap();
        let error = layout.open().unwrap_err();
        assert!(matches!(error, Error::Full { .. }), "{error:?}");
        assert!(error.to_string().contains("No room is left"), "{error}");
        let names = names(&layout.store());
        assert!(
            !names.iter().any(|name| name.starts_with(".unpacking")),
            "{names:?}"
        );
        nix::mount::umount(&layout.store()).unwrap();
    };
    thread::spawn(test).join().unwrap();
}

#[test]
fn a_store_on_an_overlay_is_told_as_such_with_what_to_do() {
    if !is_root() {
        return;
    }
    let test = || {
        // One alone lies there as it is.
        let layout = Layout::of(&[tar_of(&[file("a", "x")]), tar_of(&[file("b", "y")])]);
        let none = None::<&Path>;
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        let flags = nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_PRIVATE;
        nix::mount::mount(none, "/", none, flags, none).unwrap();
        let own = scratch();
        let parts = ["lower", "upper", "work"].map(|name| {
            let part = own.path().join(name);
            fs::create_dir(&part).unwrap();
            part.display().to_string()
        });
        let [lower, upper, work] = parts;
        let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
        fs::create_dir(layout.store()).unwrap();
        let (kind, flags) = (Some("overlay"), nix::mount::MsFlags::empty());
        nix::mount::mount(kind, &layout.store(), kind, flags, Some(&*options)).unwrap();
        let error = layout.open().unwrap_err();
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(
            cause.contains("mount a file system of another kind"),
            "{cause}"
        );
        nix::mount::umount(&layout.store()).unwrap();
    };
    thread::spawn(test).join().unwrap();
}

#[test]
fn layers_that_nothing_keeps_are_cleared_once_they_are_old() {
    let layout = Layout::of(&[tar_of(&[file("a", "x")]), tar_of(&[file("b", "y")])]);
    let layers = layout.open().unwrap().layers;
    let store = layout.store();
    let keep = |layers: &[PathBuf]| layers.iter().cloned().collect::<HashSet<_>>();
    assert_eq!(collect(&store, &keep(&layers), Duration::ZERO).unwrap(), 0);
    assert_eq!(
        collect(&store, &keep(&[]), Duration::from_secs(3600)).unwrap(),
        0
    );
    let mode = fs::metadata(&store).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
    assert_eq!(
        collect(&store, &keep(&layers[1..]), Duration::ZERO).unwrap(),
        1
    );
    assert!(!layers[0].exists() && layers[1].exists());
    // What is missing is made again.
    assert!(layout.open().unwrap().layers[0].join("a").exists());
    // Somebody unpacks: nothing is removed, and nobody waits.
    let lock = File::create(store.join(".lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    assert_eq!(collect(&store, &keep(&[]), Duration::ZERO).unwrap(), 0);
    assert!(layers[0].exists());
}
