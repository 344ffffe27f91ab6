//! Real containers, made by the real service over a socket pair.
//!
//! Owns the proof that a container is what its specification says, seen from
//! inside. Standard streams are Unix connections here instead of vsock ones;
//! all else is as in a guest. Needs root, a cgroup v2 mount (with or without
//! controllers) and busybox: without the first two each test says so and
//! passes.
//!
//! One test makes containers at a time: the agent collects the exits of all
//! children of its process.

mod support;

use std::os::unix::fs::PermissionsExt;

use bulkhead_agent_api::agent::Stdio;
use serde_json::{Value, json};
use support::{Host, block_on, busybox_spec};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// What `script` prints in a container whose specification `change` has edited.
async fn output(host: &Host, script: &str, change: impl FnOnce(&mut Value)) -> String {
    let mut spec = busybox_spec(["sh", "-c", script]);
    change(&mut spec);
    let ran = host.run(spec).await;
    assert_eq!(
        (ran.status, &*ran.stderr),
        (0, ""),
        "{script}: {}",
        ran.stdout
    );
    ran.stdout
}

/// The text of the error of a creation that must fail, leaving nothing.
async fn refusal(host: &Host, spec: Value) -> String {
    let error = host.create(spec, Stdio::default()).await.unwrap_err();
    assert_eq!(host.cgroups(), 0, "a cgroup is left after {error}");
    match error {
        ttrpc::Error::RpcStatus(status) => status.message,
        other => panic!("{other}"),
    }
}

fn add_mount(spec: &mut Value, mount: Value) {
    spec["mounts"].as_array_mut().unwrap().push(mount);
}

#[test]
fn a_container_runs_its_program_and_reports_its_exit() {
    block_on(async |host: &mut Host| {
        let ran = host
            .run(busybox_spec([
                "sh",
                "-c",
                "echo out; echo err >&2; exit 42",
            ]))
            .await;
        assert_eq!(
            (ran.status, &*ran.stdout, &*ran.stderr),
            (42, "out\n", "err\n")
        );
        // The first process of a pid namespace is deaf to its own signals.
        let ran = host
            .run(busybox_spec(["sh", "-c", "kill -9 $$; true"]))
            .await;
        assert_eq!(ran.status, 0);
        let ran = host
            .run(busybox_spec(["sh", "-c", "sh -c 'kill -9 $$'; exit $?"]))
            .await;
        assert_eq!(ran.status, 137);
        assert!(!ran.oom_killed);
    });
}

#[test]
fn a_container_has_namespaces_of_its_own() {
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
fn mounts_have_their_options_and_masked_paths_show_nothing_b15() {
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

        for (at, reason) in [("/loop/x", "os error 40"), ("/absolute/x", "os error 2")] {
            let mut spec = busybox_spec(["true"]);
            add_mount(&mut spec, tmpfs(at));
            let text = refusal(host, spec).await;
            assert!(text.contains(at) && text.contains(reason), "{text}");
        }
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);

        std::fs::remove_dir(root.join("proc")).unwrap();
        symlink("/tmp", root.join("proc")).unwrap();
        let text = refusal(host, busybox_spec(["true"])).await;
        assert!(text.contains("/proc"), "{text}");
    });
}

