//! What people run, in pods: servers, a package manager, an init system, another engine.
#![expect(
    clippy::tests_outside_test_module,
    reason = "the whole crate is a suite"
)]

use bulkhead_tests::{BUSYBOX, Command, DEBIAN, Outcome};

/// The image with the programs, in containerd.
const IMAGE: &str = bulkhead_tests::DEBIAN_NAME;

/// Runs a script in a pod that has what servers need.
fn bash(script: &str) -> Outcome {
    let run = [
        "run",
        "--rm",
        "--network",
        "none",
        "--memory",
        "768M",
        DEBIAN,
        "--",
    ];
    Command::bulkhead(run.into_iter().chain(["bash", "-ec", script])).run()
}

#[test]
fn nginx_serves_files_over_loopback() {
    let script = "
        head -c 3000000 /dev/urandom > /var/www/html/blob
        nginx
        sum() { sha256sum | cut -c1-64; }
        sum < /var/www/html/blob
        for i in 1 2 3; do
            exec 3<>/dev/tcp/127.0.0.1/80
            printf 'GET /blob HTTP/1.0\\r\\n\\r\\n' >&3
            sed '1,/^\\r$/d' <&3 | sum
        done
        nginx -s quit";
    let out = bash(script).success();
    let sums: Vec<&str> = out.lines().collect();
    assert_eq!(sums.len(), 4, "{out}");
    assert!(sums.iter().all(|sum| *sum == sums[0]), "{out}");
}

