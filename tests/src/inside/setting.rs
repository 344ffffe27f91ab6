//! What an administrator sets for all pods of the host.

use std::{fs, path::Path};

const FOLDER: &str = "/etc/bulkhead/config.d";

/// A file of settings in a lab host that has none else. Dropped, it is gone.
#[must_use = "dropping it takes the setting back"]
#[derive(Debug)]
pub struct Setting(());

impl Setting {
    /// The settings of this text, TOML.
    ///
    /// # Panics
    ///
    /// It cannot be written.
    pub fn put(text: &str) -> Setting {
        fs::create_dir_all(FOLDER).expect("the folder of settings");
        let setting = Setting(());
        fs::write(Path::new(FOLDER).join("50-test.toml"), text).expect("a setting");
        setting
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        // What is left is found by the next test that sets something.
        let _ = fs::remove_dir_all("/etc/bulkhead");
    }
}
