//! Who the processes of a container are: users, keys, environment.

use bulkhead_agent_api::agent::Stdio;
use serde_json::{Value, json};

use crate::{
    cgroups::writable_cgroups,
    support::{Host, block_on, busybox_spec, output, read_until},
};

/// Gives the container a user namespace of its own and the tree to its root.
pub(crate) fn with_own_users(host: &Host, spec: &mut Value) {
    let chown = std::process::Command::new("chown")
        .args(["-R", "100000:100000"])
        .arg(&host.rootfs)
        .status()
        .unwrap();
    assert!(chown.success());
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(host.directory.path(), open).unwrap();
    let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.push(json!({"type": "user"}));
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    spec["linux"]["uidMappings"] = map.clone();
    spec["linux"]["gidMappings"] = map;
}

/// Whether limits can be raised here; says so if not.
fn may_raise_limits() -> bool {
    const CAP_SYS_RESOURCE: u64 = 1 << 24;
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let may = u64::from_str_radix(line.unwrap().trim(), 16).unwrap() & CAP_SYS_RESOURCE != 0;
    if !may {
        eprintln!("skipped: needs CAP_SYS_RESOURCE");
    }
    may
}

#[test]
fn a_user_namespace_does_not_take_what_the_specification_grants() {
    block_on(async |host: &mut Host| {
        // Its own value: the network is that of this machine.
        let sysctl = "net/ipv4/ip_unprivileged_port_start";
        let value = std::fs::read_to_string(format!("/proc/sys/{sysctl}")).unwrap();
        // More than what a process gets that asks for nothing.
        let files = std::fs::read_to_string("/proc/self/limits").unwrap();
        let files = files
            .lines()
            .find(|line| line.starts_with("Max open files"));
        let hard: u64 = files
            .unwrap()
            .split_whitespace()
            .nth(4)
            .unwrap()
            .parse()
            .unwrap();
        let script =
            "ulimit -Hn; ulimit -Sn; stat -c %u /sys/fs/cgroup /sys/fs/cgroup/cgroup.procs;
            mkdir /sys/fs/cgroup/sub && echo $$ > /sys/fs/cgroup/sub/cgroup.procs && echo moved";
        let seen = output(host, script, |spec| {
            with_own_users(host, spec);
            writable_cgroups(spec);
            spec["process"]["rlimits"] =
                json!([{"type": "RLIMIT_NOFILE", "hard": hard, "soft": hard - 1}]);
            spec["linux"]["sysctl"] = json!({sysctl.replace('/', "."): value.trim_end()});
        })
        .await;
        assert_eq!(seen, format!("{hard}\n{}\n0\n0\nmoved\n", hard - 1));
    });
}

#[test]
fn limits_above_the_agents_own_are_granted_in_a_user_namespace_too() {
    block_on(async |host: &mut Host| {
        if !may_raise_limits() {
            return;
        }
        for own_users in [false, true] {
            let seen = output(host, "ulimit -Hl; ulimit -Sl", |spec| {
                if own_users {
                    with_own_users(host, spec);
                }
                let much = 1u64 << 40;
                spec["process"]["rlimits"] =
                    json!([{"type": "RLIMIT_MEMLOCK", "hard": much, "soft": 1 << 20}]);
            })
            .await;
            assert_eq!(seen, "1073741824\n1024\n", "{own_users}");
        }
    });
}

#[test]
fn no_container_takes_the_agents_protection_from_the_oom_killer_f55() {
    block_on(async |host: &mut Host| {
        if !may_raise_limits() {
            return;
        }
        // As the agent has it in a guest.
        std::fs::write("/proc/self/oom_score_adj", "-1000").unwrap();
        for own_users in [false, true] {
            let script = "cat /proc/self/oom_score_adj
                echo -1000 2>/dev/null > /proc/self/oom_score_adj || cat /proc/self/oom_score_adj";
            let seen = output(host, script, |spec| {
                if own_users {
                    with_own_users(host, spec);
                }
                spec["process"]["oomScoreAdj"] = 100.into();
            })
            .await;
            assert_eq!(seen, "100\n100\n", "{own_users}");
        }
        std::fs::write("/proc/self/oom_score_adj", "0").unwrap();
    });
}

#[test]
fn an_exec_joins_the_session_keyring_of_its_container() {
    block_on(async |host: &mut Host| {
        if !std::path::Path::new("/proc/keys").exists() {
            eprintln!("skipped: this kernel has no keys");
            return;
        }
        // A user without rights sees the keyrings that are his process's, and no other's: not
        // those of containers that are gone, which the kernel removes after a while.
        let script = "grep -o '_ses.*: ' /proc/keys | sort";
        let mut spec = busybox_spec(["sh", "-c", &format!("{script}; echo ready; exec sleep 99")]);
        spec["linux"]["maskedPaths"] = json!([]);
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        let (stdio, [_in, mut stdout, _err]) = host.pipes().await;
        let id = host.create(spec, stdio).await.unwrap();
        host.start_container(&id).await.unwrap();
        let first = read_until(&mut stdout, "ready\n").await;
        let keyring = first.strip_suffix("ready\n").unwrap();
        assert!(
            keyring.starts_with("_ses.") && keyring.lines().count() == 1,
            "{first}"
        );
        let mut process = busybox_spec(["sh", "-c", script])["process"].clone();
        process["user"] = json!({"uid": 1000, "gid": 1000});
        let ran = host.run_exec(&id, &process).await;
        assert_eq!(ran.stdout, keyring);
        host.kill_all(&id, 9).await.unwrap();
        host.wait(&id, "").await.unwrap();
        host.delete(&id, "").await.unwrap();
    });
}

#[test]
fn of_a_variable_that_is_given_twice_the_program_sees_the_last() {
    block_on(async |host: &mut Host| {
        let seen = output(host, "env | grep -E '^(PATH|HOME|A)=' | sort", |spec| {
            spec["process"]["env"] = json!(["PATH=/nowhere", "A=1", "PATH=/bin", "A=2", "HOME="]);
        })
        .await;
        assert_eq!(seen, "A=2\nHOME=/root\nPATH=/bin\n");
    });
}

#[test]
fn a_creation_that_fails_early_says_why_each_time_ta_28() {
    block_on(async |host: &mut Host| {
        let process = {
            let mut process = busybox_spec(["true"])["process"].clone();
            process["cwd"] = "/not/there".into();
            process
        };
        let id = host
            .create(busybox_spec(["sleep", "100"]), Stdio::default())
            .await
            .unwrap();
        host.start_container(&id).await.unwrap();
        for n in 0..50 {
            let error = host
                .exec(&id, &format!("e{n}"), &process, Stdio::default())
                .await
                .unwrap_err();
            assert!(error.to_string().contains("/not/there"), "{n}: {error}");
        }
        host.kill_all(&id, 9).await.unwrap();
        host.wait(&id, "").await.unwrap();
        host.delete(&id, "").await.unwrap();
    });
}
