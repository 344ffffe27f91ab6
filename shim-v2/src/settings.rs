//! The settings of a pod: the host's, unless the caller has others for it.
//!
//! They are fixed once: by the options of `start` if those say something, else by the
//! first container's. What a later one brings is ignored.

use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use crate::{
    config::{Config, Error},
    options::Options,
};

/// The settings.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Settings {
    #[serde(with = "fixed")]
    fixed: OnceLock<Config>,
    /// Of the host, for a pod whose callers say nothing.
    host: Config,
}

/// What was fixed goes along when the program changes.
mod fixed {
    use std::sync::OnceLock;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use crate::config::Config;

    pub(super) fn serialize<S: Serializer>(
        fixed: &OnceLock<Config>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        fixed.get().serialize(to)
    }

    pub(super) fn deserialize<'a, D: Deserializer<'a>>(
        from: D,
    ) -> Result<OnceLock<Config>, D::Error> {
        let fixed: Option<Config> = Option::deserialize(from)?;
        Ok(fixed.map_or_else(OnceLock::new, OnceLock::from))
    }
}

impl Settings {
    /// Those with which `start` was asked for the pod.
    pub fn of_start(options: &Options) -> Result<Self, Error> {
        let config = Config::load_for(options.source.as_ref())?;
        let fixed = OnceLock::new();
        if options.source.is_some() {
            let _ = fixed.set(config.clone());
        }
        Ok(Settings {
            fixed,
            host: config,
        })
    }

    /// The settings as they are now.
    #[must_use]
    pub fn get(&self) -> &Config {
        self.fixed.get().unwrap_or(&self.host)
    }

    /// Those with which a container is asked for. Reads a file.
    pub fn fix(&self, options: &Options) -> Result<&Config, Error> {
        if self.fixed.get().is_none() {
            let config = match &options.source {
                Some(source) => Config::load_for(Some(source))?,
                None => self.host.clone(),
            };
            // Another container may have been faster.
            let _ = self.fixed.set(config);
        }
        Ok(self.get())
    }
}

impl From<Config> for Settings {
    fn from(host: Config) -> Self {
        Settings {
            fixed: OnceLock::new(),
            host,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Source;

    fn options(source: Option<Source>) -> Options {
        Options {
            source,
            ..Options::default()
        }
    }

    fn vcpus(count: u8) -> Options {
        options(Some(Source::Text(format!("vcpus = {count}"))))
    }

    #[test]
    fn the_first_that_says_something_fixes_the_settings_ta_19() {
        let of_start = Settings::of_start(&vcpus(3)).unwrap();
        assert_eq!(of_start.get().vcpus, 3);
        assert_eq!(of_start.fix(&vcpus(4)).unwrap().vcpus, 3);

        let host = Config {
            vcpus: 2,
            ..Config::default()
        };
        let by_first = Settings::from(host.clone());
        assert_eq!(by_first.fix(&vcpus(4)).unwrap().vcpus, 4);
        assert_eq!(by_first.fix(&vcpus(5)).unwrap().vcpus, 4);

        let of_host = Settings::from(host);
        assert_eq!(of_host.fix(&options(None)).unwrap().vcpus, 2);
        assert_eq!(of_host.fix(&vcpus(5)).unwrap().vcpus, 2);
    }

    #[test]
    fn settings_that_cannot_be_had_fix_nothing_ta_19() {
        let settings = Settings::from(Config::default());
        for (source, words) in [
            (
                Source::File("/nowhere.toml".into()),
                "Cannot read /nowhere.toml",
            ),
            (Source::Text("vcpu = 1".into()), "runtime options: "),
            (
                Source::Text("vcpus = 0".into()),
                "runtime options: vcpus = 0",
            ),
        ] {
            let error = settings.fix(&options(Some(source))).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        }
        assert_eq!(settings.fix(&vcpus(4)).unwrap().vcpus, 4);
    }
}
