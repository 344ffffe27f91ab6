//! Documents, archives, compression: what is an image and what is not.

use std::os::unix::fs::{MetadataExt, symlink};

use super::*;

fn layers() -> Vec<(Vec<u8>, String)> {
    let tars: Vec<Vec<u8>> = (0..3)
        .map(|n| tar_of(&[file(&format!("f{n}"), &n.to_string())]))
        .collect();
    let id = |tar: &[u8]| format!("sha256:{}", hex(tar));
    vec![
        (tars[0].clone(), id(&tars[0])),
        (gzip(&tars[1]), id(&tars[1])),
        (
            zstd::encode_all(tars[2].as_slice(), 1).unwrap(),
            id(&tars[2]),
        ),
    ]
}

#[test]
fn a_layout_is_unpacked_once_with_every_compression() {
    let layout = Layout::new();
    let image = layout.image(&layers(), Some("amd64"));
    layout.index(&[image]);
    let first = layout.open().unwrap();
    assert_eq!(first.config.cmd, ["sh"]);
    assert_eq!(
        (
            first.config.working_dir.as_str(),
            first.config.user.as_str()
        ),
        ("/w", "7")
    );
    for (number, layer) in first.layers.iter().enumerate() {
        assert_eq!(
            fs::read_to_string(layer.join(format!("f{number}"))).unwrap(),
            number.to_string()
        );
    }
    let inode = fs::metadata(&first.layers[0]).unwrap().ino();
    let second = layout.open().unwrap();
    assert_eq!(fs::metadata(&second.layers[0]).unwrap().ino(), inode);
}

#[test]
fn the_image_for_this_machine_is_chosen_from_nested_indexes() {
    let layout = Layout::new();
    let platform = |mut image: serde_json::Value, architecture: &str| {
        image["platform"] = serde_json::json!({"architecture": architecture, "os": "linux"});
        image
    };
    let arm = platform(layout.image(&[], Some("arm64")), "arm64");
    let ours = platform(layout.image(&layers()[..1], Some("amd64")), "amd64");
    let inner = serde_json::json!({"manifests": [arm, ours]});
    let digest = layout.blob(inner.to_string().as_bytes());
    layout.index(&[serde_json::json!({"digest": digest, "mediaType": "application/vnd.oci.image.index.v1+json"})]);
    assert_eq!(layout.open().unwrap().layers.len(), 1);
    layout.index(std::slice::from_ref(&arm));
    assert!(
        layout
            .open()
            .unwrap_err()
            .to_string()
            .contains("linux/arm64")
    );
    let mut unsaid = arm;
    unsaid.as_object_mut().unwrap().remove("platform");
    layout.index(&[unsaid]);
    assert!(
        layout
            .open()
            .unwrap_err()
            .to_string()
            .contains("linux/arm64")
    );
}

/// Opens a layout in which `change` has spoilt something; answers the refusal.
fn spoilt(change: impl Fn(&Layout, &serde_json::Value)) -> String {
    let layout = Layout::new();
    let image = layout.image(&layers(), Some("amd64"));
    layout.index(std::slice::from_ref(&image));
    change(&layout, &image);
    let text = layout.open().unwrap_err().to_string();
    // Nothing half done stays, not even of the layers that were good.
    for entry in fs::read_dir(layout.store()).into_iter().flatten() {
        assert!(
            !entry
                .unwrap()
                .file_name()
                .to_string_lossy()
                .starts_with(".unpacking"),
            "{text}"
        );
    }
    text
}

fn blob_path(layout: &Layout, digest: &str) -> PathBuf {
    layout
        .path()
        .join("blobs/sha256")
        .join(digest.strip_prefix("sha256:").unwrap())
}

#[test]
fn content_that_is_not_what_its_digest_says_is_refused() {
    let (gzipped, _) = layers().remove(1);
    let layer = format!("sha256:{}", hex(&gzipped));
    let text = spoilt(|layout, _| {
        let mut other = tar_of(&[file("f1", "other")]);
        other = gzip(&other);
        fs::write(blob_path(layout, &layer), other).unwrap();
    });
    assert!(
        text.contains("digest") && text.contains("should have"),
        "{text}"
    );
    let text = spoilt(|layout, _| fs::remove_file(blob_path(layout, &layer)).unwrap());
    assert!(text.contains("missing"), "{text}");
    let text = spoilt(|layout, image| {
        fs::write(blob_path(layout, image["digest"].as_str().unwrap()), "{}").unwrap();
    });
    assert!(
        text.contains("manifest") && text.contains("digest"),
        "{text}"
    );
}

