//! Mounts and their options.

use std::path::Path;

use serde_json::{Value, json};

use super::{
    super::plan::{Attributes, MountKind},
    *,
};

fn mount(options: &[&str]) -> Value {
    json!([{"destination": "/m", "type": "bind", "source": "/s", "options": options}])
}

#[test]
fn mount_options_become_attributes() {
    let check = |options: &[&str], own: (u64, u64), recursive: (u64, u64)| {
        let plan = accepted("mounts", mount(options));
        let (Attributes { set, clear }, all) = (
            plan.mounts[0].attributes,
            plan.mounts[0].recursive_attributes,
        );
        assert_eq!(
            ((set, clear), (all.set, all.clear)),
            (own, recursive),
            "{options:?}"
        );
    };
    check(&["rbind", "rprivate"], (0, 0), (0, 0));
    check(&["ro"], (1, 0), (0, 0));
    check(&["rw"], (0, 1), (0, 0));
    check(&["ro", "rw"], (0, 1), (0, 0));
    check(&["rw", "ro"], (1, 0), (0, 0));
    check(&["rro"], (0, 0), (1, 0));
    check(
        &["nosuid", "nodev", "noexec", "nodiratime", "nosymfollow"],
        (0x20_008e, 0),
        (0, 0),
    );
    check(&["noatime"], (0x10, 0x70), (0, 0));
    check(&["noatime", "relatime"], (0, 0x70), (0, 0));
    check(&["rstrictatime", "rnosuid"], (0, 0), (0x22, 0x70));
}

#[test]
fn a_bind_knows_whether_it_is_recursive() {
    let kind = |options: &[&str]| match accepted("mounts", mount(options)).mounts.remove(0).kind {
        MountKind::Bind { recursive, .. } => recursive,
        other => panic!("{other:?}"),
    };
    assert!(kind(&["rbind"]));
    assert!(!kind(&["bind"]));
    assert!(!kind(&[]));
}

#[test]
fn options_of_a_file_system_are_its_own() {
    let tmpfs =
        json!([{"destination": "/m", "type": "tmpfs", "options": ["ro", "size=1k", "huge"]}]);
    match &accepted("mounts", tmpfs).mounts[0].kind {
        MountKind::Filesystem { data, .. } => assert_eq!(
            data,
            &[
                ("size".to_owned(), Some("1k".to_owned())),
                ("huge".to_owned(), None)
            ]
        ),
        other => panic!("{other:?}"),
    }
    refused("mounts", mount(&["size=1k"]), "mounts[0].options");
    refused("mounts", mount(&["a\0"]), "mounts[0].options[0]");
    refused("mounts", mount(&[""]), "mounts[0].options[0]");
    refused("mounts", mount(&["idmap"]), "map of ids");
    for kind in [
        "ext4", "overlay", "virtiofs", "nfs", "", "debugfs", "devtmpfs",
    ] {
        let other = json!([{"destination": "/m", "type": kind, "source": "/s"}]);
        refused("mounts", other, "mounts[0].type");
    }
    let relative = json!([{"destination": "/m", "type": "bind", "source": "s"}]);
    refused("mounts", relative, "mounts[0].source");
}

#[test]
fn a_socket_has_an_absolute_source_and_no_options_ss_21() {
    let judge = |mount: Value| {
        let mount: oci::Mount = serde_json::from_value(mount).unwrap();
        assert!(mount.is_socket() && !mount.is_bind());
        socket("mounts[2]", &mount).map_err(|error| error.to_string())
    };
    let of = |source: &str, options: Value| {
        judge(json!({"destination": "/m", "type": "uds", "source": source, "options": options}))
    };
    let long = format!("/{}", "x/".repeat(2_000));
    assert_eq!(of("/run/s", json!([])), Ok(()));
    assert_eq!(of(&long, json!([])), Ok(()));
    assert_eq!(
        judge(json!({"destination": "/m", "type": "uds", "source": "/s"})),
        Ok(())
    );
    let endless = "/x".repeat(2_048);
    for (source, options, field) in [
        ("/s", json!(["ro"]), "mounts[2].options = [\"ro\"]: "),
        ("/s", json!([""]), "mounts[2].options = "),
        ("s", json!([]), "mounts[2].source = \"s\": "),
        ("", json!([]), "mounts[2].source = nothing: "),
        ("/a\0", json!([]), "mounts[2].source = "),
        (&endless, json!([]), "mounts[2].source = "),
    ] {
        let error = of(source, options).unwrap_err();
        assert!(error.starts_with(field), "{error}");
    }
}