#[test]
#[ignore = "it takes minutes: cargo xtask test --full runs it"]
fn postgres_keeps_what_it_was_told_through_a_crash() {
    let script = "
        cat > /tmp/it <<'END'
        set -e
        PATH=$(echo /usr/lib/postgresql/*/bin):$PATH PGHOST=/tmp
        export PATH PGHOST
        initdb -D /var/lib/postgresql/it > /tmp/init
        up() { pg_ctl -D /var/lib/postgresql/it -o '-k /tmp' -w -t 200 -l /tmp/log start > /tmp/up; }
        up
        createdb bench
        pgbench -q -i bench 2> /tmp/made
        pgbench -n -c 4 -T 20 bench 2> /tmp/ran | grep 'failed transactions'
        pg_ctl -D /var/lib/postgresql/it -m immediate stop > /tmp/down
        up
        psql -At bench -c 'select (select sum(abalance) from pgbench_accounts)
            = (select sum(delta) from pgbench_history), (select count(*) from pgbench_history) > 10'
        pg_ctl -D /var/lib/postgresql/it stop > /tmp/down
END
        su postgres -c 'bash /tmp/it'";
    let out = bash(script).success();
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines.len(), 2, "{out}");
    assert!(lines[0].contains(": 0 (0.000%)"), "{out}");
    assert_eq!(lines[1], "t|t");
}

#[test]
fn a_package_is_installed_out_of_a_repository() {
    let script = "
        mkdir -p /repo /made/DEBIAN /made/usr/bin
        printf '#!/bin/sh\\necho it runs\\n' > /made/usr/bin/it
        chmod 755 /made/usr/bin/it
        printf 'Package: it\\nVersion: 1\\nArchitecture: all\\nMaintainer: a <a@b.c>\\nDescription: it\\n' > /made/DEBIAN/control
        dpkg-deb --build /made /repo/it.deb > /tmp/built
        { cat /made/DEBIAN/control
          echo Filename: ./it.deb
          echo Size: $(stat -c %s /repo/it.deb)
          echo SHA256: $(sha256sum < /repo/it.deb | cut -c1-64)
        } > /repo/Packages
        rm -f /etc/apt/sources.list.d/*
        echo 'deb [trusted=yes] file:/repo ./' > /etc/apt/sources.list
        apt-get -q update > /tmp/log 2>&1 && apt-get -qy install it >> /tmp/log 2>&1 || { cat /tmp/log; exit 1; }
        it
        dpkg-query -W it";
    assert_eq!(bash(script).success(), "it runs\nit\t1\n");
}

/// `ctr` on a container of that name.
fn ctr(words: &[&str]) -> Outcome {
    Command::new("ctr", words).run()
}

/// Starts a container that may do what it wants in its guest.
fn privileged(id: &str, flags: &[&str], program: &[&str]) {
    let run = ["run", "--runtime", "io.containerd.bulkhead.v2", "--detach"];
    let rights = ["--privileged", "--privileged-without-host-devices"];
    ctr(&[&run[..], &rights, flags, &[IMAGE, id], program].concat()).success();
}

/// Runs a script in a container.
fn exec(container: &str, id: &str, script: &str) -> Outcome {
    let exec = ["task", "exec", "--exec-id", id, container];
    ctr(&[&exec[..], &["bash", "-ec", script]].concat())
}

fn remove(id: &str) {
    ctr(&["task", "rm", "--force", id]).success();
    ctr(&["container", "rm", id]).success();
}

#[test]
fn systemd_is_the_first_process_and_starts_its_units() {
    let prepare = "
        cd /etc/systemd/system
        printf '[Service]\\nType=oneshot\\nExecStart=/bin/sh -c \"echo done > /run/once\"\\nRemainAfterExit=yes\\n' > once.service
        printf '[Unit]\\nAfter=once.service\\n[Service]\\nExecStart=/bin/sleep 100000\\nMemoryMax=64M\\nDynamicUser=yes\\nPrivateTmp=yes\\n' > stays.service
        printf '[Socket]\\nListenStream=/run/echo.sock\\nAccept=yes\\n' > echo.socket
        printf '[Service]\\nStandardInput=socket\\nExecStart=/bin/cat\\n' > echo@.service
        mkdir -p multi-user.target.wants sockets.target.wants
        ln -s ../once.service ../stays.service multi-user.target.wants/
        ln -s ../echo.socket sockets.target.wants/
        exec /lib/systemd/systemd --unit=multi-user.target";
    let run = "type=tmpfs,src=tmpfs,dst=/run,options=mode=755";
    let flags = ["--env", "container=oci", "--mount", run];
    privileged("init", &flags, &["sh", "-c", prepare]);
    // It waits until all that starts at boot has, or has not.
    let up = exec(
        "init",
        "up",
        "until systemctl is-system-running --wait; do sleep 1; systemctl is-system-running | grep -q -e degraded && break; done",
    );
    let state = exec(
        "init",
        "state",
        "systemctl --failed --no-legend; systemctl is-active once stays echo.socket; cat /run/once",
    );
    let state = state.stdout;
    assert!(
        state.ends_with("active\nactive\nactive\ndone\n"),
        "{up}\n{state}"
    );
    let group = exec(
        "init",
        "group",
        "cat /sys/fs/cgroup/system.slice/stays.service/memory.max; test $(stat -c %u /proc/$(systemctl show -P MainPID stays)) -ge 61184 && echo a user of its own",
    );
    assert!(
        group.stdout.starts_with("67108864\na user of its own\n"),
        "{group}"
    );
    // SIGRTMIN+3 is how it is told to end.
    ctr(&["task", "kill", "--signal", "37", "init"]).success();
    let gone = Command::new(
        "sh",
        [
            "-c",
            "for i in $(seq 100); do ctr task ls | grep -q 'init.*STOPPED' && exit; sleep 1; done; exit 1",
        ],
    );
    gone.run().success();
    remove("init");
}

/// Docker's programs are those of the lab host, which is the same Debian.
#[test]
#[ignore = "it takes minutes: cargo xtask test --full runs it"]
fn docker_runs_containers_in_a_pod_on_overlays_of_the_share() {
    let programs = "type=bind,src=/usr,dst=/host,options=rbind:ro";
    let image = format!("type=bind,src={BUSYBOX}/blobs/sha256,dst=/image,options=rbind:ro");
    let flags = [
        "--mount",
        programs,
        "--mount",
        &image,
        "--mount",
        "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=rw:nosuid:noexec:nodev",
        "--env",
        "PATH=/usr/bin:/usr/sbin:/host/bin:/host/sbin",
        "--env",
        "LD_LIBRARY_PATH=/host/lib/x86_64-linux-gnu",
    ];
    privileged("engine", &flags, &["sleep", "100000"]);
    // As the image of Docker in Docker begins: limits want a cgroup without processes.
    let start = "cd /sys/fs/cgroup; mkdir init
        for process in $(cat cgroup.procs); do echo $process > init/cgroup.procs || true; done
        sed 's/ / +/g; s/^/+/' cgroup.controllers > cgroup.subtree_control
        dockerd --bridge=none --iptables=false --ip6tables=false > /tmp/log 2>&1 &
        for i in $(seq 200); do docker version > /tmp/version 2>&1 && break; sleep 1; kill -0 $! || { tail -5 /tmp/log; exit 1; }; done
        docker import --change 'ENV PATH=/bin' $(ls -S /image/* | head -1) busybox > /tmp/imported
        docker info -f '{{.Driver}}'";
    let started = exec("engine", "start", start);
    assert_eq!(started.stdout, "overlay2\n", "{started}");
    let run = "docker run --rm --network=none busybox sh -c 'echo hello from inside; rm /etc/passwd; ls /etc/group; exit 7' || echo code $?
        docker run -d --name second -m 32m --network=none busybox sleep 1000 > /tmp/second
        docker exec second cat /proc/1/comm /sys/fs/cgroup/memory.max
        docker rm -f second";
    let out = exec("engine", "run", run);
    assert_eq!(
        out.stdout, "hello from inside\n/etc/group\ncode 7\nsleep\n33554432\nsecond\n",
        "{out}"
    );
    remove("engine");
}
