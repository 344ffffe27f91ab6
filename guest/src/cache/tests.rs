use std::sync::mpsc;
use std::thread;
use std::time::{Duration, SystemTime};

use super::*;

struct Silent;

impl Progress for Silent {
    fn step(&self, _: &str) {}

    fn advance(&self, _: u64, _: u64) {}
}

fn make(text: &'static str) -> impl FnOnce(&Path, &Path) -> Result<()> {
    move |path, work| {
        fs::write(work.join("left"), "")?;
        fs::create_dir(path.join("d"))?;
        Ok(fs::write(path.join("d/f"), text)?)
    }
}

fn read(entry: &Entry) -> String {
    fs::read_to_string(entry.file("d/f")).unwrap()
}

#[test]
fn an_entry_is_made_once_and_again_when_its_hash_is_wrong() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::at(directory.path()).unwrap();
    let entry = cache.entry("kind", "k", &Silent, make("one")).unwrap();
    assert_eq!(read(&entry), "one");
    drop(entry);
    let entry = cache.entry("kind", "k", &Silent, make("two")).unwrap();
    assert_eq!(read(&entry), "one");
    fs::write(entry.file("d/f"), "bad").unwrap();
    drop(entry);
    assert_eq!(
        read(&cache.entry("kind", "k", &Silent, make("two")).unwrap()),
        "two"
    );
}

#[test]
fn of_each_kind_the_entries_that_were_used_last_are_kept() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::at(directory.path()).unwrap();
    let used = cache
        .entry("kind", "in use", &Silent, make("in use"))
        .unwrap();
    drop(
        cache
            .entry("kind", "first", &Silent, make("first"))
            .unwrap(),
    );
    for number in 1..KEPT {
        let name = number.to_string();
        drop(cache.entry("kind", &name, &Silent, make("more")).unwrap());
    }
    for number in 1..KEPT {
        let used = directory.path().join(format!("kind/{number}/{CHECKED}"));
        let day = Duration::from_secs(24 * 3600) * (10 - u32::try_from(number).unwrap());
        let file = File::options().write(true).open(used).unwrap();
        file.set_modified(SystemTime::now() - day).unwrap();
    }
    // All are there, and the first one is wanted again.
    drop(
        cache
            .entry("kind", "first", &Silent, make("again"))
            .unwrap(),
    );
    drop(cache.entry("kind", "new", &Silent, make("new")).unwrap());
    let there = |name: &str| directory.path().join("kind").join(name).exists();
    assert!(!there("1"));
    assert!(there("first") && there("2") && there("new"));
    assert_eq!(read(&used), "in use");
}

#[test]
fn what_is_made_from_an_entry_can_be_named_by_its_content() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::at(directory.path()).unwrap();
    let [one, same, other] = [("1", "x"), ("2", "x"), ("3", "y")]
        .map(|(key, text)| cache.entry("kind", key, &Silent, make(text)).unwrap());
    assert_eq!(one.content(), same.content());
    assert_ne!(one.content(), other.content());
}

#[test]
fn a_build_that_fails_leaves_no_entry() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::at(directory.path()).unwrap();
    let fails = |_: &Path, _: &Path| anyhow::bail!("No");
    assert!(cache.entry("kind", "k", &Silent, fails).is_err());
    let names: Vec<_> = fs::read_dir(directory.path().join("kind"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["lock"]);
}

#[test]
fn what_a_killed_process_left_is_removed() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::at(directory.path()).unwrap();
    let left = directory.path().join("kind/new-other/work");
    fs::create_dir_all(&left).unwrap();
    fs::create_dir_all(directory.path().join("kind/new-k/entry")).unwrap();
    assert_eq!(
        read(&cache.entry("kind", "k", &Silent, make("k")).unwrap()),
        "k"
    );
    assert!(!left.exists());
}

#[test]
fn one_makes_an_entry_and_others_wait_for_it() {
    struct Waits(mpsc::Sender<String>);

    impl Progress for Waits {
        fn step(&self, text: &str) {
            self.0.send(text.to_owned()).unwrap();
        }

        fn advance(&self, _: u64, _: u64) {}
    }

    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::at(directory.path()).unwrap();
    let (waits, waiting) = mpsc::channel();
    let second = thread::scope(|scope| {
        let mut second = None;
        let first = cache.entry("kind", "k", &Silent, |path, work| {
            // Another entry of the kind is made meanwhile.
            assert_eq!(
                read(
                    &cache
                        .entry("kind", "other", &Silent, make("other"))
                        .unwrap()
                ),
                "other"
            );
            let cache = &cache;
            second = Some(scope.spawn(move || {
                read(
                    &cache
                        .entry("kind", "k", &Waits(waits), make("two"))
                        .unwrap(),
                )
            }));
            let said = waiting.recv_timeout(Duration::from_secs(60)).unwrap();
            assert_eq!(said, "Waiting for kind, which is being made");
            make("one")(path, work)
        });
        assert_eq!(read(&first.unwrap()), "one");
        second.unwrap().join().unwrap()
    });
    assert_eq!(second, "one");
}

#[test]
fn clearing_spares_what_is_in_use() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::at(directory.path()).unwrap();
    let used = cache.entry("kind", "used", &Silent, make("used")).unwrap();
    drop(cache.entry("kind", "free", &Silent, make("free")).unwrap());
    fs::write(directory.path().join("kind/pointer"), "").unwrap();
    fs::create_dir(directory.path().join("kind/session")).unwrap();
    let session = lock(&directory.path().join("kind/session/lock")).unwrap();
    cache.prune(1).unwrap();
    assert!(directory.path().join("kind/free").exists());
    cache.prune(0).unwrap();
    let there = |name: &str| directory.path().join("kind").join(name).exists();
    assert!(there("used") && there("session"));
    assert!(!there("free") && !there("pointer"));
    assert_eq!(read(&used), "used");
    drop((used, session));
    cache.prune(0).unwrap();
    assert!(!there("used") && !there("session"));
}

#[test]
fn a_key_depends_on_each_part_and_on_where_it_ends() {
    assert_ne!(key(["ab", "c"]), key(["a", "bc"]));
    assert_eq!(key(["ab", "c"]), key(["ab", "c"]));
}
