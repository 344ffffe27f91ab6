//! What a container sees and may do, told by programs inside it.

use std::os::unix::fs::PermissionsExt;

use bulkhead_agent_api::agent::Stdio;
use rustix::process::getpriority_process;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;

use crate::support::{Host, block_on, busybox_spec, output, refusal};

fn add_mount(spec: &mut Value, mount: Value) {
    spec["mounts"].as_array_mut().unwrap().push(mount);
}

#[test]
fn a_container_has_namespaces_of_its_own_ta_28() {
    block_on(async |host: &mut Host| {
        let script = "echo $$; hostname; grep 0: /proc/self/cgroup | head -n1; pwd";
        let seen = output(host, script, |spec| {
            spec["hostname"] = "inside".into();
            spec["process"]["cwd"] = "/made/for/it".into();
        })
        .await;
        assert!(seen.starts_with("1\ninside\n"), "{seen}");
        assert!(seen.ends_with(":/\n/made/for/it\n"), "{seen}");
    });
}

#[test]
fn ids_groups_capabilities_and_umask_are_those_of_the_specification() {
    block_on(async |host: &mut Host| {
        let script =
            "id -u; id -g; id -G; umask; echo $HOME; grep -E 'Cap|NoNew' /proc/self/status";
        let seen = output(host, script, |spec| {
            spec["process"]["user"] =
                json!({"uid": 1000, "gid": 1000, "additionalGids": [5, 1000], "umask": 0o27});
            spec["process"]["capabilities"] = json!({
                "bounding": ["CAP_NET_RAW", "CAP_KILL"], "permitted": ["CAP_KILL"],
                "inheritable": ["CAP_KILL"], "effective": ["CAP_KILL"], "ambient": ["CAP_KILL"]
            });
        })
        .await;
        let expected = "1000\n1000\n1000 5\n0027\n/home/user\n\
            CapInh:\t0000000000000020\nCapPrm:\t0000000000000020\nCapEff:\t0000000000000020\n\
            CapBnd:\t0000000000002020\nCapAmb:\t0000000000000020\nNoNewPrivs:\t1\n";
        assert_eq!(seen, expected);
    });
}

#[test]
fn devices_and_their_links_are_there_and_no_others_can_be_used() {
    block_on(async |host: &mut Host| {
        let script =
            "for d in null zero full random urandom tty; do stat -c '%n %F %t:%T %a' /dev/$d; done
            for l in fd stdin stdout stderr ptmx; do readlink /dev/$l; done
            head -c 4 /dev/zero | od -An -tx1
            mknod /dev/mem c 1 1 && ! cat /dev/mem 2>/dev/null && echo denied";
        let seen = output(host, script, |_| {}).await;
        let expected = "/dev/null character special file 1:3 666\n\
            /dev/zero character special file 1:5 666\n\
            /dev/full character special file 1:7 666\n\
            /dev/random character special file 1:8 666\n\
            /dev/urandom character special file 1:9 666\n\
            /dev/tty character special file 5:0 666\n\
            /proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n/proc/self/fd/2\npts/ptmx\n \
            00 00 00 00\ndenied\n";
        assert_eq!(seen, expected);
    });
}

#[test]
fn mounts_have_their_options_and_masked_paths_show_nothing_b15_fs_19() {
    block_on(async |host: &mut Host| {
        let source = host.directory.path().join("volume");
        std::fs::create_dir_all(source.join("sub")).unwrap();
        std::fs::write(source.join("file"), "from outside\n").unwrap();
        let script = "cat /data/file /one
            touch /data/x 2>/dev/null || echo read-only
            touch /rw/sub/new && echo writable
            cat /proc/timer_list | wc -c; ls /sys/firmware | wc -l
            echo 1 2>/dev/null > /proc/sys/kernel/ns_last_pid || echo ro-sys
            touch /root-file 2>/dev/null || echo ro-root
            grep -E ' /(data|tmp|dev/shm) ' /proc/mounts | tr ' ' '\\n' | grep -E '^/|rw|ro'";
        let seen = output(host, script, |spec| {
            let source = source.to_str().unwrap();
            add_mount(
                spec,
                json!({"destination": "/data", "type": "bind", "source": source,
                "options": ["rbind", "ro", "nosuid", "rprivate"]}),
            );
            add_mount(
                spec,
                json!({"destination": "/rw/", "source": source, "options": ["bind"]}),
            );
            add_mount(
                spec,
                json!({"destination": "/one", "type": "bind",
                "source": format!("{source}/file"), "options": ["bind", "rro"]}),
            );
            add_mount(
                spec,
                json!({"destination": "/tmp", "type": "tmpfs",
                "options": ["ro", "noexec", "size=1m"]}),
            );
            spec["root"]["readonly"] = true.into();
        })
        .await;
        assert!(
            seen.starts_with(
                "from outside\nfrom outside\nread-only\nwritable\n0\n0\nro-sys\nro-root\n"
            ),
            "{seen}"
        );
        assert!(seen.contains("/dev/shm\nrw,nosuid,nodev,noexec"), "{seen}");
        assert!(seen.contains("/data\nro,nosuid"), "{seen}");
        assert!(seen.contains("/tmp\nro,noexec"), "{seen}");
        assert!(source.join("sub/new").exists());
    });
}

