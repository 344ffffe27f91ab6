//! Whole images and hostile layers against the real file system.

use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::{FileTypeExt, MetadataExt, symlink},
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
};

use proptest::prelude::*;
use sha2::{Digest as _, Sha256};

use super::*;

/// One entry of a tar, written without the checks of a builder.
#[derive(Clone, Debug)]
struct Entry {
    name: Vec<u8>,
    kind: tar::EntryType,
    link: Vec<u8>,
    content: Vec<u8>,
    mode: u32,
    owner: (u64, u64),
}

fn entry(name: &str, kind: tar::EntryType) -> Entry {
    Entry {
        name: name.into(),
        kind,
        link: vec![],
        content: vec![],
        mode: 0o644,
        owner: (0, 0),
    }
}

fn file(name: &str, content: &str) -> Entry {
    Entry {
        content: content.into(),
        ..entry(name, tar::EntryType::Regular)
    }
}

fn dir(name: &str) -> Entry {
    Entry {
        mode: 0o755,
        ..entry(name, tar::EntryType::Directory)
    }
}

fn link(name: &str, kind: tar::EntryType, target: &str) -> Entry {
    Entry {
        link: target.into(),
        ..entry(name, kind)
    }
}

fn tar_of(entries: &[Entry]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for entry in entries {
        let mut header = tar::Header::new_gnu();
        let old = header.as_old_mut();
        let count = entry.name.len().min(100);
        old.name[..count].copy_from_slice(&entry.name[..count]);
        let count = entry.link.len().min(100);
        old.linkname[..count].copy_from_slice(&entry.link[..count]);
        header.set_entry_type(entry.kind);
        header.set_size(entry.content.len() as u64);
        header.set_mode(entry.mode);
        header.set_uid(entry.owner.0);
        header.set_gid(entry.owner.1);
        header.set_mtime(1_000_000_000);
        header.set_cksum();
        builder.append(&header, entry.content.as_slice()).unwrap();
    }
    builder.into_inner().unwrap()
}

fn unpacked(entries: &[Entry]) -> Result<tempfile::TempDir> {
    let target = tempfile::tempdir().unwrap();
    unpack::unpack(tar_of(entries).as_slice(), target.path(), "sha256:test")?;
    Ok(target)
}

fn check_refused(entries: &[Entry], words: &str) {
    let error = unpacked(entries).unwrap_err();
    assert!(matches!(error, Error::Entry { .. }), "{error:?}");
    let text = error.to_string();
    let last = String::from_utf8_lossy(&entries.last().unwrap().name).into_owned();
    assert!(
        text.contains(words) && text.contains(&format!("{last:?}")),
        "{text}"
    );
}

#[test]
fn owners_modes_times_and_links_are_as_in_the_archive_b37() {
    let target = unpacked(&[
        dir("./"),
        Entry {
            mode: 0o4755,
            owner: (7, 8),
            ..file("bin/tool", "x")
        },
        link("bin/hard", tar::EntryType::Link, "bin/tool"),
        link(
            "bin/soft",
            tar::EntryType::Symlink,
            "../../../../etc/passwd",
        ),
        Entry {
            mode: 0o1777,
            ..dir("tmp")
        },
        entry("dev/fifo", tar::EntryType::Fifo),
    ])
    .unwrap();
    let meta = |name: &str| fs::symlink_metadata(target.path().join(name)).unwrap();
    let tool = meta("bin/tool");
    assert_eq!(
        (tool.mode() & 0o7777, tool.uid(), tool.gid(), tool.nlink()),
        (0o4755, 7, 8, 2)
    );
    assert_eq!(tool.mtime(), 1_000_000_000);
    assert_eq!(
        (meta("tmp").mode() & 0o7777, meta("tmp").mtime()),
        (0o1777, 1_000_000_000)
    );
    assert!(meta("bin/soft").is_symlink());
    assert!(meta("dev/fifo").file_type().is_fifo());
}

