//! On the hierarchies of this machine, in directories of the test's own. Needs root and
//! cgroups that can be made; is skipped without.

use std::process::{Child, Command};

use super::*;

/// Hierarchies, a place that nobody else has, and a state directory.
struct Ground {
    hierarchies: Vec<Hierarchy>,
    name: String,
    state: tempfile::TempDir,
}

impl Ground {
    fn find(name: &str) -> Option<Ground> {
        let hierarchies = Hierarchy::mounted(Path::new(ROOT));
        let name = format!("bulkhead-test-{}-{name}", std::process::id());
        let can = !hierarchies.is_empty()
            && hierarchies.iter().all(|of| {
                let probe = of.root.join(format!("{name}-probe"));
                fs::create_dir(&probe).is_ok() && fs::remove_dir(&probe).is_ok()
            });
        if !can {
            println!("skipped: no cgroups can be made here");
            return None;
        }
        Some(Ground {
            hierarchies,
            name,
            state: tempfile::tempdir().unwrap(),
        })
    }

    fn make(&self, below: &str) -> Result<Cgroup> {
        let place = Place::new(&format!("/{}/{below}", self.name)).unwrap();
        Cgroup::make_in(&self.hierarchies, &place.unwrap(), 7, self.state.path())
    }

    /// What is there of the test, in every hierarchy.
    fn left(&self) -> Vec<PathBuf> {
        let all = self.hierarchies.iter().map(|of| of.root.join(&self.name));
        all.filter(|dir| dir.exists()).collect()
    }
}

/// A process in every one of these directories.
fn resident(dirs: &[PathBuf]) -> Child {
    let child = Command::new("sleep").arg("1000").spawn().unwrap();
    for dir in dirs {
        fs::write(dir.join("cgroup.procs"), child.id().to_string()).unwrap();
    }
    child
}

#[test]
fn a_cgroup_goes_with_what_was_made_for_it_and_with_what_is_in_it_f15() {
    let Some(ground) = Ground::find("goes") else {
        return;
    };
    let cgroup = ground.make("pod/vmm").unwrap();
    assert_eq!(ground.left().len(), ground.hierarchies.len());
    let limits = cgroup.dirs.iter().map(|dir| dir.join(PIDS_MAX));
    let limits: Vec<_> = limits
        .filter_map(|path| fs::read_to_string(path).ok())
        .collect();
    assert_eq!(limits, ["7\n"]);
    assert!(cgroup.record.exists());
    if cgroup.entrance.unified.is_some() {
        let mut child = resident(&cgroup.dirs);
        // Reaped, as a VMM is by who waits for it.
        let waits = thread::spawn(move || child.wait().unwrap());
        drop(cgroup);
        assert!(!waits.join().unwrap().success());
    } else {
        drop(cgroup);
    }
    assert_eq!(ground.left(), Vec::<PathBuf>::new());
    assert!(!ground.state.path().join(RECORD).exists());
}

#[test]
fn the_last_to_leave_removes_what_the_first_has_made() {
    let Some(ground) = Ground::find("last") else {
        return;
    };
    let (first, second) = (
        ground.make("a/b/one").unwrap(),
        ground.make("a/b/two").unwrap(),
    );
    drop(first);
    assert!(second.dirs.iter().all(|dir| dir.is_dir()));
    drop(second);
    assert_eq!(ground.left(), Vec::<PathBuf>::new());
    // What somebody else has made stays.
    for of in &ground.hierarchies {
        fs::create_dir(of.root.join(&ground.name)).unwrap();
    }
    drop(ground.make("a/one").unwrap());
    assert_eq!(ground.left().len(), ground.hierarchies.len());
    for dir in ground.left() {
        // Only if it is empty.
        fs::remove_dir(dir).unwrap();
    }
}

#[test]
fn many_pods_that_come_and_go_in_one_place_are_in_nobodys_way() {
    let Some(ground) = Ground::find("many") else {
        return;
    };
    thread::scope(|scope| {
        for number in 0..4 {
            let ground = &ground;
            scope.spawn(move || {
                let state = tempfile::tempdir().unwrap();
                let place = format!("/{}/a/b/{number}", ground.name);
                let place = Place::new(&place).unwrap().unwrap();
                for _ in 0..30 {
                    let made = Cgroup::make_in(&ground.hierarchies, &place, 7, state.path());
                    drop(made.unwrap());
                }
            });
        }
    });
    assert_eq!(ground.left(), Vec::<PathBuf>::new());
}

#[test]
fn a_cgroup_with_somebody_in_it_is_refused_and_left_alone_f14() {
    let Some(ground) = Ground::find("taken") else {
        return;
    };
    let theirs = ground.make("vmm").unwrap();
    let mut child = resident(&theirs.dirs);
    let error = ground.make("vmm").unwrap_err().text();
    assert!(error.contains("/vmm: other processes are in it"), "{error}");
    assert!(child.try_wait().unwrap().is_none());
    child.kill().unwrap();
    child.wait().unwrap();
    drop(theirs);
    assert_eq!(ground.left(), Vec::<PathBuf>::new());
}

#[test]
fn what_cannot_be_made_is_named_and_nothing_of_it_stays_f14() {
    let Some(ground) = Ground::find("named") else {
        return;
    };
    // The last hierarchy lies where nothing can be made.
    let mut hierarchies = ground.hierarchies.clone();
    hierarchies.push(Hierarchy {
        root: "/proc/sys".into(),
        version: Version::Two,
    });
    let place = Place::new(&format!("/{}/vmm", ground.name))
        .unwrap()
        .unwrap();
    let state = ground.state.path();
    let error = Cgroup::make_in(&hierarchies, &place, 7, state).unwrap_err();
    let expected = format!("Cannot make the cgroup /proc/sys/{}", ground.name);
    assert!(error.text().starts_with(&expected), "{}", error.text());
    assert_eq!(ground.left(), Vec::<PathBuf>::new());
}

#[test]
fn what_cannot_be_removed_is_named_in_time_f15() {
    let Some(ground) = Ground::find("stays") else {
        return;
    };
    let mut cgroup = ground.make("vmm").unwrap();
    let dirs = std::mem::take(&mut cgroup.dirs);
    for dir in &dirs {
        fs::create_dir(dir.join("stray")).unwrap();
    }
    let began = Instant::now();
    let error = remove(&dirs, Duration::from_millis(50)).unwrap_err().text();
    assert!(began.elapsed() < Duration::from_secs(1));
    assert!(
        error.starts_with("Cannot remove the cgroup /sys/fs/cgroup/"),
        "{error}"
    );
    for dir in &dirs {
        fs::remove_dir(dir.join("stray")).unwrap();
    }
    // As `delete` finds it.
    let text = serde_json::to_vec(&dirs).unwrap();
    fs::write(ground.state.path().join(RECORD), text).unwrap();
    for _ in 0..2 {
        remove_recorded(ground.state.path(), LEAVE_DELETE).unwrap();
        assert_eq!(ground.left(), Vec::<PathBuf>::new());
    }
}

#[test]
fn only_hierarchies_are_taken_for_such() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("pids")).unwrap();
    assert!(Hierarchy::mounted(dir.path()).is_empty());
    assert!(Hierarchy::mounted(&dir.path().join("missing")).is_empty());
    // A record that leads elsewhere is none.
    let text = serde_json::to_vec(&[dir.path().join("pids")]).unwrap();
    fs::write(dir.path().join(RECORD), text).unwrap();
    remove_recorded(dir.path(), LEAVE_DELETE).unwrap();
    assert!(dir.path().join("pids").exists());
}
