use std::os::unix::net::UnixListener;

use super::*;

/// Runs a test in a mount namespace of its own; needs root.
fn in_namespace(test: impl FnOnce(&Path) + Send) {
    let dir = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            enter_private_namespace().unwrap();
            test(dir.path());
        });
    });
}

fn id() -> ContainerId {
    ContainerId::new("c1").unwrap()
}

fn mounts_below(dir: &Path) -> usize {
    let text = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    text.lines()
        .filter(|line| {
            line.split(' ')
                .nth(4)
                .is_some_and(|path| Path::new(path).starts_with(dir))
        })
        .count()
}

fn volume(source: PathBuf, read_only: bool) -> Volume {
    Volume {
        source,
        destination: "/data".into(),
        recursive: true,
        read_only,
        ids: None,
    }
}

#[test]
fn a_container_sees_its_root_and_volumes_and_leaves_nothing_fs_02_fs_13() {
    in_namespace(|dir| {
        let top = dir.join("share");
        let bundle = dir.join("bundle");
        fs::create_dir_all(bundle.join("rootfs/bin")).unwrap();
        fs::create_dir(&top).unwrap();
        fs::create_dir(dir.join("data")).unwrap();
        fs::write(dir.join("hosts"), "127.0.0.1").unwrap();
        let share = Share::mount(&top).unwrap();
        let root = Source::new(&[], &bundle, Path::new("rootfs")).unwrap();
        let volumes = [
            volume(dir.join("data"), true),
            volume(dir.join("hosts"), false),
        ];
        let files = share.add(&id(), &root, &volumes).unwrap();
        assert!(top.join("c1/rootfs/bin").is_dir());
        assert_eq!(
            fs::read_to_string(top.join("c1/volumes/1")).unwrap(),
            "127.0.0.1"
        );
        let error = fs::write(top.join("c1/volumes/0/x"), "").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EROFS));
        fs::write(top.join("c1/volumes/1"), "in place").unwrap();
        assert_eq!(fs::read_to_string(dir.join("hosts")).unwrap(), "in place");
        assert_eq!(mounts_below(&top), 4);
        // The same id again is refused while it lives.
        assert!(share.add(&id(), &root, &[]).is_err());
        drop(files);
        assert_eq!(mounts_below(&top), 1);
        assert_eq!(fs::read_dir(&top).unwrap().count(), 0);
        drop(share.add(&id(), &root, &[]).unwrap());
        drop(share);
        assert_eq!(mounts_below(&top), 0);
    });
}

#[test]
fn a_volume_shows_other_ids_than_those_on_disk_fs_30() {
    use bulkhead_agent_api::spec::plan::{IdMap, MountIds};
    in_namespace(|dir| {
        let work = dir.join("work");
        fs::create_dir(&work).unwrap();
        rustix::mount::mount("t", &work, "tmpfs", MountFlags::empty(), None).unwrap();
        let (top, data) = (dir.join("share"), work.join("data"));
        for path in [&dir.join("rootfs"), &top, &data] {
            fs::create_dir(path).unwrap();
        }
        std::os::unix::fs::chown(&data, Some(1000), Some(2000)).unwrap();
        let share = Share::mount(&top).unwrap();
        let root = Source::new(&[], dir, Path::new("rootfs")).unwrap();
        let map = |container_id| {
            vec![IdMap {
                container_id,
                guest_id: 7,
                size: 3,
            }]
        };
        let mapped = |source: PathBuf, recursive| Volume {
            ids: Some(MountIds {
                uids: map(1000),
                gids: map(2000),
                recursive,
            }),
            ..volume(source, false)
        };
        let files = share
            .add(&id(), &root, &[mapped(data.clone(), false)])
            .unwrap();
        let place = top.join("c1/volumes/0");
        let owner = |path: &Path| {
            let stat = rustix::fs::stat(path).unwrap();
            (stat.st_uid, stat.st_gid)
        };
        assert_eq!((owner(&data), owner(&place)), ((1000, 2000), (7, 7)));
        std::os::unix::fs::chown(&place, Some(8), Some(9)).unwrap();
        assert_eq!((owner(&data), owner(&place)), ((1001, 2002), (8, 9)));
        // Nobody is there for an id that has no place in the map.
        let error = std::os::unix::fs::chown(&place, Some(99), None).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EOVERFLOW));
        drop(files);
        // A file system that allows none says so in a sentence.
        let other = work.join("other");
        fs::create_dir(&other).unwrap();
        rustix::mount::mount("r", &other, "ramfs", MountFlags::empty(), None).unwrap();
        let error = share
            .add(&id(), &root, &[mapped(other, false)])
            .unwrap_err();
        assert!(
            error.text().contains("allows no map of ids"),
            "{}",
            error.text()
        );
        assert_eq!(fs::read_dir(&top).unwrap().count(), 0);
    });
}

