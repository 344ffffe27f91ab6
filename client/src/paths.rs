//! Where things are on the host. The only place that joins these names.

use std::path::PathBuf;

use crate::id::ContainerId;

/// Our namespace among those of the shim's callers.
pub const NAMESPACE: &str = "bulkhead";

/// Layers of images.
pub const LAYERS: &str = "/var/lib/bulkhead/layers";

/// Containers: record, upper and work directory.
pub const CONTAINERS: &str = "/var/lib/bulkhead/containers";

/// Bundles and FIFOs of running containers.
pub const BUNDLES: &str = "/run/bulkhead/bundles";

/// What is remembered of the network of containers.
pub const NETWORK: &str = "/run/bulkhead/network";

/// The directory of a container while it runs.
pub fn bundle(id: &ContainerId) -> PathBuf {
    PathBuf::from(BUNDLES).join(id.as_str())
}

/// Where the shim says why a pod ended that nobody ended.
pub fn reason(id: &ContainerId) -> PathBuf {
    PathBuf::from("/run/bulkhead")
        .join(NAMESPACE)
        .join(id.as_str())
        .join("reason")
}