#[test]
fn whiteouts_become_those_of_overlayfs() {
    let target = unpacked(&[
        file("a/.wh.gone", ""),
        file("b/.wh..wh..opq", ""),
        file("b/.wh..wh.plnk", ""),
    ])
    .unwrap();
    let gone = fs::symlink_metadata(target.path().join("a/gone")).unwrap();
    assert!(gone.file_type().is_char_device() && gone.rdev() == 0);
    let mut value = [0; 8];
    let count = rustix::fs::getxattr(
        target.path().join("b"),
        "trusted.overlay.opaque",
        &mut value,
    )
    .unwrap();
    assert_eq!(&value[..count], b"y");
    assert_eq!(fs::read_dir(target.path().join("b")).unwrap().count(), 0);
}

#[test]
fn what_follows_a_whiteout_of_its_directory_hides_the_one_below() {
    for entries in [
        [file(".wh.d", ""), file("d/x", "1")],
        [file("d/x", "1"), file(".wh.d", "")],
    ] {
        let target = unpacked(&entries).unwrap();
        assert_eq!(fs::read_to_string(target.path().join("d/x")).unwrap(), "1");
        let mut value = [0; 8];
        rustix::fs::getxattr(
            target.path().join("d"),
            "trusted.overlay.opaque",
            &mut value,
        )
        .unwrap();
    }
}

#[test]
fn names_that_lead_out_are_refused_with_the_entry_b36() {
    check_refused(&[file("../evil", "x")], "\"..\"");
    check_refused(&[file("a/../../evil", "x")], "\"..\"");
    check_refused(&[file("/etc/evil", "x")], "absolute");
    check_refused(&[file(".", "x")], "root directory");
    check_refused(&[file(".wh...", "x")], "removes no file");
    check_refused(&[file(".wh.", "x")], "removes no file");
}

#[test]
fn hard_links_outside_are_refused_with_the_entry_b37() {
    check_refused(
        &[link("a", tar::EntryType::Link, "../../etc/passwd")],
        "outside",
    );
    check_refused(&[link("a", tar::EntryType::Link, "/etc/passwd")], "outside");
    check_refused(
        &[link("a", tar::EntryType::Link, "none")],
        "no file of the layer",
    );
    let through = [
        link("l", tar::EntryType::Symlink, "/etc"),
        link("a", tar::EntryType::Link, "l/passwd"),
    ];
    check_refused(&through, "no file of the layer");
    check_refused(
        &[dir("d"), link("a", tar::EntryType::Link, "d")],
        "no file of the layer",
    );
}

#[test]
fn a_link_in_the_way_of_an_entry_is_not_followed_b35() {
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().to_str().unwrap();
    let door = link("door", tar::EntryType::Symlink, target);
    check_refused(&[door.clone(), file("door/evil", "x")], "no directory");
    check_refused(
        &[
            dir("a"),
            link("a/up", tar::EntryType::Symlink, "../.."),
            file("a/up/evil", "x"),
        ],
        "no directory",
    );
    // The last component is replaced, not followed.
    let canary = outside.path().join("canary");
    fs::write(&canary, "whole").unwrap();
    let to_canary = link("f", tar::EntryType::Symlink, canary.to_str().unwrap());
    let replaced = unpacked(&[to_canary.clone(), file("f", "mine")]).unwrap();
    assert_eq!(
        fs::read_to_string(replaced.path().join("f")).unwrap(),
        "mine"
    );
    let replaced = unpacked(&[
        door,
        Entry {
            mode: 0o700,
            ..dir("door")
        },
    ])
    .unwrap();
    assert!(
        replaced
            .path()
            .join("door")
            .symlink_metadata()
            .unwrap()
            .is_dir()
    );
    assert_eq!(fs::read_to_string(&canary).unwrap(), "whole");
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
}