#[test]
fn an_overlay_of_many_layers_is_mounted_in_one_piece_fs_05_fs_07() {
    in_namespace(|dir| {
        // The upper directory cannot lie on an overlay, as /tmp may.
        let work = dir.join("work");
        fs::create_dir(&work).unwrap();
        rustix::mount::mount("t", &work, "tmpfs", MountFlags::empty(), None).unwrap();
        let top = dir.join("share");
        fs::create_dir(&top).unwrap();
        let mut lower = Vec::new();
        for number in 0..40 {
            let layer = work.join(format!("layer-{number}"));
            fs::create_dir(&layer).unwrap();
            fs::write(layer.join(format!("file-{number}")), "").unwrap();
            lower.push(layer.display().to_string());
        }
        for name in ["upper", "w"] {
            fs::create_dir(work.join(name)).unwrap();
        }
        let mount = containerd_shim_protos::api::Mount {
            type_: "overlay".into(),
            source: "overlay".into(),
            options: vec![
                "index=off".into(),
                format!("workdir={}", work.join("w").display()),
                format!("upperdir={}", work.join("upper").display()),
                format!("lowerdir={}", lower.join(":")),
            ],
            ..Default::default()
        };
        let share = Share::mount(&top).unwrap();
        let root = Source::new(&[mount], dir, Path::new("rootfs")).unwrap();
        let files = share.add(&id(), &root, &[]).unwrap();
        assert!(top.join("c1/rootfs/file-39").exists());
        fs::write(top.join("c1/rootfs/new"), "x").unwrap();
        assert_eq!(fs::read_to_string(work.join("upper/new")).unwrap(), "x");
        drop(files);
        assert_eq!(mounts_below(&top), 1);
    });
}

#[test]
fn sockets_fifos_devices_and_kernel_files_are_refused_b32() {
    in_namespace(|dir| {
        let top = dir.join("share");
        fs::create_dir(&top).unwrap();
        fs::create_dir(dir.join("rootfs")).unwrap();
        let _listener = UnixListener::bind(dir.join("socket")).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, dir.join("fifo"), rustix::fs::Mode::RUSR).unwrap();
        let share = Share::mount(&top).unwrap();
        let root = Source::new(&[], dir, Path::new("rootfs")).unwrap();
        for source in [
            dir.join("socket"),
            dir.join("fifo"),
            "/dev/null".into(),
            "/proc".into(),
            "/sys".into(),
        ] {
            let error = share
                .add(&id(), &root, &[volume(source.clone(), false)])
                .unwrap_err();
            assert_eq!(error.code(), ttrpc::Code::INVALID_ARGUMENT, "{error}");
            assert!(
                error.to_string().contains(&source.display().to_string()),
                "{error}"
            );
        }
        let error = share
            .add(&id(), &root, &[volume(dir.join("missing"), false)])
            .unwrap_err();
        assert_eq!(error.code(), ttrpc::Code::NOT_FOUND);
        // Every refusal took back what was put up before it.
        assert_eq!(fs::read_dir(&top).unwrap().count(), 0);
        assert_eq!(mounts_below(&top), 1);
    });
}

#[test]
fn a_bind_of_an_empty_directory_is_a_plain_root_b21() {
    in_namespace(|dir| {
        let top = dir.join("share");
        let empty = dir.join("empty");
        fs::create_dir(&top).unwrap();
        fs::create_dir(&empty).unwrap();
        let mount = containerd_shim_protos::api::Mount {
            type_: "bind".into(),
            source: empty.display().to_string(),
            options: vec!["ro".into(), "rbind".into()],
            ..Default::default()
        };
        let share = Share::mount(&top).unwrap();
        let root = Source::new(&[mount], dir, Path::new("rootfs")).unwrap();
        let _files = share.add(&id(), &root, &[]).unwrap();
        let error = fs::write(top.join("c1/rootfs/x"), "").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EROFS));
    });
}

#[test]
fn what_the_host_mounts_later_below_a_volume_does_not_arrive_b34() {
    in_namespace(|dir| {
        // A mount that tells others what is mounted in it, as those of a host do.
        let host = dir.join("host");
        fs::create_dir(&host).unwrap();
        rustix::mount::mount("t", &host, "tmpfs", MountFlags::empty(), None).unwrap();
        mount_change(&host, MountPropagationFlags::SHARED).unwrap();
        let (volumes, bundle) = (host.join("volume"), host.join("bundle"));
        for path in [volumes.join("later"), volumes.join("before")] {
            fs::create_dir_all(path).unwrap();
        }
        fs::create_dir_all(bundle.join("rootfs/later")).unwrap();
        let before = volumes.join("before");
        rustix::mount::mount("t", &before, "tmpfs", MountFlags::empty(), None).unwrap();
        let top = dir.join("share");
        fs::create_dir(&top).unwrap();
        let share = Share::mount(&top).unwrap();
        let root = Source::new(&[], &bundle, Path::new("rootfs")).unwrap();
        let flat = Volume {
            recursive: false,
            ..volume(volumes.clone(), true)
        };
        let _files = share
            .add(&id(), &root, &[volume(volumes.clone(), true), flat])
            .unwrap();
        let mounts = mounts_below(&top);
        for later in [volumes.join("later"), bundle.join("rootfs/later")] {
            rustix::mount::mount("t", &later, "tmpfs", MountFlags::empty(), None).unwrap();
            fs::write(later.join("on the host"), "").unwrap();
        }
        assert_eq!(mounts_below(&top), mounts);
        for place in [
            "c1/volumes/0/later",
            "c1/volumes/1/later",
            "c1/rootfs/later",
        ] {
            assert!(!top.join(place).join("on the host").exists(), "{place}");
        }
        // What was there before is as inert as the rest.
        for place in [
            "c1/volumes/0/later",
            "c1/volumes/0/before",
            "c1/volumes/1/before",
        ] {
            let error = fs::write(top.join(place).join("x"), "").unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EROFS), "{place}");
        }
    });
}