#[test]
fn a_tmpfs_has_the_mode_of_what_it_covers_unless_told_another() {
    block_on(async |host: &mut Host| {
        for (name, mode) in [("private", 0o710), ("sticky", 0o1777), ("told", 0o700)] {
            let directory = host.rootfs.join(name);
            std::fs::create_dir(&directory).unwrap();
            std::fs::set_permissions(&directory, PermissionsExt::from_mode(mode)).unwrap();
        }
        let script = "stat -c %a /private /sticky /told /missing";
        let seen = output(host, script, |spec| {
            for at in ["/private", "/sticky", "/missing"] {
                add_mount(spec, json!({"destination": at, "type": "tmpfs"}));
            }
            let told = json!({"destination": "/told", "type": "tmpfs", "options": ["mode=751"]});
            add_mount(spec, told);
        })
        .await;
        assert_eq!(seen, "710\n1777\n751\n1777\n");
    });
}

#[test]
fn links_of_an_image_never_lead_out_of_its_root_b30_b35() {
    use std::os::unix::fs::symlink;
    block_on(async |host: &mut Host| {
        let outside = host.directory.path().join("outside");
        std::fs::create_dir(&outside).unwrap();
        let root = &host.rootfs;
        symlink(&outside, root.join("absolute")).unwrap();
        symlink("../../../../../../../../etc", root.join("climbing")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        std::fs::create_dir(root.join("run")).unwrap();
        std::fs::create_dir(root.join("var")).unwrap();
        symlink("/run", root.join("var/run")).unwrap();
        let tmpfs = |at: &str| json!({"destination": at, "type": "tmpfs", "source": "tmpfs"});

        let seen = output(
            host,
            "grep -c ' /run/x ' /proc/mounts; grep -c ' /etc/y ' /proc/mounts",
            |spec| {
                add_mount(spec, tmpfs("/var/run/x"));
                add_mount(spec, tmpfs("/climbing/y"));
            },
        )
        .await;
        assert_eq!(seen, "1\n1\n");

        let mut spec = busybox_spec(["true"]);
        add_mount(&mut spec, tmpfs("/loop/x"));
        let text = refusal(host, spec).await;
        assert!(
            text.contains("/loop/x") && text.contains("os error 40"),
            "{text}"
        );

        // A link to what is not there names a place inside the root.
        let inside = format!("{}/x", outside.display());
        let script = format!("grep -c ' {inside} ' /proc/mounts; cat /linked");
        std::fs::write(host.directory.path().join("one"), "bound\n").unwrap();
        symlink("/not/there", root.join("linked")).unwrap();
        let seen = output(host, &script, |spec| {
            add_mount(spec, tmpfs("/absolute/x"));
            let one = host.directory.path().join("one");
            let one = json!({"destination": "/linked", "type": "bind", "source": one,
                "options": ["bind"]});
            add_mount(spec, one);
        })
        .await;
        assert_eq!(seen, "1\nbound\n");
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);

        std::fs::remove_dir(root.join("proc")).unwrap();
        symlink("/tmp", root.join("proc")).unwrap();
        let text = refusal(host, busybox_spec(["true"])).await;
        assert!(text.contains("/proc"), "{text}");
    });
}

