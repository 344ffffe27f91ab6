//! Files with holes, in every form that tars have for them.

use std::os::unix::fs::FileExt;

use super::*;

/// The four forms in which a file of 3 MiB with two parts is packed.
fn sparse_tars() -> Vec<(&'static str, Vec<u8>)> {
    let parts = [(1 << 20, &b"first"[..]), (2 << 20, b"second")];
    let size = 3_i64 << 20;
    let content = [parts[0].1, parts[1].1].concat();
    let end = |tar: Vec<u8>| [tar, vec![0; 1024]].concat();
    let pax = |name: &str, content: &[u8], records: &[(&str, String)]| {
        let mut item = item(name, b'0');
        item.content = content.to_vec();
        for (key, value) in records {
            item = item.pax(key, value);
        }
        tar_of(&[item])
    };
    let mut old = header(&Item {
        magic: *b"ustar  \0",
        content: content.clone(),
        ..item("big", b'S')
    });
    for (index, (offset, part)) in parts.iter().enumerate() {
        put(&mut old[386 + 24 * index..398 + 24 * index], *offset);
        put(
            &mut old[398 + 24 * index..410 + 24 * index],
            i64::try_from(part.len()).unwrap(),
        );
    }
    put(&mut old[483..495], size);
    // One more block of parts, with an empty one at the end as GNU tar writes it.
    let mut extended = old;
    extended[482] = 1;
    let mut more = [0; 512];
    put(&mut more[..12], size);
    put(&mut more[12..24], 0);
    seal(&mut old);
    seal(&mut extended);
    let map = format!("2\n{}\n5\n{}\n6\n", parts[0].0, parts[1].0);
    vec![
        ("old", end([&old[..], &padded(&content)].concat())),
        (
            "extended",
            end([&extended[..], &more, &padded(&content)].concat()),
        ),
        (
            "0.0",
            pax(
                "big",
                &content,
                &[
                    ("GNU.sparse.size", size.to_string()),
                    ("GNU.sparse.numblocks", "2".to_owned()),
                    ("GNU.sparse.offset", parts[0].0.to_string()),
                    ("GNU.sparse.numbytes", "5".to_owned()),
                    ("GNU.sparse.offset", parts[1].0.to_string()),
                    ("GNU.sparse.numbytes", "6".to_owned()),
                ],
            ),
        ),
        (
            "0.1",
            pax(
                "GNUSparseFile.1/big",
                &content,
                &[
                    ("GNU.sparse.size", size.to_string()),
                    ("GNU.sparse.numblocks", "2".to_owned()),
                    (
                        "GNU.sparse.map",
                        format!("{},5,{},6", parts[0].0, parts[1].0),
                    ),
                    ("GNU.sparse.name", "big".to_owned()),
                ],
            ),
        ),
        (
            "1.0",
            pax(
                "GNUSparseFile.1/big",
                &[padded(map.as_bytes()), content.clone()].concat(),
                &[
                    ("GNU.sparse.major", "1".to_owned()),
                    ("GNU.sparse.minor", "0".to_owned()),
                    ("GNU.sparse.name", "big".to_owned()),
                    ("GNU.sparse.realsize", size.to_string()),
                ],
            ),
        ),
    ]
}

#[test]
fn sparse_files_of_every_form_have_their_size_and_take_what_they_store_b37() {
    for (form, tar) in sparse_tars() {
        let root = scratch();
        unpack_on(&tar, root.path()).unwrap_or_else(|error| panic!("{form}: {error:?}"));
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1, "{form}");
        let file = File::open(root.path().join("big")).unwrap();
        let meta = file.metadata().unwrap();
        assert_eq!(meta.len(), 3 << 20, "{form}");
        assert!(meta.blocks() * 512 <= 16 << 10, "{form}: {}", meta.blocks());
        let mut all = vec![0; 3 << 20];
        file.read_exact_at(&mut all, 0).unwrap();
        assert_eq!(&all[1 << 20..][..5], b"first", "{form}");
        assert_eq!(&all[2 << 20..][..6], b"second", "{form}");
        assert_eq!(all.iter().filter(|byte| **byte != 0).count(), 11, "{form}");
    }
}
