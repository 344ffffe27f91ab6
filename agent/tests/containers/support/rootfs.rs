//! A root of busybox to make containers of.

use std::{fs, os::unix::fs::symlink, path::Path, process::Command};

pub(super) fn make(rootfs: &Path) {
    for directory in ["bin", "etc", "proc", "sys", "dev", "tmp", "home/user"] {
        fs::create_dir_all(rootfs.join(directory)).unwrap();
    }
    install_busybox(rootfs);
    for name in [
        "sh",
        "cat",
        "echo",
        "hostname",
        "id",
        "ls",
        "sleep",
        "stat",
        "mount",
        "head",
        "grep",
        "stty",
        "env",
        "dd",
        "sha256sum",
        "touch",
        "mknod",
        "mkdir",
        "seq",
        "ps",
        "tr",
        "readlink",
        "test",
        "true",
        "umount",
        "od",
        "wc",
        "kill",
        "ulimit",
        "sort",
        "tty",
        "ip",
        "yes",
    ] {
        symlink("busybox", rootfs.join("bin").join(name)).unwrap();
    }
    let passwd = "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n";
    fs::write(rootfs.join("etc/passwd"), passwd).unwrap();
}

/// With the libraries that it needs, if it is not a static one.
fn install_busybox(rootfs: &Path) {
    const BUSYBOX: &str = "/bin/busybox";
    fs::copy(BUSYBOX, rootfs.join("bin/busybox")).expect("busybox is installed");
    let Ok(list) = Command::new("ldd").arg(BUSYBOX).output() else {
        return;
    };
    let list = String::from_utf8(list.stdout).unwrap();
    for library in list.split_whitespace().filter(|word| word.starts_with('/')) {
        let to = rootfs.join(library.trim_start_matches('/'));
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(library, to).unwrap();
    }
}