#[test]
fn what_has_no_place_in_a_layer_is_refused() {
    check_refused(&[dir("d"), file("d", "x")], "a directory of this name");
    check_refused(&[file("f", "x"), file("f/g", "y")], "no directory");
    check_refused(
        &[Entry {
            owner: (u64::from(u32::MAX), 0),
            ..file("f", "")
        }],
        "owner",
    );
    check_refused(&[entry("f", tar::EntryType::new(b'V'))], "not supported");
    let truncated = tar_of(&[file("f", &"x".repeat(5000))]);
    let target = tempfile::tempdir().unwrap();
    assert!(unpack::unpack(&truncated[..1000], target.path(), "l").is_err());
}

#[test]
fn attributes_pass_by_an_allow_list_b37() {
    let with = |name: &str| {
        let mut builder = tar::Builder::new(Vec::new());
        let key = format!("SCHILY.xattr.{name}");
        builder
            .append_pax_extensions([(key.as_str(), &b"value"[..])])
            .unwrap();
        let mut header = tar::Header::new_ustar();
        header.set_size(0);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mode(0o644);
        header.set_cksum();
        builder.append_data(&mut header, "file", &b""[..]).unwrap();
        let target = tempfile::tempdir_in("/var/tmp").unwrap();
        unpack::unpack(
            builder.into_inner().unwrap().as_slice(),
            target.path(),
            "layer",
        )
        .map(|()| target)
    };
    let text = with("trusted.overlay.redirect").unwrap_err().to_string();
    assert!(text.contains("trusted."), "{text}");
    let target = with("security.selinux").unwrap();
    let mut value = [0; 8];
    assert!(
        rustix::fs::getxattr(target.path().join("file"), "security.selinux", &mut value).is_err()
    );
    let target = with("user.note").unwrap();
    assert_eq!(
        rustix::fs::getxattr(target.path().join("file"), "user.note", &mut value),
        Ok(5)
    );
}