/// A filter that answers EPERM to mkdir and mkdirat and allows all else.
fn no_mkdir() -> Vec<u8> {
    let instruction = |code: u16, yes: u8, no: u8, k: u32| {
        let mut bytes = code.to_le_bytes().to_vec();
        bytes.extend([yes, no]);
        bytes.extend(k.to_le_bytes());
        bytes
    };
    let number = |number: i64| u32::try_from(number).unwrap();
    [
        instruction(0x20, 0, 0, 0),
        instruction(0x15, 1, 0, number(libc::SYS_mkdir)),
        instruction(0x15, 0, 1, number(libc::SYS_mkdirat)),
        instruction(0x06, 0, 0, 0x0005_0000 | libc::EPERM.unsigned_abs()),
        instruction(0x06, 0, 0, 0x7fff_0000),
    ]
    .concat()
}

#[test]
fn the_system_call_filter_holds_for_the_container_and_its_execs() {
    block_on(async |host: &mut Host| {
        for no_new_privileges in [true, false] {
            let script =
                "mkdir /tmp/$$ 2>/dev/null || grep Seccomp: /proc/self/status; exec sleep 99";
            let mut spec = busybox_spec(["sh", "-c", script]);
            spec["process"]["noNewPrivileges"] = no_new_privileges.into();
            let process = {
                let script = "mkdir /tmp/$$ 2>/dev/null || grep Seccomp: /proc/self/status";
                let mut process = busybox_spec(["sh", "-c", script])["process"].clone();
                process["noNewPrivileges"] = no_new_privileges.into();
                process
            };
            let (stdio, [_in, mut stdout, _err]) = host.pipes().await;
            let id = host.create_filtered(spec, stdio, no_mkdir()).await.unwrap();
            host.start_container(&id).await.unwrap();
            let mut line = [0; 11];
            stdout.read_exact(&mut line).await.unwrap();
            assert_eq!(&line, b"Seccomp:\t2\n");
            assert_eq!(host.run_exec(&id, &process).await.stdout, "Seccomp:\t2\n");
            host.kill(&id, "", 9).await.unwrap();
            host.wait(&id, "").await.unwrap();
            host.delete(&id, "").await.unwrap();
        }
    });
}

