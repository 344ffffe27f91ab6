use std::collections::BTreeMap;
use std::fs;

use super::*;
use crate::Kernel;

/// One entry as read back: mode with file type, node number, data.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    mode: u32,
    node: (u32, u32),
    data: Vec<u8>,
}

/// A second reading of the format, from its description.
fn unpack(archive: &[u8]) -> BTreeMap<String, Entry> {
    let mut entries = BTreeMap::new();
    let mut at = 0;
    loop {
        assert_eq!(&archive[at..at + 6], b"070701");
        let field = |n: usize| {
            let digits = &archive[at + 6 + n * 8..][..8];
            u32::from_str_radix(std::str::from_utf8(digits).unwrap(), 16).unwrap()
        };
        let (len, name_len) = (field(6) as usize, field(11) as usize);
        let name = std::str::from_utf8(&archive[at + 110..][..name_len - 1]).unwrap();
        let data = (at + 110 + name_len).next_multiple_of(4);
        if name == "TRAILER!!!" {
            assert_eq!(data, archive.len());
            return entries;
        }
        assert_eq!(
            (field(2), field(3), field(5)),
            (0, 0, 0),
            "owner, group and time are zero"
        );
        let entry = Entry {
            mode: field(1),
            node: (field(9), field(10)),
            data: archive[data..data + len].to_vec(),
        };
        assert!(
            entries.insert(name.to_owned(), entry).is_none(),
            "{name} is there once"
        );
        at = (data + len).next_multiple_of(4);
    }
}

/// The least that passes for a static program, of a length that needs padding.
fn program() -> Vec<u8> {
    let mut program = vec![0; 65];
    program[..6].copy_from_slice(b"\x7fELF\x02\x01");
    program
}

#[test]
fn the_image_holds_the_agent_as_init_and_what_the_kernel_needs() {
    let entries = unpack(&contents(&program()).unwrap());
    let names: Vec<&str> = entries.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        [
            "dev",
            "dev/console",
            "dev/null",
            "init",
            "proc",
            "run",
            "sys",
            "tmp"
        ]
    );
    assert_eq!(
        entries["init"],
        Entry {
            mode: 0o100_755,
            node: (0, 0),
            data: program()
        }
    );
    assert_eq!(
        entries["dev/console"],
        Entry {
            mode: 0o020_600,
            node: (5, 1),
            data: vec![]
        }
    );
    assert_eq!(
        entries["dev/null"],
        Entry {
            mode: 0o020_666,
            node: (1, 3),
            data: vec![]
        }
    );
    assert_eq!(entries["tmp"].mode, 0o041_777);
}

#[test]
fn the_same_program_gives_the_same_archive() {
    let dir = tempfile::tempdir().unwrap();
    let agent = dir.path().join("agent");
    fs::write(&agent, program()).unwrap();
    let one = build(&agent, &dir.path().join("one")).unwrap();
    let two = build(&agent, &dir.path().join("two")).unwrap();
    assert_eq!(fs::read(&one.path).unwrap(), fs::read(&two.path).unwrap());
    assert_eq!((&one.sha256, one.len), (&two.sha256, two.len));
    assert_eq!(one.len, fs::metadata(&one.path).unwrap().len());
}

#[test]
fn a_program_that_needs_a_loader_is_refused() {
    let mut dynamic = program();
    dynamic[32] = 64; // e_phoff
    dynamic[54] = 56; // e_phentsize
    dynamic[56] = 1; // e_phnum
    dynamic.resize(64 + 56, 0);
    dynamic[64] = 3; // PT_INTERP
    let error = ensure_static(&dynamic).unwrap_err();
    assert!(error.to_string().contains("dynamically"), "{error}");
    dynamic[64] = 1; // PT_LOAD
    ensure_static(&dynamic).unwrap();
    assert!(ensure_static(&dynamic[..66]).is_err());
    assert!(ensure_static(b"#!/bin/sh\n").is_err());
}

#[test]
fn the_manifest_names_files_with_their_hashes() {
    let dir = tempfile::tempdir().unwrap();
    let agent = dir.path().join("agent");
    fs::write(&agent, program()).unwrap();
    let image = build(&agent, &dir.path().join("image")).unwrap();
    let path = dir.path().join("kernel");
    fs::write(&path, "kernel").unwrap();
    let mut kernel = Kernel {
        path,
        version: "6.12.1".to_owned(),
        sha256: sha256(b"kernel"),
        config_sha256: sha256(b"config"),
        inputs: BTreeMap::from([("gcc".to_owned(), "gcc 12.2.0".to_owned())]),
        notes: vec![],
    };
    let assets = dir.path().join("assets");
    write_manifest(&assets, &kernel, &image, "rustc 1.95.0").unwrap();
    let manifest: serde_json::Value =
        serde_json::from_slice(&fs::read(assets.join("manifest.json")).unwrap()).unwrap();
    assert_eq!(
        manifest,
        serde_json::json!({
            "kernel": { "file": "vmlinux", "sha256": kernel.sha256, "version": "6.12.1" },
            "root": { "file": "guest-root.cpio", "sha256": image.sha256 },
            "kernel_config_sha256": kernel.config_sha256,
            "inputs": { "gcc": "gcc 12.2.0", "rustc": "rustc 1.95.0" },
        })
    );
    assert_eq!(fs::read(assets.join("vmlinux")).unwrap(), b"kernel");
    assert_eq!(
        fs::read(assets.join("guest-root.cpio")).unwrap(),
        fs::read(&image.path).unwrap()
    );
    assert_eq!(fs::read_dir(&assets).unwrap().count(), 3);

    kernel.sha256 = sha256(b"another");
    let error = write_manifest(&assets, &kernel, &image, "rustc 1.95.0").unwrap_err();
    assert!(
        error.to_string().contains("has changed since it was built"),
        "{error}"
    );
}