fn hex(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// An image layout in the making.
struct Layout {
    dir: tempfile::TempDir,
}

impl Layout {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("blobs/sha256")).unwrap();
        Layout { dir }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn blob(&self, bytes: &[u8]) -> String {
        fs::write(self.path().join("blobs/sha256").join(hex(bytes)), bytes).unwrap();
        format!("sha256:{}", hex(bytes))
    }

    fn image(&self, layers: &[(Vec<u8>, String)], architecture: &str) -> serde_json::Value {
        let diff_ids: Vec<&String> = layers.iter().map(|(_, diff_id)| diff_id).collect();
        let config = serde_json::json!({
            "architecture": architecture, "os": "linux",
            "config": {"Env": ["A=1"], "Cmd": ["sh"], "Entrypoint": null, "WorkingDir": "/w", "User": "7"},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = self.blob(config.to_string().as_bytes());
        let layers: Vec<_> = layers
            .iter()
            .map(|(bytes, _)| serde_json::json!({"digest": self.blob(bytes), "size": bytes.len()}))
            .collect();
        let manifest =
            serde_json::json!({"schemaVersion": 2, "config": {"digest": config}, "layers": layers});
        serde_json::json!({"digest": self.blob(manifest.to_string().as_bytes())})
    }

    fn index(&self, manifests: &[serde_json::Value]) {
        let index = serde_json::json!({"schemaVersion": 2, "manifests": manifests});
        fs::write(self.path().join("index.json"), index.to_string()).unwrap();
    }

    fn open(&self) -> Result<Image> {
        open(
            self.path(),
            &self.path().join("store"),
            &AtomicBool::new(false),
        )
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

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
    let image = layout.image(&layers(), "amd64");
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
    let arm = platform(layout.image(&[], "arm64"), "arm64");
    let ours = platform(layout.image(&layers()[..1], "amd64"), "amd64");
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
    let image = layout.image(&layers(), "amd64");
    layout.index(std::slice::from_ref(&image));
    change(&layout, &image);
    let text = layout.open().unwrap_err().to_string();
    // Nothing half done stays, not even of the layers that were good.
    for entry in fs::read_dir(layout.path().join("store"))
        .into_iter()
        .flatten()
    {
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
    let (file, _) = layers().remove(1);
    let layer = format!("sha256:{}", hex(&file));
    let text = spoilt(|layout, _| {
        let mut other = tar_of(&[super::tests::file("f1", "other")]);
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
        layout.index(&[image.clone(), layout.image(&layers()[..1], "amd64")]);
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
        Entry {
            content: layer,
            ..file("a/layer.tar", "")
        },
        link("b/layer.tar", tar::EntryType::Symlink, "../a/layer.tar"),
    ];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.tar");
    File::create(&path)
        .unwrap()
        .write_all(&tar_of(&entries))
        .unwrap();
    let image = open(&path, &dir.path().join("store"), &AtomicBool::new(false)).unwrap();
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
fn unpacking_stops_when_it_is_asked_to() {
    let layout = Layout::new();
    layout.index(&[layout.image(&layers(), "amd64")]);
    let store = layout.path().join("store");
    assert!(open(layout.path(), &store, &AtomicBool::new(true)).is_err());
    // Only the lock stays.
    assert_eq!(fs::read_dir(store).unwrap().count(), 1);
}

/// Names made of what attacks are made of.
fn hostile_name() -> impl Strategy<Value = String> {
    let word = prop_oneof![
        Just("..".to_owned()),
        Just(".".to_owned()),
        Just(String::new()),
        Just("a".to_owned()),
        Just("b".to_owned()),
        Just("link".to_owned()),
        Just(".wh.a".to_owned()),
        Just(".wh..wh..opq".to_owned()),
        Just(".wh...".to_owned()),
        Just("canary".to_owned()),
        "[a-c]{1,3}",
    ];
    proptest::collection::vec(word, 1..5).prop_map(|words| words.join("/"))
}

fn hostile_entry() -> impl Strategy<Value = Entry> {
    use tar::EntryType::{Directory, Fifo, Link, Regular, Symlink};
    let kind = prop_oneof![
        Just(Regular),
        Just(Directory),
        Just(Link),
        Just(Symlink),
        Just(Fifo)
    ];
    (hostile_name(), kind, hostile_name(), 0_u32..0o10000).prop_map(|(name, kind, target, mode)| {
        Entry {
            content: if kind == Regular {
                b"evil".to_vec()
            } else {
                vec![]
            },
            link: target.into(),
            mode,
            ..entry(&name, kind)
        }
    })
}

/// Everything below a directory, with contents and modes.
fn picture(dir: &Path, skip: &Path) -> Vec<(PathBuf, u32, u64, String)> {
    let mut seen = Vec::new();
    let mut rest = vec![dir.to_owned()];
    while let Some(path) = rest.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        let text = if meta.is_file() {
            fs::read_to_string(&path).unwrap()
        } else {
            String::new()
        };
        seen.push((path.clone(), meta.mode(), meta.nlink(), text));
        if meta.is_dir() && path != skip {
            rest.extend(
                fs::read_dir(&path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
        }
    }
    // The target's own mode may change.
    seen.retain(|(path, ..)| path != skip);
    seen.sort();
    seen
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn no_archive_changes_anything_outside_of_its_target_b36(
        entries in proptest::collection::vec(hostile_entry(), 1..12),
    ) {
        let world = tempfile::tempdir().unwrap();
        let target = world.path().join("a/target");
        fs::create_dir_all(&target).unwrap();
        fs::create_dir(world.path().join("a/b")).unwrap();
        for canary in ["canary", "a/canary", "a/b/canary"] {
            fs::write(world.path().join(canary), "whole").unwrap();
        }
        let before = picture(world.path(), &target);
        // A refusal ends a layer; so that the rest is tried too, each goes on where
        // the last one stopped.
        for entry in &entries {
            let _ = unpack::unpack(tar_of(std::slice::from_ref(entry)).as_slice(), &target, "layer");
        }
        let _ = unpack::unpack(tar_of(&entries).as_slice(), &target, "layer");
        prop_assert_eq!(picture(world.path(), &target), before);
    }

    #[test]
    fn no_bytes_make_the_reader_of_archives_panic(bytes: Vec<u8>) {
        let target = tempfile::tempdir().unwrap();
        let _ = unpack::unpack(bytes.as_slice(), target.path(), "layer");
    }
}