#[test]
fn a_user_namespace_maps_ids_and_an_exec_joins_it() {
    block_on(async |host: &mut Host| {
        // The tree belongs to the container's root.
        let owner = format!("{}:{}", 100_000, 100_000);
        let chown = std::process::Command::new("chown")
            .args(["-R", &owner])
            .arg(&host.rootfs)
            .status()
            .unwrap();
        assert!(chown.success());
        std::fs::set_permissions(host.directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let script = "id -u; head -c 21 /proc/self/uid_map | tr -s ' '; echo; touch /new;
            stat -c %u /new; echo > /dev/null && echo null; exec sleep 100";
        let mut spec = busybox_spec(["sh", "-c", script]);
        spec["linux"]["namespaces"]
            .as_array_mut()
            .unwrap()
            .push(json!({"type": "user"}));
        let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
        spec["linux"]["uidMappings"] = map.clone();
        spec["linux"]["gidMappings"] = map;
        let (stdio, [_in, mut stdout, mut stderr]) = host.pipes().await;
        let id = host.create(spec, stdio).await.unwrap();
        host.start_container(&id).await.unwrap();
        let process = busybox_spec([
            "sh",
            "-c",
            "id -u; readlink /proc/self/ns/user; echo again > /dev/stdout",
        ])["process"]
            .clone();
        let ran = host.run_exec(&id, &process).await;
        let ours = std::fs::read_link("/proc/self/ns/user").unwrap();
        assert!(
            ran.stdout.starts_with("0\nuser:"),
            "{} {}",
            ran.stdout,
            ran.stderr
        );
        assert!(!ran.stdout.contains(ours.to_str().unwrap()));
        // All of it before the end, which would cut it.
        const EXPECTED: &str = "0\n 0 100000\n0\nnull\n";
        let mut out = [0; EXPECTED.len()];
        stdout.read_exact(&mut out).await.unwrap();
        assert_eq!(str::from_utf8(&out), Ok(EXPECTED));
        host.kill(&id, "", 9).await.unwrap();
        host.wait(&id, "").await.unwrap();
        host.delete(&id, "").await.unwrap();
        let mut err = String::new();
        stderr.read_to_string(&mut err).await.unwrap();
        assert_eq!(err, "");
    });
}

#[test]
fn a_container_can_share_another_ones_namespaces() {
    block_on(async |host: &mut Host| {
        let id = host
            .create(busybox_spec(["sleep", "100"]), Stdio::default())
            .await
            .unwrap();
        host.start_container(&id).await.unwrap();
        let pid = host.pids(&id).await[0];
        let seen = output(host, "ps | grep -c 'sleep 100'; echo $$", |spec| {
            for (n, kind) in ["pid", "ipc", "uts"].into_iter().enumerate() {
                spec["linux"]["namespaces"][n]["path"] = format!("/proc/{pid}/ns/{kind}").into();
            }
        })
        .await;
        assert!(
            !seen.starts_with("0\n") && !seen.ends_with("\n1\n"),
            "{seen}"
        );
        host.kill(&id, "", 9).await.unwrap();
        host.wait(&id, "").await.unwrap();
        host.delete(&id, "").await.unwrap();
    });
}

#[test]
fn a_container_that_takes_too_much_memory_is_killed_and_says_so_f56() {
    block_on(async |host: &mut Host| {
        if !host.has_controller("memory") {
            return;
        }
        let script = "cat /sys/fs/cgroup/memory.max; dd if=/dev/zero of=/dev/null bs=64M; exit $?";
        let mut spec = busybox_spec(["sh", "-c", script]);
        spec["linux"]["resources"]["memory"] = json!({"limit": 16 << 20, "swap": 16 << 20});
        let ran = host.run(spec).await;
        assert_eq!(
            (ran.status, &*ran.stdout),
            (137, "16777216\n"),
            "{}",
            ran.stderr
        );
        assert!(ran.oom_killed);
        assert!(!host.run(busybox_spec(["true"])).await.oom_killed);
    });
}

#[test]
fn an_oom_kill_is_told_while_the_container_lives_lc_77() {
    block_on(async |host: &mut Host| {
        if !host.has_controller("memory") {
            return;
        }
        let mut spec = busybox_spec(["sleep", "1000"]);
        spec["linux"]["resources"]["memory"] = json!({"limit": 16 << 20, "swap": 16 << 20});
        let id = host.create(spec, Stdio::default()).await.unwrap();
        host.start_container(&id).await.unwrap();
        let mut news = std::pin::pin!(host.wait_oom(&id, 0));
        assert!(futures::poll!(&mut news).is_pending());
        let script = "dd if=/dev/zero of=/dev/null bs=64M; exit $?";
        let process = json!({"args": ["sh", "-c", script], "cwd": "/", "env": ["PATH=/bin"]});
        let ran = host.run_exec(&id, &process).await;
        assert!(ran.oom_killed);
        let kills = news.await.unwrap();
        assert!(kills >= 1);
        // The end of the container ends whoever waits for more.
        let more = host.wait_oom(&id, u64::MAX);
        let (more, killed) = tokio::join!(more, host.kill(&id, "", 9));
        killed.unwrap();
        assert!(more.is_err());
        host.wait(&id, "").await.unwrap();
        host.delete(&id, "").await.unwrap();
    });
}

#[test]
fn a_fork_bomb_stops_at_the_limit_and_can_be_killed_f58() {
    block_on(async |host: &mut Host| {
        if !host.has_controller("pids") {
            return;
        }
        let mut spec = busybox_spec(["sh", "-c", "b() { b | b & b; }; b 2>/dev/null; sleep 100"]);
        spec["linux"]["resources"]["pids"] = json!({"limit": 32});
        let id = host.create(spec, Stdio::default()).await.unwrap();
        host.start_container(&id).await.unwrap();
        host.kill_all(&id, 9).await.unwrap();
        assert_eq!(host.wait(&id, "").await.unwrap().exit_status, 137);
        host.delete(&id, "").await.unwrap();
    });
}

#[test]
fn limits_are_in_force_inside_and_bad_ones_are_refused_b11() {
    block_on(async |host: &mut Host| {
        if !host.has_controller("cpu") || !host.has_controller("cpuset") {
            return;
        }
        let seen = output(
            host,
            "cd /sys/fs/cgroup; cat cpu.max cpu.weight cpuset.cpus",
            |spec| {
                spec["linux"]["resources"]["cpu"] =
                    json!({"quota": 50_000, "period": 100_000, "shares": 1024, "cpus": "0"});
            },
        )
        .await;
        // The processors that a set names are the host's: the guest has others.
        assert_eq!(seen, "50000 100000\n100\n\n");
        let mut spec = busybox_spec(["true"]);
        spec["linux"]["resources"]["cpu"] = json!({"quota": 1});
        let text = refusal(host, spec).await;
        assert!(
            text.contains("cpu.max") || text.contains("cpu.quota"),
            "{text}"
        );
    });
}

#[test]
fn a_tmpfs_may_begin_with_what_it_covers() {
    block_on(async |host: &mut Host| {
        let etc = host.rootfs.join("etc");
        std::fs::write(etc.join("motd"), "from the image\n").unwrap();
        std::os::unix::fs::symlink("/nowhere", etc.join("link")).unwrap();
        std::fs::set_permissions(&etc, std::fs::Permissions::from_mode(0o751)).unwrap();
        let script = "cat /etc/motd; stat -c %a /etc; readlink /etc/link
            echo changed >/etc/motd; cat /etc/motd; grep -c ' /etc tmpfs ' /proc/mounts";
        let seen = output(host, script, |spec| {
            add_mount(
                spec,
                json!({"destination": "etc", "type": "tmpfs", "options": ["tmpcopyup"]}),
            );
        })
        .await;
        assert_eq!(seen, "from the image\n751\n/nowhere\nchanged\n1\n");
        let image = std::fs::read_to_string(etc.join("motd")).unwrap();
        assert_eq!(image, "from the image\n");
    });
}

#[test]
fn a_time_namespace_is_the_containers_and_its_execs() {
    block_on(async |host: &mut Host| {
        let script = "read -r up rest </proc/uptime; test ${up%.*} -ge 1000000000";
        let process = |script: &str| {
            let mut process = busybox_spec(["sh", "-c", script])["process"].clone();
            process["cwd"] = "/".into();
            process
        };
        let mut spec = busybox_spec(["sh", "-c", &format!("{script} && exec sleep 100")]);
        spec["linux"]["namespaces"]
            .as_array_mut()
            .unwrap()
            .push(json!({"type": "time"}));
        spec["linux"]["timeOffsets"] = json!({"boottime": {"secs": 1_000_000_000}});
        let id = host.create(spec, Stdio::default()).await.unwrap();
        host.start_container(&id).await.unwrap();
        for (exec_id, script, status) in [("far", script, 0), ("near", "exit 9", 9)] {
            host.exec(&id, exec_id, &process(script), Stdio::default())
                .await
                .unwrap();
            let seen = host.wait(&id, exec_id).await.unwrap().exit_status;
            assert_eq!(seen, status, "{script}");
        }
        // Its own shell has found the same, or it would have ended.
        host.kill(&id, "", 9).await.unwrap();
        assert_eq!(host.wait(&id, "").await.unwrap().exit_status, 137);
        host.delete(&id, "").await.unwrap();
        let seen = output(host, &format!("{script} || echo near"), |_| {}).await;
        assert_eq!(seen, "near\n");
    });
}

#[test]
fn scheduling_is_that_of_the_specification() {
    block_on(async |host: &mut Host| {
        // Fields 19 and 41 (proc(5)), counted from the third.
        let script = "read -r line </proc/self/stat; set -- ${line##*) }; echo ${17} ${39}";
        // Who is scheduled by priorities keeps what it had from its parents.
        let ours = getpriority_process(None).unwrap();
        for (scheduler, expected) in [
            (
                json!({"policy": "SCHED_OTHER", "nice": 7}),
                "7 0\n".to_owned(),
            ),
            (
                json!({"policy": "SCHED_BATCH", "nice": -3}),
                "-3 3\n".to_owned(),
            ),
            (
                json!({"policy": "SCHED_FIFO", "priority": 5}),
                format!("{ours} 1\n"),
            ),
        ] {
            let seen = output(host, script, |s| s["process"]["scheduler"] = scheduler).await;
            assert_eq!(seen, expected);
        }
    });
}

#[test]
fn the_personality_is_that_of_the_container_for_its_execs_too() {
    block_on(async |host: &mut Host| {
        let mut spec = busybox_spec(["sleep", "100"]);
        spec["linux"]["personality"] = json!({"domain": "LINUX32"});
        let id = host.create(spec, Stdio::default()).await.unwrap();
        host.start_container(&id).await.unwrap();
        let process = busybox_spec(["busybox", "uname", "-m"])["process"].clone();
        let ran = host.run_exec(&id, &process).await;
        assert_eq!((&*ran.stdout, &*ran.stderr), ("i686\n", ""));
        host.kill(&id, "", 9).await.unwrap();
        host.wait(&id, "").await.unwrap();
        host.delete(&id, "").await.unwrap();
    });
}
