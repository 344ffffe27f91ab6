//! Archives onto a tree of which everything outside must stay as it is.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
};

use bulkhead_tar::Writer;
use proptest::prelude::*;

use super::*;
use crate::channel::FailureKind;

/// A container's root with something beside it.
struct Tree {
    outer: tempfile::TempDir,
}

impl Tree {
    /// `None` where owners cannot be set.
    fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return None;
        }
        let outer = tempfile::tempdir().unwrap();
        fs::create_dir(outer.path().join("root")).unwrap();
        fs::write(outer.path().join("secret"), "untouched").unwrap();
        Some(Self { outer })
    }

    fn at(&self, path: &str) -> PathBuf {
        self.outer.path().join("root").join(path)
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.at(path)).unwrap()
    }

    fn unpack_as(&self, path: &str, owners: Owners, archive: &[u8]) -> Result<()> {
        let root = File::open(self.at("")).unwrap();
        let result = unpack(&Root::new(root.into()), Path::new(path), owners, archive);
        let mut beside: Vec<_> = fs::read_dir(self.outer.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        beside.sort();
        assert_eq!(beside, ["root", "secret"]);
        let secret = fs::read_to_string(self.outer.path().join("secret")).unwrap();
        assert_eq!(secret, "untouched");
        result
    }

    fn unpack(&self, path: &str, archive: &[u8]) -> Result<()> {
        self.unpack_as(path, Owners::Root, archive)
    }

    /// Unpacks what must be refused as the archive's mistake.
    fn refuse(&self, path: &str, archive: &[u8], words: &str) {
        let error = self.unpack(path, archive).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(error.failure().kind, FailureKind::Archive, "{error}");
    }
}

fn file(name: &str, content: &str) -> (Entry, Vec<u8>) {
    let entry = Entry {
        name: name.into(),
        size: content.len() as u64,
        mode: 0o644,
        uid: 1000,
        gid: 2000,
        mtime: Time {
            seconds: 1_000_000_000,
            nanoseconds: 0,
        },
        ..Entry::default()
    };
    (entry, content.into())
}

fn other(kind: Kind, name: &str, link: &str) -> (Entry, Vec<u8>) {
    let (entry, content) = file(name, "");
    let entry = Entry {
        kind,
        link: link.into(),
        ..entry
    };
    (entry, content)
}

