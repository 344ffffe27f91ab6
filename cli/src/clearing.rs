//! Clears what killed ones left in the network of containers, and layers that no container
//! uses and nobody has used for long. Images are files of their owners: what is cleared is
//! unpacked again when it is asked for.

use std::{collections::HashSet, path::Path, time::Duration};

use bulkhead_client::{paths, record};

use crate::network;

/// Layers of no container stay so long after their last use.
const AGE: Duration = Duration::from_secs(30 * 24 * 3600);

/// Clears both. A failure is no one's who ran or removed a container: the next one tries
/// again.
pub(crate) fn all() {
    network::sweep();
    let _ = clear(Path::new(paths::LAYERS), Path::new(paths::CONTAINERS), AGE);
}

/// `None` if nothing may be removed: what a damaged record names is not known.
fn clear(store: &Path, containers: &Path, age: Duration) -> Option<usize> {
    if !store.is_dir() {
        return None;
    }
    let mut keep = HashSet::new();
    for found in record::all(containers).ok()? {
        keep.extend(
            found
                .record
                .ok()?
                .into_iter()
                .flat_map(|record| record.roots),
        );
    }
    bulkhead_image::collect(store, &keep, age).ok()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn layers_of_containers_stay_and_with_a_damaged_record_all() {
        let world = tempfile::tempdir().unwrap();
        let (store, containers) = (world.path().join("layers"), world.path().join("containers"));
        let layer = |letter: &str| store.join(letter.repeat(64)).join("fs");
        for letter in ["a", "b"] {
            fs::create_dir_all(layer(letter)).unwrap();
        }
        let dir = containers.join("web");
        fs::create_dir_all(&dir).unwrap();
        let record = serde_json::json!({
            "id": "web", "source": "x", "command": [], "created": 1, "bundle": "/b",
            "roots": [layer("a"), dir.join("upper")],
        });
        fs::write(dir.join("record.json"), "{").unwrap();
        assert_eq!(clear(&store, &containers, Duration::ZERO), None);
        fs::write(dir.join("record.json"), record.to_string()).unwrap();
        assert_eq!(clear(&store, &containers, AGE), Some(0));
        assert_eq!(clear(&store, &containers, Duration::ZERO), Some(1));
        assert!(layer("a").exists() && !layer("b").exists());
    }
}
