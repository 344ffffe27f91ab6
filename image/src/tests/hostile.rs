//! Layers that would reach outside, lie, or are broken.

use std::io::Read;

use proptest::prelude::*;

use super::*;

fn unpacked(items: &[Item]) -> Result<tempfile::TempDir> {
    let target = scratch();
    unpack_on(&tar_of(items), target.path())?;
    Ok(target)
}

#[track_caller]
fn check_refused(items: &[Item], words: &str) {
    let error = unpacked(items).unwrap_err();
    assert!(matches!(error, Error::Entry { .. }), "{error:?}");
    let text = error.to_string();
    let last = String::from_utf8_lossy(&items.last().unwrap().name).into_owned();
    assert!(
        text.contains(words) && text.contains(&format!("{last:?}")),
        "{text}"
    );
}

#[test]
fn names_that_lead_out_are_refused_with_the_entry_b36() {
    check_refused(&[file("../evil", "x")], "\"..\"");
    check_refused(&[file("a/../../evil", "x")], "\"..\"");
    check_refused(&[file(".", "x")], "root directory");
    check_refused(&[file("/", "x")], "root directory");
    check_refused(&[file(".wh...", "x")], "removes no file");
    check_refused(&[file(".wh.", "x")], "removes no file");
    check_refused(&[file("", "x")], "no name");
    let nul = unpacked(&[item("a", b'0').pax("path", "a\0b")]).unwrap_err();
    assert!(nul.to_string().contains("NUL"), "{nul}");
}

#[test]
fn hard_links_outside_are_refused_with_the_entry_b37() {
    check_refused(&[hard("a", "../../etc/passwd")], "outside");
    check_refused(&[hard("a", "/etc/passwd")], "no file of the image");
    check_refused(&[hard("a", "none")], "no file of the image");
    check_refused(&[hard("a", "/")], "no file of the image");
    check_refused(
        &[soft("l", "/etc"), hard("a", "l/passwd")],
        "no file of the image",
    );
    check_refused(&[dir("d"), hard("a", "d")], "no file of the image");
}

#[test]
fn a_link_in_the_way_of_an_entry_leads_nowhere_but_into_the_image_b35() {
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().to_str().unwrap();
    let canary = outside.path().join("canary");
    fs::write(&canary, "whole").unwrap();
    let door = soft("door", target);
    let inside = unpacked(&[door.clone(), file("door/evil", "x")]).unwrap();
    let evil = inside
        .path()
        .join(target.trim_start_matches('/'))
        .join("evil");
    assert_eq!(fs::read_to_string(evil).unwrap(), "x");
    let inside = unpacked(&[dir("a"), soft("a/up", "../../.."), file("a/up/evil", "x")]).unwrap();
    assert_eq!(fs::read_to_string(inside.path().join("evil")).unwrap(), "x");
    check_refused(
        &[soft("a", "b"), soft("b", "a"), file("a/x", "")],
        "leads nowhere",
    );
    // The last component is replaced, not followed.
    let replaced = unpacked(&[soft("f", canary.to_str().unwrap()), file("f", "mine")]).unwrap();
    assert_eq!(
        fs::read_to_string(replaced.path().join("f")).unwrap(),
        "mine"
    );
    let replaced = unpacked(&[door.clone(), dir("door").mode(0o700)]).unwrap();
    assert!(
        replaced
            .path()
            .join("door")
            .symlink_metadata()
            .unwrap()
            .is_dir()
    );
    // Nor does a whiteout follow, or what hides a directory.
    unpacked(&[door.clone(), file(".wh.door", "")]).unwrap();
    unpacked(&[
        door,
        file("door/.wh.canary", ""),
        file("door/.wh..wh..opq", ""),
    ])
    .unwrap();
    assert_eq!(fs::read_to_string(&canary).unwrap(), "whole");
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
}

#[test]
fn what_has_no_place_in_a_layer_is_refused() {
    check_refused(&[file("f", "x"), file("f/g", "y")], "no directory");
    check_refused(&[file("f", "").owner(i64::from(u32::MAX), 0)], "owner");
    check_refused(&[file("f", "").owner(-1, 0)], "owner");
    check_refused(&[item("f", b'V')], "not supported");
    check_refused(&[soft("f", "")], "link to nothing");
    let long = unpacked(&[file(&"d/".repeat(3000), "")]).unwrap_err();
    assert!(long.to_string().contains("longer than any path"), "{long}");
    let truncated = tar_of(&[file("f", &"x".repeat(5000))]);
    let target = tempfile::tempdir().unwrap();
    assert!(unpack_on(&truncated[..1000], target.path()).is_err());
}

