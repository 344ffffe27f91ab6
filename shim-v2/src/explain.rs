//! What became of a specification, kept beside the pod for whoever asks, with what is to
//! be run when the container is gone and its shim is, too.
//!
//! The judgement is the one by which the container was made; here it is only kept, found
//! again and, for a bundle that nobody has started, made anew.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use bulkhead_agent_api::spec::{Note, plan};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result, host},
    names::{ContainerId, Namespace},
    spec::{self, Prepared},
    statedir::{StateDir, kept},
};

/// What became of the specification of one container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// containerd's namespace; none for a bundle.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// The container; none for a bundle.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Field by field, by their names.
    pub fields: Vec<Note>,
    /// Programs that run when it is gone; for who cleans up.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub poststop: Vec<plan::Hook>,
    /// What they are told that its caller remembers.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl Explanation {
    /// That of a container that is made.
    #[must_use]
    pub fn of(namespace: &Namespace, id: &ContainerId, bundle: &Path, prepared: &Prepared) -> Self {
        let poststop = prepared.hooks.poststop.clone();
        Explanation {
            namespace: Some(namespace.as_str().to_owned()),
            id: Some(id.to_string()),
            bundle: bundle.to_owned(),
            fields: prepared.fields.clone(),
            annotations: match poststop.is_empty() {
                true => BTreeMap::new(),
                false => prepared.annotations.clone(),
            },
            poststop,
        }
    }

    /// That of a bundle, as if it were started now.
    pub fn of_bundle(bundle: &Path) -> Result<Self> {
        let fields = spec::explain(&spec::read(bundle)?);
        Ok(Explanation {
            namespace: None,
            id: None,
            bundle: bundle.to_owned(),
            fields,
            poststop: Vec::new(),
            annotations: BTreeMap::new(),
        })
    }

    /// Those of all containers that have this id, of different namespaces; without what
    /// only a shim needs.
    pub fn find(id: &ContainerId) -> Result<Vec<Self>> {
        let mut found = Vec::new();
        for pod in StateDir::everywhere() {
            if pod.has(id) {
                found.push(Explanation {
                    poststop: Vec::new(),
                    annotations: BTreeMap::new(),
                    ..Self::read(&kept::file(pod.path(), id))?
                });
            }
        }
        Ok(found)
    }

    /// Reads what the shim keeps.
    pub fn read(path: &Path) -> Result<Self> {
        let failed = |source| Error::Path {
            action: "read",
            path: path.to_owned(),
            source,
        };
        let text = fs::read(path).map_err(failed)?;
        serde_json::from_slice(&text).map_err(|error| failed(error.into()))
    }

    /// As the shim keeps it.
    pub fn to_json(&self) -> Result<Vec<u8>> {
        serde_json::to_vec_pretty(self).map_err(host("write JSON"))
    }
}