fn archive(entries: &[(Entry, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = Writer::new(&mut bytes);
    for (entry, content) in entries {
        writer.file(entry, &mut &**content).unwrap();
    }
    writer.finish().unwrap();
    bytes
}

#[test]
fn directories_on_the_way_are_made_and_owners_are_root_unless_they_are_kept_ss_18() {
    let Some(tree) = Tree::new() else { return };
    let one = archive(&[file("a/b/f.txt", "content")]);
    tree.unpack("new/place", &one).unwrap();
    assert_eq!(tree.read("new/place/a/b/f.txt"), "content");
    let of = |path: &str| {
        let meta = fs::metadata(tree.at(path)).unwrap();
        (meta.uid(), meta.gid(), meta.mode() & 0o7777)
    };
    assert_eq!(of("new/place/a/b/f.txt"), (0, 0, 0o644));
    assert_eq!(of("new/place/a"), (0, 0, 0o755));
    let meta = fs::metadata(tree.at("new/place/a/b/f.txt")).unwrap();
    assert_eq!(meta.mtime(), 1_000_000_000);

    let mut set_id = file("a/b/f.txt", "more");
    set_id.0.mode = 0o4711;
    let two = archive(&[
        set_id,
        other(Kind::Symlink, "l", "a"),
        other(Kind::Fifo, "p", ""),
    ]);
    tree.unpack_as("new/place", Owners::Archive, &two).unwrap();
    assert_eq!(of("new/place/a/b/f.txt"), (1000, 2000, 0o4711));
    for name in ["new/place/l", "new/place/p"] {
        let meta = fs::symlink_metadata(tree.at(name)).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (1000, 2000), "{name}");
    }
}

#[test]
fn a_file_is_overwritten_in_place_and_links_make_way_ss_61() {
    let Some(tree) = Tree::new() else { return };
    fs::write(tree.at("old"), "a longer content than the new one").unwrap();
    fs::hard_link(tree.at("old"), tree.at("again")).unwrap();
    fs::write(tree.at("kept"), "kept").unwrap();
    symlink("kept", tree.at("link")).unwrap();
    symlink("nothing", tree.at("dangling")).unwrap();
    let fifo = tree.at("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, fifo, Mode::RWXU).unwrap();
    let names = ["old", "link", "dangling", "fifo"];
    tree.unpack("/", &archive(&names.map(|name| file(name, "new"))))
        .unwrap();
    for name in names {
        assert_eq!(tree.read(name), "new", "{name}");
        assert!(fs::symlink_metadata(tree.at(name)).unwrap().is_file());
    }
    assert_eq!(tree.read("again"), "new");
    assert_eq!(tree.read("kept"), "kept");
}

#[test]
fn a_directory_that_is_there_stays_as_it_is_and_a_new_one_is_as_told() {
    let Some(tree) = Tree::new() else { return };
    fs::create_dir(tree.at("tmp")).unwrap();
    fs::set_permissions(tree.at("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
    let directory = |name: &str| {
        let (mut entry, content) = other(Kind::Directory, name, "");
        entry.mode = 0o700;
        (entry, content)
    };
    let entries = [
        directory("./"),
        directory("./empty/"),
        directory("full"),
        file("full/f", "x"),
    ];
    tree.unpack("tmp", &archive(&entries)).unwrap();
    let mode = |path: &str| fs::metadata(tree.at(path)).unwrap().mode() & 0o7777;
    assert_eq!(mode("tmp"), 0o1777);
    assert_eq!(mode("tmp/empty"), 0o700);
    let full = fs::metadata(tree.at("tmp/full")).unwrap();
    assert_eq!(full.mtime(), 1_000_000_000);
    // Over a file there is no way, and the file stays.
    let error = tree.unpack("tmp/full/f", &archive(&[])).unwrap_err();
    assert_eq!(error.failure().errno, Some(libc::ENOTDIR), "{error}");
    let error = tree
        .unpack("tmp", &archive(&[file("full", "x")]))
        .unwrap_err();
    assert_eq!(error.failure().errno, Some(libc::EISDIR), "{error}");
    assert_eq!(tree.read("tmp/full/f"), "x");
}

#[test]
fn absolute_names_mean_the_directory_and_names_that_lead_upwards_are_refused_b30() {
    let Some(tree) = Tree::new() else { return };
    tree.unpack("d", &archive(&[file("//etc/./f", "x")]))
        .unwrap();
    assert_eq!(tree.read("d/etc/f"), "x");
    for name in ["../f", "a/../../f", "/..", "a/.."] {
        tree.refuse("d", &archive(&[file(name, "x")]), "leads upwards");
        let link = archive(&[other(Kind::Link, "l", name)]);
        tree.refuse("d", &link, "leads upwards");
    }
    let long = "n/".repeat(2100);
    tree.refuse("d", &archive(&[file(&long, "x")]), "longer than any path");
    tree.refuse("d", &archive(&[file("/", "x")]), "takes the place");
}

#[test]
fn no_link_leads_out_of_the_directory_b30() {
    let Some(tree) = Tree::new() else { return };
    fs::create_dir_all(tree.at("d/inner")).unwrap();
    fs::create_dir(tree.at("etc")).unwrap();
    symlink("inner", tree.at("d/within")).unwrap();
    tree.unpack("d", &archive(&[file("within/f", "x")]))
        .unwrap();
    assert_eq!(tree.read("d/inner/f"), "x");
    for target in ["/etc", "../etc", "../../secret", "inner/../../etc", "/"] {
        let attack = [other(Kind::Symlink, "l", target), file("l/f", "x")];
        tree.refuse("d", &archive(&attack), "leads out");
        // A link at the end makes way instead.
        let harmless = [other(Kind::Symlink, "l", target), file("l", "x")];
        tree.unpack("d", &archive(&harmless)).unwrap();
        assert_eq!(tree.read("d/l"), "x");
    }
    assert_eq!(fs::read_dir(tree.at("etc")).unwrap().count(), 0);
    // The container's root is where its links lead to.
    symlink("/run", tree.at("var-run")).unwrap();
    symlink("../../../../usr", tree.at("up")).unwrap();
    tree.unpack("/", &archive(&[file("var-run/f", "1"), file("up/f", "2")]))
        .unwrap();
    assert_eq!(
        (tree.read("run/f"), tree.read("usr/f")),
        ("1".into(), "2".into())
    );
}

#[test]
fn the_path_itself_does_not_lead_out_of_the_root_b30() {
    let Some(tree) = Tree::new() else { return };
    symlink("/../../../new", tree.at("link")).unwrap();
    for (path, place) in [("../../up", "up/f"), ("/link/x", "new/x/f"), ("", "f")] {
        tree.unpack(path, &archive(&[file("f", path)]))
            .unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(tree.read(place), path);
    }
}

#[test]
fn hard_links_are_to_what_lies_in_the_directory() {
    let Some(tree) = Tree::new() else { return };
    fs::write(tree.at("outside"), "outside").unwrap();
    let entries = [
        file("a/f", "x"),
        other(Kind::Link, "b", "a/f"),
        other(Kind::Link, "a/f", "b"),
        other(Kind::Symlink, "l", "../outside"),
        other(Kind::Link, "m", "l"),
    ];
    tree.unpack("d", &archive(&entries)).unwrap();
    assert_eq!(fs::metadata(tree.at("d/b")).unwrap().nlink(), 2);
    assert!(fs::symlink_metadata(tree.at("d/m")).unwrap().is_symlink());
    assert_eq!(fs::metadata(tree.at("outside")).unwrap().nlink(), 1);
    let missing = tree.unpack("d", &archive(&[other(Kind::Link, "n", "outside")]));
    assert_eq!(missing.unwrap_err().failure().errno, Some(libc::ENOENT));
}

#[test]
fn devices_and_what_nobody_knows_are_refused_and_fifos_are_made() {
    let Some(tree) = Tree::new() else { return };
    for kind in [Kind::Char, Kind::Block] {
        tree.refuse("d", &archive(&[other(kind, "n", "")]), "devices");
    }
    tree.refuse("d", &archive(&[other(Kind::Other(b'V'), "n", "")]), "'V'");
    tree.unpack("d", &archive(&[other(Kind::Fifo, "p", "")]))
        .unwrap();
    let meta = fs::metadata(tree.at("d/p")).unwrap();
    assert_eq!(FileType::from_raw_mode(meta.mode()), FileType::Fifo);
}

#[test]
fn an_archive_that_is_cut_or_garbage_is_refused_and_one_without_its_end_mark_is_not() {
    let Some(tree) = Tree::new() else { return };
    let whole = archive(&[file("f", &"x".repeat(1000)), file("g", "y")]);
    tree.unpack("d", &whole[..whole.len() - 1024]).unwrap();
    assert_eq!(tree.read("d/g"), "y");
    for cut in [1, 700, 1535, 2000] {
        tree.refuse("d", &whole[..cut], "not understood");
    }
    tree.refuse("d", &[b'x'; 2048], "not understood");
    // What follows the end mark is nobody's affair.
    tree.unpack("e", &[&whole[..], &[b'x'; 9000]].concat())
        .unwrap();
    tree.unpack("empty", b"").unwrap();
    assert!(tree.at("empty").is_dir());
}

proptest! {
    /// Whatever an archive says, nothing beside the root changes.
    #[test]
    fn no_archive_reaches_beside_the_root_b30(
        entries in prop::collection::vec(("[ab./]{1,6}", 0..4_u8, "[ab./]{1,8}"), 0..8),
        path in "[ab./]{0,4}",
    ) {
        let Some(tree) = Tree::new() else { return Ok(()) };
        let entries: Vec<_> = entries.iter().map(|(name, kind, link)| match kind {
            0 => file(name, "x"),
            1 => other(Kind::Symlink, name, link),
            2 => other(Kind::Link, name, link),
            _ => other(Kind::Directory, name, ""),
        }).collect();
        // Checked within.
        let _ = tree.unpack(&path, &archive(&entries));
    }
}
