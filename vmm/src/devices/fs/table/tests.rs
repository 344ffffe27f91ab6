use std::os::fd::OwnedFd;

use super::*;
use crate::devices::fs::node::{About, Birth};

fn table(budget: usize, handles: usize) -> Table {
    let residents = Residents::new(budget);
    let root = node(&residents, 1);
    Table::new(root, residents, handles, ROOT + 1)
}

fn node(residents: &Arc<Residents>, inode: u64) -> Node {
    let fd: OwnedFd = File::open("/").unwrap().into();
    let about = About {
        identity: Identity {
            device: (0, 1),
            inode,
            mount: 1,
        },
        birth: Birth::Unknown,
        kind: libc::S_IFDIR,
        salt: 0,
    };
    residents.admit(Some(fd), about)
}

fn look_up(table: &Table, inode: u64) -> u64 {
    let root = table.node(ROOT).unwrap();
    let found = node(&table.residents, inode);
    let name = std::ffi::CString::new(inode.to_string()).unwrap();
    table.look_up(found, (ROOT, &root), Some(&name)).unwrap().0
}

fn errno<T>(result: io::Result<T>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

#[test]
fn a_node_lives_until_all_its_lookups_are_forgotten_b60() {
    let table = table(10, 10);
    let number = look_up(&table, 2);
    assert_eq!(look_up(&table, 2), number);
    table.forget(number, 1);
    assert!(table.node(number).is_ok());
    table.forget(number, u64::MAX);
    assert_eq!(errno(table.node(number)), Some(libc::ESTALE));
    table.forget(number, 1);
    assert_ne!(look_up(&table, 2), number, "never used again");
    table.forget(ROOT, u64::MAX);
    assert!(table.node(ROOT).is_ok());
}

#[test]
fn a_handle_serves_its_own_node_only_b60() {
    let table = table(10, 10);
    let handle = table.open(ROOT, File::open("/").unwrap()).unwrap();
    assert!(table.handle(handle, ROOT).is_ok());
    for (number, of) in [(handle, 2), (handle + 1, ROOT), (0, ROOT), (u64::MAX, 0)] {
        assert_eq!(errno(table.handle(number, of)), Some(libc::EBADF));
        assert_eq!(errno(table.close(number, of)), Some(libc::EBADF));
    }
    table.close(handle, ROOT).unwrap();
    assert_eq!(errno(table.close(handle, ROOT)), Some(libc::EBADF));
}

#[test]
fn handles_end_at_the_limit_and_come_back_f44() {
    let table = table(10, 1);
    let handle = table.open(ROOT, File::open("/").unwrap()).unwrap();
    let more = table.open(ROOT, File::open("/").unwrap());
    assert_eq!(errno(more), Some(libc::ENFILE));
    table.close(handle, ROOT).unwrap();
    assert!(table.open(ROOT, File::open("/").unwrap()).is_ok());
}

#[test]
fn a_name_leads_to_the_node_that_had_it_last() {
    let table = table(10, 10);
    let root = table.node(ROOT).unwrap();
    let (one, two) = (look_up(&table, 2), look_up(&table, 3));
    let named = |name| table.named(ROOT, name).map(|(number, _)| number);
    assert_eq!((named(c"2"), named(c"3")), (Some(one), Some(two)));
    table.renamed((ROOT, &root), c"2", (ROOT, &root), c"3", true);
    assert_eq!((named(c"2"), named(c"3")), (Some(two), Some(one)));
    table.renamed((ROOT, &root), c"2", (ROOT, &root), c"3", false);
    assert_eq!((named(c"2"), named(c"3")), (None, Some(two)));
    assert!(table.node(one).unwrap().place().is_none(), "it has no name");
    table.unnamed(ROOT, c"3");
    assert_eq!(named(c"3"), None);
    table.forget(two, 1);
}
