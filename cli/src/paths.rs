//! Where things are on the host. The only place that joins these names.

use std::path::PathBuf;

use crate::args::ContainerId;

/// Our namespace among those of the shim's callers.
pub(crate) const NAMESPACE: &str = "bulkhead";

/// Layers of images, by their diff id.
pub(crate) const LAYERS: &str = "/var/lib/bulkhead/layers";

/// Containers: record, upper and work directory.
pub(crate) const CONTAINERS: &str = "/var/lib/bulkhead/containers";

/// Bundles and FIFOs of running containers.
pub(crate) const BUNDLES: &str = "/run/bulkhead/bundles";

/// The directory of a container that outlives its run.
pub(crate) fn container(id: &ContainerId) -> PathBuf {
    PathBuf::from(CONTAINERS).join(id.as_str())
}

/// The directory of a container while it runs.
pub(crate) fn bundle(id: &ContainerId) -> PathBuf {
    PathBuf::from(BUNDLES).join(id.as_str())
}

/// Where the shim says why a pod ended that nobody ended.
pub(crate) fn reason(id: &ContainerId) -> PathBuf {
    PathBuf::from("/run/bulkhead")
        .join(NAMESPACE)
        .join(id.as_str())
        .join("reason")
}
