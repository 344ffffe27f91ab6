//! Sparse files and holes.

use std::os::unix::fs::MetadataExt;

use super::*;

#[test]
fn blocks_of_zeros_become_holes_and_every_byte_stays_b37() {
    let mut content = vec![0; 40 * BLOCK + 100];
    content[20 * BLOCK + 7] = 1;
    for length in [0, 1, BLOCK, 16 * BLOCK, 16 * BLOCK + 1, content.len()] {
        let mut file = tempfile::tempfile().unwrap();
        copy_with_holes(&content[..length], &mut file).unwrap();
        assert!(file.metadata().unwrap().blocks() * 512 <= 2 * BLOCK as u64);
        let mut back = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut back).unwrap();
        assert!(back == content[..length], "{length}");
    }
}

/// The header of an old GNU sparse file that claims `size` bytes and stores none.
fn sparse(size: u64) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_path("big").unwrap();
    header.set_entry_type(EntryType::GNUSparse);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(0);
    let gnu = header.as_gnu_mut().unwrap();
    for (field, value) in [
        (&mut gnu.sparse[0].offset, size),
        (&mut gnu.sparse[0].numbytes, 0),
        (&mut gnu.realsize, size),
    ] {
        *field = [0; 12];
        field[0] = 0x80;
        field[4..].copy_from_slice(&value.to_be_bytes());
    }
    header.set_cksum();
    let mut tar = header.as_bytes().to_vec();
    tar.resize(tar.len() + 1024, 0);
    tar
}

#[test]
fn a_sparse_file_takes_what_it_stores_and_has_a_limit_b37() {
    let dir = tempfile::tempdir().unwrap();
    unpack(sparse(8 << 20).as_slice(), dir.path(), "x").unwrap();
    let file = std::fs::metadata(dir.path().join("big")).unwrap();
    assert_eq!((file.len(), file.blocks()), (8 << 20, 0));
    let dir = tempfile::tempdir().unwrap();
    let error = unpack(sparse(MAX_SPARSE + 1).as_slice(), dir.path(), "x").unwrap_err();
    assert!(error.to_string().contains("sparse file of"), "{error}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_sparse_file_in_the_pax_form_is_refused_b37() {
    let mut builder = tar::Builder::new(Vec::new());
    builder
        .append_pax_extensions([("GNU.sparse.major", &b"1"[..])])
        .unwrap();
    let mut header = tar::Header::new_ustar();
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(1);
    builder
        .append_data(&mut header, "GNUSparseFile.1/f", &b"x"[..])
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let error = unpack(builder.into_inner().unwrap().as_slice(), dir.path(), "x").unwrap_err();
    assert!(error.to_string().contains("pax form"), "{error}");
}