#[test]
fn a_program_that_cannot_be_executed_is_named_in_the_known_words() {
    block_on(async |host: &mut Host| {
        let check = async |program: &str, expected: &str| {
            assert_eq!(refusal(host, busybox_spec([program])).await, expected);
        };
        check(
            "nope",
            r#"exec: "nope": executable file not found in $PATH"#,
        )
        .await;
        check("/nope", r#"exec: "/nope": no such file or directory"#).await;
        check("/etc/passwd", r#"exec: "/etc/passwd": permission denied"#).await;
    });
}

#[test]
fn a_creation_that_fails_at_any_step_leaves_nothing_and_says_why() {
    block_on(async |host: &mut Host| {
        let check = async |expected: &str, change: &dyn Fn(&mut Value)| {
            let mut spec = busybox_spec(["true"]);
            change(&mut spec);
            let text = refusal(host, spec).await;
            assert!(
                text.contains(expected),
                "{text:?} does not say {expected:?}"
            );
        };
        check("/nowhere", &|s| s["root"]["path"] = "/nowhere".into()).await;
        check("mount source /nowhere", &|s| {
            add_mount(
                s,
                json!({"destination": "/x", "type": "bind", "source": "/nowhere"}),
            );
        })
        .await;
        check("/dev/null: only files and directories", &|s| {
            add_mount(
                s,
                json!({"destination": "/x", "type": "bind", "source": "/dev/null"}),
            );
        })
        .await;
        check("nonsense", &|s| {
            add_mount(
                s,
                json!({"destination": "/x", "type": "tmpfs", "options": ["nonsense=1"]}),
            );
        })
        .await;
        check("nothing can be mounted inside /proc", &|s| {
            add_mount(s, json!({"destination": "/proc/self/x", "type": "tmpfs"}));
        })
        .await;
        check("sysctl", &|s| {
            s["linux"]["sysctl"] = json!({"kernel.nope": "1"})
        })
        .await;
        check("cwd", &|s| s["process"]["cwd"] = "/etc/passwd".into()).await;
        check("CAP_NOPE", &|s| {
            s["process"]["capabilities"]["bounding"] = json!(["CAP_NOPE"])
        })
        .await;
        check("memory.nope", &|s| {
            s["linux"]["resources"]["unified"] = json!({"memory.nope": "1"});
        })
        .await;
        check("/proc/999999/ns/ipc", &|s| {
            s["linux"]["namespaces"][1]["path"] = "/proc/999999/ns/ipc".into();
        })
        .await;
    });
}

#[test]
fn the_order_of_requests_is_kept_b25_b26() {
    block_on(async |host: &mut Host| {
        let code = |result: ttrpc::Result<_>| match result {
            Err(ttrpc::Error::RpcStatus(status)) => status.code(),
            other => panic!("{:?}", other.map(|_: bulkhead_agent_api::agent::Empty| ())),
        };
        let process = busybox_spec(["true"])["process"].clone();
        let id = host
            .create(busybox_spec(["sleep", "100"]), Stdio::default())
            .await
            .unwrap();
        let early = host
            .exec(&id, "e", &process, Stdio::default())
            .await
            .map(|_| Default::default());
        assert_eq!(code(early), ttrpc::Code::FAILED_PRECONDITION);
        assert_eq!(
            code(host.delete(&id, "").await),
            ttrpc::Code::FAILED_PRECONDITION
        );
        host.kill(&id, "", 0).await.unwrap();
        host.start_container(&id).await.unwrap();
        assert_eq!(
            code(host.start_container(&id).await),
            ttrpc::Code::FAILED_PRECONDITION
        );
        assert_eq!(host.pids(&id).await.len(), 1);
        assert_eq!(
            code(host.kill(&id, "", 65).await),
            ttrpc::Code::INVALID_ARGUMENT
        );
        assert_eq!(
            code(host.resize(&id, 1, 1).await),
            ttrpc::Code::FAILED_PRECONDITION
        );
        host.exec(&id, "e", &process, Stdio::default())
            .await
            .unwrap();
        assert_eq!(host.wait(&id, "e").await.unwrap().exit_status, 0);
        let again = host
            .exec(&id, "e", &process, Stdio::default())
            .await
            .map(|_| Default::default());
        assert_eq!(code(again), ttrpc::Code::ALREADY_EXISTS);
        host.delete(&id, "e").await.unwrap();
        host.kill(&id, "", 9).await.unwrap();
        assert_eq!(host.wait(&id, "").await.unwrap().exit_status, 137);
        assert_eq!(code(host.kill(&id, "", 9).await), ttrpc::Code::NOT_FOUND);
        assert_eq!(code(host.kill_all(&id, 9).await), ttrpc::Code::NOT_FOUND);
        host.delete(&id, "").await.unwrap();
        assert_eq!(code(host.delete(&id, "").await), ttrpc::Code::NOT_FOUND);
    });
}

#[test]
fn an_exec_joins_the_container_in_everything() {
    block_on(async |host: &mut Host| {
        let mut spec = busybox_spec(["sh", "-c", "mkdir /tmp/here; exec sleep 100"]);
        spec["hostname"] = "inside".into();
        let id = host.create(spec, Stdio::default()).await.unwrap();
        host.start_container(&id).await.unwrap();
        let script = "hostname; ls -d /tmp/here; for n in pid mnt ipc uts cgroup; do
            test $(readlink /proc/1/ns/$n) = $(readlink /proc/self/ns/$n) || echo other $n; done
            grep -E 'CapEff|NoNew' /proc/self/status; echo $(ps | grep -c sleep)";
        let process = busybox_spec(["sh", "-c", script])["process"].clone();
        let ran = host.run_exec(&id, &process).await;
        let expected = "inside\n/tmp/here\nCapEff:\t00000000080005eb\nNoNewPrivs:\t1\n";
        assert!(
            ran.stdout.starts_with(expected),
            "{} {}",
            ran.stdout,
            ran.stderr
        );

        let missing = busybox_spec(["nope"])["process"].clone();
        let error = host
            .exec(&id, "x", &missing, Stdio::default())
            .await
            .unwrap_err();
        assert!(
            error
                .to_string()
                .contains("executable file not found in $PATH"),
            "{error}"
        );
        host.kill_all(&id, 9).await.unwrap();
        assert_eq!(host.wait(&id, "").await.unwrap().exit_status, 137);
        host.delete(&id, "").await.unwrap();
    });
}

#[test]
fn sixty_four_mebibytes_pass_both_ways_unharmed() {
    const LENGTH: usize = 64 << 20;
    block_on(async |host: &mut Host| {
        let mut data = vec![0; LENGTH];
        let mut state = 1u64;
        for byte in data.chunks_mut(8) {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            byte.copy_from_slice(&state.to_le_bytes());
        }
        let (stdio, [mut stdin, mut stdout, _stderr]) = host.pipes().await;
        let id = host.create(busybox_spec(["cat"]), stdio).await.unwrap();
        host.start_container(&id).await.unwrap();
        let begin = std::time::Instant::now();
        let send = async {
            stdin.write_all(&data).await.unwrap();
            stdin.shutdown().await.unwrap();
        };
        let mut back = Vec::with_capacity(LENGTH);
        let (exit, (), read) =
            tokio::join!(host.wait(&id, ""), send, stdout.read_to_end(&mut back));
        read.unwrap();
        eprintln!("64 MiB in and out: {:?}", begin.elapsed());
        assert_eq!(exit.unwrap().exit_status, 0);
        assert!(back == data);
        host.delete(&id, "").await.unwrap();
    });
}

#[test]
fn a_background_child_does_not_hold_up_the_wait_b73() {
    block_on(async |host: &mut Host| {
        let id = host
            .create(busybox_spec(["sleep", "100"]), Stdio::default())
            .await
            .unwrap();
        host.start_container(&id).await.unwrap();
        let process = busybox_spec(["sh", "-c", "sleep 50 & echo done"])["process"].clone();
        let (stdio, [_stdin, mut stdout, _stderr]) = host.pipes().await;
        host.exec(&id, "e", &process, stdio).await.unwrap();
        let begin = std::time::Instant::now();
        assert_eq!(host.wait(&id, "e").await.unwrap().exit_status, 0);
        let waited = begin.elapsed().as_millis();
        assert!((1_500..3_500).contains(&waited), "{waited} ms");
        let mut said = [0; 5];
        stdout.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"done\n");
        host.kill_all(&id, 9).await.unwrap();
        host.wait(&id, "").await.unwrap();
        host.delete(&id, "").await.unwrap();
    });
}

#[test]
fn a_reader_that_goes_away_does_not_end_the_process_f60() {
    block_on(async |host: &mut Host| {
        let (stdio, [stdin, mut stdout, _stderr]) = host.pipes().await;
        let script = "seq 1000000; cat >/dev/null; exit 7";
        let id = host
            .create(busybox_spec(["sh", "-c", script]), stdio)
            .await
            .unwrap();
        host.start_container(&id).await.unwrap();
        stdout.read_exact(&mut [0; 10]).await.unwrap();
        drop(stdout);
        drop(stdin);
        assert_eq!(host.wait(&id, "").await.unwrap().exit_status, 7);
        host.delete(&id, "").await.unwrap();
    });
}

#[test]
fn closing_the_input_ends_it() {
    block_on(async |host: &mut Host| {
        let (stdio, [mut stdin, mut stdout, _stderr]) = host.pipes().await;
        let id = host.create(busybox_spec(["cat"]), stdio).await.unwrap();
        host.start_container(&id).await.unwrap();
        stdin.write_all(b"last words").await.unwrap();
        host.close_stdin(&id).await;
        let mut out = String::new();
        stdout.read_to_string(&mut out).await.unwrap();
        assert_eq!(out, "last words");
        assert_eq!(host.wait(&id, "").await.unwrap().exit_status, 0);
        host.delete(&id, "").await.unwrap();
    });
}

#[test]
fn a_terminal_is_the_console_and_can_be_resized() {
    block_on(async |host: &mut Host| {
        let script = "tty; stty size; ls -l /dev/console | tr -s ' ' | grep -c '136,'; \
            read line; stty size; echo got $line";
        let (stdio, [mut stdin, mut stdout]) = host.terminal(91, 33).await;
        let id = host
            .create(busybox_spec(["sh", "-c", script]), stdio)
            .await
            .unwrap();
        host.start_container(&id).await.unwrap();
        let mut seen = String::new();
        while !seen.contains("\r\n1\r\n") {
            let mut bytes = [0; 256];
            let length = stdout.read(&mut bytes).await.unwrap();
            seen.push_str(std::str::from_utf8(&bytes[..length]).unwrap());
        }
        host.resize(&id, 120, 50).await.unwrap();
        stdin.write_all(b"it\n").await.unwrap();
        stdout.read_to_string(&mut seen).await.unwrap();
        let expected = "/dev/pts/0\r\n33 91\r\n1\r\nit\r\n50 120\r\ngot it\r\n";
        assert_eq!(seen, expected);
        assert_eq!(host.wait(&id, "").await.unwrap().exit_status, 0);
        host.delete(&id, "").await.unwrap();

        // A further process gets a terminal of its own.
        let id = host
            .create(busybox_spec(["sleep", "100"]), Stdio::default())
            .await
            .unwrap();
        host.start_container(&id).await.unwrap();
        let (stdio, [_stdin, mut stdout]) = host.terminal(0, 0).await;
        host.exec(&id, "e", &busybox_spec(["tty"])["process"], stdio)
            .await
            .unwrap();
        let mut seen = String::new();
        stdout.read_to_string(&mut seen).await.unwrap();
        assert_eq!(seen, "/dev/pts/0\r\n");
        host.kill(&id, "", 9).await.unwrap();
        host.wait(&id, "").await.unwrap();
        host.delete(&id, "").await.unwrap();
    });
}

#[test]
fn a_program_can_open_its_streams_by_name() {
    block_on(async |host: &mut Host| {
        let script = "echo a > /dev/stdout; echo b > /proc/self/fd/1";
        let seen = output(host, script, |spec| {
            spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        })
        .await;
        assert_eq!(seen, "a\nb\n");
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
        let process =
            busybox_spec(["sh", "-c", "id -u; readlink /proc/self/ns/user"])["process"].clone();
        let ran = host.run_exec(&id, &process).await;
        let ours = std::fs::read_link("/proc/self/ns/user").unwrap();
        assert!(
            ran.stdout.starts_with("0\nuser:"),
            "{} {}",
            ran.stdout,
            ran.stderr
        );
        assert!(!ran.stdout.contains(ours.to_str().unwrap()));
        host.kill(&id, "", 9).await.unwrap();
        host.wait(&id, "").await.unwrap();
        host.delete(&id, "").await.unwrap();
        let (mut out, mut err) = (String::new(), String::new());
        stdout.read_to_string(&mut out).await.unwrap();
        stderr.read_to_string(&mut err).await.unwrap();
        assert_eq!((&*out, &*err), ("0\n 0 100000\n0\nnull\n", ""));
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
fn a_shutdown_kills_and_ends_the_service() {
    block_on(async |host: &mut Host| {
        let id = host
            .create(busybox_spec(["sleep", "100"]), Stdio::default())
            .await
            .unwrap();
        host.start_container(&id).await.unwrap();
        host.shutdown().await.unwrap();
        assert_eq!(host.wait(&id, "").await.unwrap().exit_status, 137);
        host.delete(&id, "").await.unwrap();
        assert_eq!(
            (&mut host.agent).await.unwrap(),
            bulkhead_agent::rpc::End::Shutdown
        );
    });
}