#[test]
fn documents_that_are_not_understood_are_refused() {
    for (text, words) in [
        ("", "index.json"),
        ("{}", "manifests"),
        (r#"{"manifests":[]}"#, "no image"),
        (r#"{"manifests":[{"digest":"sha256:../../etc"}]}"#, "digest"),
        (r#"{"manifests":[{"digest":"md5:00"}]}"#, "digest"),
    ] {
        let refusal =
            spoilt(|layout, _| fs::write(layout.path().join("index.json"), text).unwrap());
        assert!(refusal.contains(words), "{refusal}");
    }
    let two = spoilt(|layout, image| {
        layout.index(&[image.clone(), layout.image(&layers()[..1], Some("amd64"))]);
    });
    assert!(two.contains("2 images"), "{two}");
    let none = spoilt(|layout, _| fs::remove_file(layout.path().join("index.json")).unwrap());
    assert!(none.contains("skopeo"), "{none}");
    let link = spoilt(|layout, _| {
        fs::remove_file(layout.path().join("index.json")).unwrap();
        symlink("/etc/passwd", layout.path().join("index.json")).unwrap();
    });
    assert!(link.contains("index.json"), "{link}");
}

#[test]
fn a_saved_image_is_opened_with_links_between_its_layers() {
    let layer = tar_of(&[file("hello", "x")]);
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "config": {"Cmd": ["/hello"]},
        "rootfs": {"diff_ids": [format!("sha256:{}", hex(&layer)), format!("sha256:{}", hex(&layer))]},
    })
    .to_string();
    let name = format!("{}.json", hex(config.as_bytes()));
    let manifest =
        serde_json::json!([{"Config": name, "Layers": ["a/layer.tar", "b/layer.tar"]}]).to_string();
    let entries = [
        file("manifest.json", &manifest),
        file(&name, &config),
        Item {
            content: layer,
            ..file("a/layer.tar", "")
        },
        soft("b/layer.tar", "../a/layer.tar"),
    ];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.tar");
    File::create(&path)
        .unwrap()
        .write_all(&tar_of(&entries))
        .unwrap();
    let image = open(
        &path,
        &dir.path().join("store"),
        &(),
        &AtomicBool::new(false),
    )
    .unwrap();
    assert_eq!(
        (image.layers.len(), image.config.cmd),
        (2, vec!["/hello".to_owned()])
    );
    assert_eq!(
        fs::read_to_string(image.layers[1].join("hello")).unwrap(),
        "x"
    );
}

#[test]
fn a_configuration_without_architecture_is_for_this_machine() {
    let layout = Layout::new();
    layout.index(&[layout.image(&layers()[..1], None)]);
    assert_eq!(layout.open().unwrap().layers.len(), 1);
    layout.index(&[layout.image(&layers()[..1], Some(""))]);
    assert_eq!(layout.open().unwrap().layers.len(), 1);
    layout.index(&[layout.image(&layers()[..1], Some("x86_64"))]);
    assert_eq!(layout.open().unwrap().layers.len(), 1);
}

#[test]
fn an_archive_may_be_compressed_and_a_layer_of_any_compression_under_any_media_type() {
    let (tar, diff_id) = layers().remove(0);
    let members = [gzip(&tar[..700]), gzip(&tar[700..])].concat();
    let skippable = [
        &b"\x50\x2a\x4d\x18\x03\0\0\0abc"[..],
        &zstd::encode_all(tar.as_slice(), 1).unwrap(),
    ]
    .concat();
    for layer in [tar.clone(), gzip(&tar), members, skippable] {
        let layout = Layout::new();
        layout.index(&[layout.image(&[(layer, diff_id.clone())], Some("amd64"))]);
        let image = layout.open().unwrap();
        assert_eq!(fs::read_to_string(image.layers[0].join("f0")).unwrap(), "0");
        // The same layout as an archive, by each compression.
        fs::remove_dir_all(layout.store()).unwrap();
        let mut items = vec![];
        for entry in fs::read_dir(layout.path().join("blobs/sha256")).unwrap() {
            let path = entry.unwrap().path();
            let name = format!(
                "./blobs/sha256/{}",
                path.file_name().unwrap().to_str().unwrap()
            );
            items.push(Item {
                content: fs::read(path).unwrap(),
                ..file(&name, "")
            });
        }
        let index = fs::read_to_string(layout.path().join("index.json")).unwrap();
        items.push(file("./index.json", &index));
        let plain = tar_of(&items);
        let zstd = zstd::encode_all(plain.as_slice(), 1).unwrap();
        for bytes in [plain.clone(), gzip(&plain), zstd] {
            let path = layout.path().join("image.tar.gz");
            fs::write(&path, bytes).unwrap();
            let store = tempfile::tempdir_in("/var/tmp").unwrap();
            let image = open(&path, store.path(), &(), &AtomicBool::new(false)).unwrap();
            assert_eq!(fs::read_to_string(image.layers[0].join("f0")).unwrap(), "0");
        }
    }
}

#[test]
fn an_archive_that_ends_too_early_is_no_image() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.tar");
    let tar = tar_of(&[file("index.json", "{}"), file("blob", &"x".repeat(5000))]);
    fs::write(&path, &tar[..2000]).unwrap();
    let error = open(&path, dir.path(), &(), &AtomicBool::new(false)).unwrap_err();
    assert!(error.to_string().contains("not a complete tar"), "{error}");
}

#[test]
fn an_image_without_layers_is_an_image() {
    assert!(Layout::of(&[]).open().unwrap().layers.is_empty());
    let empty = Layout::of(&[tar_of(&[]), vec![], vec![0; 512]]);
    assert_eq!(empty.open().unwrap().layers.len(), 3);
}
