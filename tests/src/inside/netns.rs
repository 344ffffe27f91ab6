//! Network namespaces that have names, for tests of networks.

use std::{fs::File, path::Path};

use super::command::Command;

/// A network namespace. Dropped, its name is gone.
#[derive(Debug)]
pub struct Namespace {
    name: &'static str,
    path: String,
    file: File,
}

impl Namespace {
    /// Makes one of this name.
    ///
    /// # Panics
    ///
    /// It cannot be made.
    #[must_use]
    pub fn new(name: &'static str) -> Namespace {
        Command::new("ip", ["netns", "add", name]).run().success();
        let path = format!("/run/netns/{name}");
        let file = File::open(&path).expect("the namespace's file");
        Namespace { name, path, file }
    }

    /// The file that it is named by.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The same, open.
    #[must_use]
    pub fn fd(&self) -> &File {
        &self.file
    }

    /// Runs a program in it; what it says.
    ///
    /// # Panics
    ///
    /// It fails.
    pub fn run(&self, words: &[&str]) -> String {
        let words = ["netns", "exec", self.name]
            .into_iter()
            .chain(words.iter().copied());
        Command::new("ip", words).run().success()
    }

    /// Runs `ip` in it; what that says.
    ///
    /// # Panics
    ///
    /// It fails.
    pub fn ip(&self, line: &str) -> String {
        let words: Vec<&str> = ["ip"].into_iter().chain(line.split(' ')).collect();
        self.run(&words)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip", ["netns", "del", self.name]).run();
        // The directory is made with the first one, as a mount.
        let folder = Path::new("/run/netns");
        if std::fs::read_dir(folder).is_ok_and(|mut all| all.next().is_none()) {
            let _ = rustix::mount::unmount(folder, rustix::mount::UnmountFlags::DETACH);
            let _ = std::fs::remove_dir(folder);
        }
    }
}