#[test]
fn the_kernels_trees_are_not_covered_b33() {
    let bind = |at: &str| json!([{"destination": at, "type": "bind", "source": "/s"}]);
    for at in [
        "/proc",
        "/proc/",
        "/proc/self/x",
        "/a/../proc/sys",
        "/sys",
        "/dev",
        "proc/../sys/",
        "/",
        "/a/..",
        ".",
        "",
    ] {
        refused("mounts", bind(at), "mounts[0].destination");
    }
    for at in [
        "/proc/meminfo",
        "/sys/fs/cgroup",
        "/dev/shm",
        "/proceed",
        "/processes/x",
    ] {
        accepted("mounts", bind(at));
    }
    let at = |kind: &str, at: &str| json!([{"destination": at, "type": kind}]);
    accepted("mounts", at("proc", "/proc"));
    accepted("mounts", at("tmpfs", "/dev"));
    refused("mounts", at("tmpfs", "/proc"), "only proc goes there");
    refused("mounts", at("tmpfs", "/sys"), "only sysfs goes there");
}

#[test]
fn mounts_are_private_only_b34_fs_28() {
    for option in ["shared", "rshared"] {
        refused("mounts", mount(&["rbind", option]), "mounts[0].options[1]");
    }
    for option in ["slave", "rslave"] {
        noted(
            "mounts",
            mount(&["rbind", option]),
            "later mounts of the host",
        );
    }
    refused("linux/rootfsPropagation", json!("rshared"), "do not pass");
    refused("linux/rootfsPropagation", json!("x"), "not a propagation");
    for private in ["rprivate", "rslave", ""] {
        accepted("linux/rootfsPropagation", json!(private));
    }
}

#[test]
fn a_relative_destination_is_below_the_root() {
    let relative = json!([{"destination": "a/b", "type": "tmpfs"}]);
    assert_eq!(
        accepted("mounts", relative).mounts[0].destination,
        Path::new("/a/b")
    );
}

#[test]
fn a_tmpfs_may_begin_with_a_copy_of_what_it_covers() {
    let of = |kind: &str| json!([{"destination": "/etc", "type": kind, "source": "/s", "options": ["nosuid", "tmpcopyup"]}]);
    let plan = accepted("mounts", of("tmpfs"));
    assert!(matches!(
        plan.mounts[0].kind,
        MountKind::Filesystem { copy_up: true, .. }
    ));
    refused("mounts", of("ramfs"), "tmpcopyup");
    refused("mounts", of("bind"), "tmpcopyup");
}

#[test]
fn a_map_of_ids_is_the_mounts_own_or_the_containers_fs_30() {
    let ids = |host_id| oci::IdMapping {
        container_id: 0,
        host_id,
        size: 9,
    };
    let take = |options: &[&str], own: &[oci::IdMapping], users: &[oci::IdMapping]| {
        let mut mount = oci::Mount {
            options: options.iter().map(ToString::to_string).collect(),
            uid_mappings: own.to_vec(),
            gid_mappings: own.to_vec(),
            ..oci::Mount::default()
        };
        let taken = take_id_map("mounts[7]", &mut mount, (users, users));
        assert!(mount.uid_mappings.is_empty() && mount.gid_mappings.is_empty());
        assert!(!mount.options.iter().any(|option| option.ends_with("idmap")));
        taken
    };
    let of = |options: &[&str], own: &[oci::IdMapping], users: &[oci::IdMapping]| {
        let taken = take(options, own, users).unwrap();
        taken.map(|ids| (ids.uids[0].guest_id, ids.gids[0].guest_id, ids.recursive))
    };
    assert_eq!(of(&["ro"], &[], &[ids(1)]), None);
    assert_eq!(of(&["ro"], &[ids(5)], &[ids(1)]), Some((5, 5, false)));
    assert_eq!(of(&["idmap"], &[ids(5)], &[]), Some((5, 5, false)));
    assert_eq!(of(&["ridmap", "ro"], &[], &[ids(1)]), Some((1, 1, true)));
    let error =
        |options: &[&str], own: &[oci::IdMapping]| take(options, own, &[]).unwrap_err().to_string();
    assert!(error(&["ridmap"], &[]).starts_with("mounts[7].options = \"ridmap\": "));
    let empty = oci::IdMapping { size: 0, ..ids(1) };
    assert!(error(&[], &[empty]).starts_with("mounts[7].uidMappings[0].size = 0: "));
    // The guest has none to give: a tmpfs with a map is refused.
    let tmpfs = json!([{"destination": "/m", "type": "tmpfs", "uidMappings": [{"size": 1}]}]);
    refused("mounts", tmpfs, "mounts[0].uidMappings");
}
