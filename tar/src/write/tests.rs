//! What is written, as it is read: by ourselves, and by another reader.

use proptest::prelude::*;

use super::*;
use crate::{Reader, Time};

fn written(entry: &Entry, content: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = Writer::new(&mut bytes);
    writer.file(entry, &mut &*content).unwrap();
    writer.finish().unwrap();
    bytes
}

#[test]
fn a_file_that_has_changed_its_size_is_cut_or_filled_with_zeros() {
    for (content, expected) in [
        (&b"abc"[..], &b"abc\0\0"[..]),
        (b"abcdefg", b"abcde"),
        (b"", b"\0\0\0\0\0"),
    ] {
        let entry = Entry {
            name: b"f".to_vec(),
            size: 5,
            ..Entry::default()
        };
        let bytes = written(&entry, content);
        assert_eq!(bytes.len(), 4 * BLOCK);
        let mut reader = Reader::new(&*bytes);
        reader.next_entry().unwrap().unwrap();
        let mut seen = Vec::new();
        reader.read_to_end(&mut seen).unwrap();
        assert_eq!(seen, expected);
        assert!(reader.next_entry().unwrap().is_none());
    }
}

#[test]
fn another_reader_understands_long_names_and_large_numbers() {
    let entry = Entry {
        name: "d/".repeat(200).into_bytes(),
        link: vec![b'l'; 101],
        kind: Kind::Symlink,
        mode: 0o4755,
        uid: 4_294_967_294,
        gid: 7,
        mtime: Time {
            seconds: -5,
            nanoseconds: 0,
        },
        ..Entry::default()
    };
    let bytes = written(&entry, b"");
    let mut archive = tar::Archive::new(&*bytes);
    let mut entries = archive.entries().unwrap();
    let mut seen = entries.next().unwrap().unwrap();
    assert_eq!(seen.path_bytes(), entry.name);
    assert_eq!(seen.link_name_bytes().unwrap(), entry.link);
    assert_eq!(seen.header().entry_type(), tar::EntryType::Symlink);
    assert_eq!(seen.header().mode().unwrap(), 0o4755);
    let records = seen.pax_extensions().unwrap().unwrap();
    let records: Vec<_> = records.flatten().map(|record| record.key()).collect();
    let keys = [Ok("path"), Ok("linkpath"), Ok("mtime"), Ok("uid")];
    assert_eq!(records, keys);
    assert!(entries.next().is_none());
}

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![
        Just(Kind::Regular),
        Just(Kind::Symlink),
        Just(Kind::Link),
        Just(Kind::Char),
        Just(Kind::Block),
        Just(Kind::Directory),
        Just(Kind::Fifo),
    ]
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        name in "[a-zé\n=]{1,300}",
        link in "[a-z ]{0,300}",
        kind in kind(),
        ids in (0..=i64::from(u32::MAX), 0..=i64::from(u32::MAX)),
        mode in 0..0o10000_i64,
        seconds in -10_000_000_000..100_000_000_000_i64,
        device in (0..4096_i64, 0..1_048_576_i64),
        content in prop::collection::vec(any::<u8>(), 0..2000),
    ) {
        let special = matches!(kind, Kind::Char | Kind::Block);
        let regular = kind == Kind::Regular;
        let entry = Entry {
            name: name.into_bytes(),
            link: link.into_bytes(),
            kind,
            size: if regular { content.len() as u64 } else { 0 },
            mode,
            uid: ids.0,
            gid: ids.1,
            mtime: Time { seconds, nanoseconds: 0 },
            device: if special { device } else { (0, 0) },
            ..Entry::default()
        };
        let bytes = written(&entry, &content);
        prop_assert_eq!(bytes.len() % BLOCK, 0);
        let mut reader = Reader::new(&*bytes);
        let seen = reader.next_entry().unwrap().unwrap();
        prop_assert_eq!(format!("{seen:?}"), format!("{entry:?}"));
        let mut read = Vec::new();
        reader.read_to_end(&mut read).unwrap();
        prop_assert_eq!(read, if regular { content } else { Vec::new() });
        prop_assert!(reader.next_entry().unwrap().is_none());
    }
}
