//! Trees into archives, as they are read again.

use std::{
    collections::BTreeMap,
    fs,
    io::Read,
    os::unix::{
        fs::{MetadataExt, symlink},
        net::UnixListener,
    },
};

use bulkhead_tar::Reader;

use super::*;
use crate::channel::FailureKind;

type Packed = BTreeMap<String, (Entry, Vec<u8>)>;

fn pack_in(at: &Path, path: &str, extent: Extent) -> Result<Packed> {
    let root = Root::new(File::open(at).unwrap().into());
    let mut bytes = Vec::new();
    pack(&root, Path::new(path), extent, &mut bytes)?;
    let mut reader = Reader::new(&*bytes);
    let mut packed = Packed::new();
    while let Some(entry) = reader.next_entry().unwrap() {
        let mut content = Vec::new();
        if extent == Extent::Whole {
            reader.read_to_end(&mut content).unwrap();
        }
        let name = String::from_utf8(entry.name.clone()).unwrap();
        assert!(packed.insert(name, (entry, content)).is_none());
        if extent == Extent::Header {
            break;
        }
    }
    Ok(packed)
}

fn names(packed: &Packed) -> Vec<&str> {
    packed.keys().map(String::as_str).collect()
}

#[test]
fn a_file_is_one_entry_with_its_last_name_ss_19() {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir(root.path().join("d")).unwrap();
    fs::write(root.path().join("d/f.txt"), "content").unwrap();
    let packed = pack_in(root.path(), "/d/f.txt", Extent::Whole).unwrap();
    let (entry, content) = &packed["f.txt"];
    assert_eq!((packed.len(), content.as_slice()), (1, &b"content"[..]));
    let meta = fs::metadata(root.path().join("d/f.txt")).unwrap();
    assert_eq!(entry.mode, i64::from(meta.mode() & 0o7777));
    assert_eq!(entry.uid, i64::from(meta.uid()));
    assert_eq!(entry.mtime.seconds, meta.mtime());
}

#[test]
fn a_directory_is_walked_and_its_links_are_not_followed() {
    let root = tempfile::tempdir().unwrap();
    let at = root.path().join("d");
    fs::create_dir_all(at.join("sub/empty")).unwrap();
    fs::write(at.join("sub/f"), "x").unwrap();
    symlink("/etc", at.join("out")).unwrap();
    symlink("loop", at.join("loop")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, at.join("fifo"), Mode::RWXU).unwrap();
    let _socket = UnixListener::bind(at.join("socket")).unwrap();
    let expected = [
        "d/",
        "d/fifo",
        "d/loop",
        "d/out",
        "d/sub/",
        "d/sub/empty/",
        "d/sub/f",
    ];
    let packed = pack_in(root.path(), "d/", Extent::Whole).unwrap();
    assert_eq!(names(&packed), expected);
    assert_eq!(packed["d/out"].0.link, b"/etc");
    assert_eq!(packed["d/fifo"].0.kind, Kind::Fifo);
    let all = pack_in(root.path(), "/", Extent::Whole).unwrap();
    assert_eq!(names(&all)[..2], ["./", "./d/"]);
    let error = pack_in(root.path(), "d/socket", Extent::Whole).unwrap_err();
    assert!(error.to_string().contains("socket"), "{error}");
}

#[test]
fn a_header_alone_tells_the_size_and_walks_nothing_ss_61() {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir(root.path().join("d")).unwrap();
    fs::write(root.path().join("d/f"), vec![b'x'; 5000]).unwrap();
    symlink("f", root.path().join("d/l")).unwrap();
    let file = pack_in(root.path(), "d/f", Extent::Header).unwrap();
    assert_eq!(file["f"].0.size, 5000);
    let directory = pack_in(root.path(), "d", Extent::Header).unwrap();
    assert_eq!(names(&directory), ["d/"]);
    let link = pack_in(root.path(), "d/l", Extent::Header).unwrap();
    assert_eq!(link["l"].0.link, b"f");
}

#[test]
fn what_is_missing_is_not_found_however_long_its_name_ss_63() {
    let root = tempfile::tempdir().unwrap();
    fs::write(root.path().join("file"), "").unwrap();
    for path in ["/none", "none/none", "file/none", ""] {
        let error = pack_in(root.path(), path, Extent::Header).unwrap_err();
        assert_eq!(error.failure().kind, FailureKind::NotFound, "{path}");
    }
    let longs = [
        "n".repeat(4000),
        "n/".repeat(2000),
        "x".repeat(5000),
        "a\0b".into(),
    ];
    for path in longs {
        assert!(pack_in(root.path(), &path, Extent::Header).is_err());
    }
}

#[test]
fn no_path_leads_out_of_the_root_b30() {
    let outer = tempfile::tempdir().unwrap();
    let root = outer.path().join("root");
    fs::create_dir(&root).unwrap();
    fs::write(outer.path().join("secret"), "x").unwrap();
    symlink("../secret", root.join("up")).unwrap();
    symlink("..", root.join("dir")).unwrap();
    for path in ["../secret", "dir/secret", "/../secret", "up/"] {
        let error = pack_in(&root, path, Extent::Whole).unwrap_err();
        assert_eq!(error.failure().kind, FailureKind::NotFound, "{path}");
    }
    let packed = pack_in(&root, "dir/..", Extent::Whole).unwrap();
    assert_eq!(names(&packed), ["./", "./dir", "./up"]);
}

#[test]
fn a_sparse_file_and_long_names_arrive_whole() {
    let root = tempfile::tempdir().unwrap();
    let long = "n".repeat(200);
    fs::create_dir_all(root.path().join("d").join(&long)).unwrap();
    let path = root.path().join("d").join(&long).join("f");
    let file = File::create(path).unwrap();
    file.set_len(3 << 20).unwrap();
    let packed = pack_in(root.path(), "d", Extent::Whole).unwrap();
    let (entry, content) = &packed[&format!("d/{long}/f")];
    assert_eq!((entry.size, content.len()), (3 << 20, 3 << 20));
    assert!(content.iter().all(|byte| *byte == 0));
}

#[test]
fn the_kernels_file_systems_are_not_walked_below_others() {
    // Where there is none below, there is nothing to leave out.
    let own = pack_in(Path::new("/"), "proc/sys/kernel/random", Extent::Whole).unwrap();
    assert!(own.len() > 2, "{:?}", names(&own));
    assert!(is_kernels(&File::open("/proc").unwrap().into()));
    assert!(!is_kernels(&File::open("/tmp").unwrap().into()));
}

#[test]
fn a_tree_that_is_too_deep_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let mut path = root.path().join("d");
    for _ in 0..=DEPTH_MAX {
        path.push("x");
    }
    fs::create_dir_all(&path).unwrap();
    let error = pack_in(root.path(), "d", Extent::Whole).unwrap_err();
    assert!(error.to_string().contains("deeper"), "{error}");
    let parent = path.parent().unwrap();
    fs::remove_dir(&path).unwrap();
    assert!(parent.exists());
    pack_in(root.path(), "d", Extent::Whole).unwrap();
}