#[test]
fn names_of_any_bytes_and_deep_trees_pass_b36() {
    let name = [b'n'; 255];
    let odd = b"a\n\xff\xfe";
    let deep = "d/".repeat(1000) + "f";
    let target = unpacked(&[item(name, b'0'), item(odd, b'0'), file(&deep, "x")]).unwrap();
    assert_eq!(fs::read_to_string(target.path().join(deep)).unwrap(), "x");
    let mut names: Vec<_> = fs::read_dir(target.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .filter(|name| name != "d")
        .collect();
    names.sort();
    assert_eq!(names[0].as_bytes(), odd);
    assert_eq!(names[1].as_bytes(), name);
    // The guard of the directory has no descriptors for so deep a tree.
    remove_tree(&target.path().join("d")).unwrap();
}

#[test]
fn attributes_pass_by_an_allow_list_b37() {
    let with =
        |name: &str| unpacked(&[file("file", "").pax(&format!("SCHILY.xattr.{name}"), "value")]);
    let text = with("trusted.overlay.redirect").unwrap_err().to_string();
    assert!(text.contains("trusted."), "{text}");
    let mut value = [0; 8];
    let mut read = |target: &tempfile::TempDir, name| {
        rustix::fs::getxattr(target.path().join("file"), name, &mut value)
    };
    let target = with("security.selinux").unwrap();
    assert!(read(&target, "security.selinux").is_err());
    let target = with("user.note").unwrap();
    assert_eq!(read(&target, "user.note"), Ok(5));
}

#[test]
fn a_sparse_file_as_large_as_it_likes_takes_no_room_and_no_time_b37() {
    let sparse = |size: &str| {
        file("big", "")
            .pax("GNU.sparse.major", "0")
            .pax("GNU.sparse.minor", "1")
            .pax("GNU.sparse.size", size)
            .pax("GNU.sparse.map", format!("{size},0"))
    };
    let target = unpacked(&[sparse("1099511627776")]).unwrap();
    let meta = fs::metadata(target.path().join("big")).unwrap();
    assert_eq!((meta.len(), meta.blocks()), (1 << 40, 0));
    // The most that any file can have is the file system's to refuse, if it does.
    if let Ok(target) = unpacked(&[sparse("9223372036854775807")]) {
        let meta = fs::metadata(target.path().join("big")).unwrap();
        assert_eq!((meta.len(), meta.blocks()), (9_223_372_036_854_775_807, 0));
    }
    assert!(unpacked(&[sparse("9223372036854775808")]).is_err());
}

#[test]
fn lies_about_parts_and_sizes_end_the_layer_b37() {
    let sparse = |map: &str, content: &str| {
        file("f", content)
            .pax("GNU.sparse.size", "100")
            .pax("GNU.sparse.map", map)
    };
    assert!(unpacked(&[sparse("0,2,50,3", "12345")]).is_ok());
    for (map, content) in [
        ("0,2,1,3", "12345"),
        ("50,3,0,2", "12345"),
        ("0,2,98,3", "12345"),
        ("0,2,50,3", "1234"),
        ("0,2,50,3", "123456"),
        ("0,2,50", "12345"),
        ("-1,5", "12345"),
        ("9223372036854775807,9223372036854775807", "12345"),
        ("x,5", "12345"),
    ] {
        assert!(unpacked(&[sparse(map, content)]).is_err(), "{map}");
    }
    assert!(unpacked(&[file("f", "x").pax("size", "9999999999999")]).is_err());
    assert!(unpacked(&[file("f", "x").pax("size", "-1")]).is_err());
    assert!(unpacked(&[file("f", "x").pax("mtime", "yesterday")]).is_err());
}

#[test]
fn an_extended_header_has_a_largest_size_and_a_largest_number_b37() {
    // A gigabyte of zeros, as a compressed layer would hold it in a few bytes.
    let mut head = header(&item("pax", b'x'));
    put(&mut head[124..136], 1 << 30);
    seal(&mut head);
    let bomb = head.as_slice().chain(std::io::repeat(0).take(1 << 30));
    let target = tempfile::tempdir().unwrap();
    let root = File::open(target.path()).unwrap().into();
    let error = unpack::unpack(bomb, root, "layer").unwrap_err();
    let Error::Unpack { source, .. } = error else {
        panic!("{error:?}");
    };
    assert!(source.to_string().contains("1 MiB"), "{source}");
    let mut many = Vec::new();
    for _ in 0..100 {
        many.extend(entries(&[item("pax", b'x')]));
    }
    assert!(unpack_on(&many, target.path()).is_err());
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

fn hostile_entry() -> impl Strategy<Value = Item> {
    let letter = prop_oneof![Just(b'0'), Just(b'5'), Just(b'1'), Just(b'2'), Just(b'6')];
    let any = (hostile_name(), letter, hostile_name(), 0_i64..0o10000);
    any.prop_map(|(name, letter, target, mode)| Item {
        content: if letter == b'0' {
            b"evil".to_vec()
        } else {
            vec![]
        },
        link: target.into(),
        ..item(&name, letter).mode(mode)
    })
}

/// Everything below a directory, with contents and modes.
fn surroundings(dir: &Path, skip: &Path) -> Vec<(PathBuf, u32, u64, String)> {
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
        let before = surroundings(world.path(), &target);
        // A refusal ends a layer; so that the rest is tried too, each goes on where
        // the last one stopped.
        for entry in &entries {
            let _ = unpack_on(&tar_of(std::slice::from_ref(entry)), &target);
        }
        let _ = unpack_on(&tar_of(&entries), &target);
        prop_assert_eq!(surroundings(world.path(), &target), before);
    }

    #[test]
    fn no_bytes_make_the_reader_of_archives_panic_b37(
        blocks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 512), 0..6),
        changes in proptest::collection::vec((0_usize..2048, any::<u8>()), 0..12),
        seal_again: bool,
    ) {
        // Noise, and archives with a few bytes changed, whose sums are right again.
        let target = tempfile::tempdir().unwrap();
        let _ = unpack_on(&blocks.concat(), target.path());
        let mut tar = tar_of(&[
            file("f", "content").pax("mtime", "1.5").pax("GNU.sparse.map", "0,7"),
            soft("l", "f"),
        ]);
        for (place, byte) in changes {
            if let Some(old) = tar.get_mut(place) {
                *old = byte;
            }
        }
        if seal_again {
            for start in [0, 1024, 2048] {
                if let Some(block) = tar.get_mut(start..start + 512) {
                    seal(block.try_into().unwrap());
                }
            }
        }
        let _ = unpack_on(&tar, target.path());
    }
}
