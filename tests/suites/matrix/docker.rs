//! Docker: its own flags, and its verbs in the order in which people use them.

use std::fs;

use bulkhead_tests::{Command, LoopDevice, docker::Daemon, volume::volume};
use serde_json::json;

use crate::case::{Engine, case, compare, same, shell};

/// Without networks.
fn start() -> Daemon {
    Daemon::start(&json!({"bridge": "none", "iptables": false, "ip6tables": false}))
}

#[test]
#[ignore = "it takes minutes: cargo xtask test --full runs it"]
fn flags_of_docker_do_what_they_do_with_runc() {
    let _daemon = start();
    let (dir, _) = volume();
    let place = dir.path().to_str().unwrap();
    fs::write(dir.path().join("file"), "content\n").unwrap();
    let (rw, ro) = (format!("-v={place}:/mnt"), format!("-v={place}:/mnt:ro"));
    const STATUS: &str =
        "grep -e ^Cap -e ^NoNewPrivs -e ^Seccomp: -e ^Uid -e ^Groups /proc/self/status";
    const GROUP: &str = "cd /sys/fs/cgroup; cat memory.max memory.swap.max cpu.max pids.max";
    let input = dir.path().join("input");
    fs::write(&input, "a line\n".repeat(1000)).unwrap();
    let disk = LoopDevice::new(&input);
    let device = format!("--device={}:/dev/disk:r", disk.path());
    compare(
        Engine::Docker,
        [
            case("success", ["true"]),
            shell(
                "an exit code and two streams",
                "echo out; echo err >&2; exit 7",
            ),
            case("no such program", ["nothing-of-that-name"]).fails("not found"),
            case("a file that is no program", ["/etc/passwd"]).fails("permission denied"),
            shell("a killed child", "sh -c 'kill -KILL $$'; exit $?"),
            shell("environment", "env | grep -v HOSTNAME | sort").with([
                "-e",
                "A=b c",
                "-e",
                "PATH=/bin",
            ]),
            shell("directory", "pwd; ls -ld .").with(["-w", "/made/for/it"]),
            shell("a user", "id; echo $HOME").with(["-u", "user"]),
            shell("user and group", "id").with(["-u", "1000:7", "--group-add", "9"]),
            case("a user who is nobody", ["id"])
                .with(["-u", "stranger"])
                .fails("stranger"),
            shell("name", "hostname; cat /etc/hostname").with(["-h", "other"]),
            shell(
                "what is mounted",
                "awk '$2 != \"/\" { print $2, $3, $4 }' /proc/mounts | sed 's/,size=[0-9]*k//; s/,inode64//; s/,nr_inodes=1//; s/,favordynmods//' | grep -v -e ^/etc -e kcore -e acpi | sort",
            ),
            shell(
                "files of the engine",
                "cat /etc/resolv.conf | wc -l; grep -c localhost /etc/hosts; echo x > /etc/hosts; echo $?",
            ),
            shell(
                "a volume",
                "cat /mnt/file; echo x > /mnt/new; rm /mnt/new; echo $?",
            )
            .with([&*rw]),
            shell("a read-only volume", "cat /mnt/file; touch /mnt/new").with([&*ro]),
            shell("a volume of the engine", "echo x > /v/f; cat /v/f").with(["-v", "/v"]),
            shell(
                "tmpfs",
                "stat -c '%a' /t; df -k /t | tail -1 | awk '{ print $2 }'",
            )
            .with(["--tmpfs", "/t:size=1m,mode=1700"]),
            shell("a read-only root", "touch /x; touch /run/x; echo $?")
                .with(["--read-only", "--tmpfs=/run"]),
            shell(
                "memory in /dev/shm",
                "df -k /dev/shm | tail -1 | awk '{ print $2 }'",
            )
            .with(["--shm-size=8m"]),
            shell("rights", STATUS),
            shell("rights added and dropped", STATUS).with(["--cap-drop=ALL", "--cap-add=CHOWN"]),
            shell("no new privileges", STATUS).with(["--security-opt=no-new-privileges"]),
            shell("no filter", STATUS).with(["--security-opt=seccomp=unconfined"]),
            shell("everything allowed", STATUS).with(["--privileged"]),
            shell("limits", GROUP).with(["-m=64m", "--cpus=0.5", "--pids-limit=50"]),
            shell("limits of a process", "ulimit -n; ulimit -Hn; ulimit -c")
                .with(["--ulimit=nofile=100:200", "--ulimit=core=0"]),
            shell(
                "sysctl",
                "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shmmni",
            )
            .with(["--sysctl=kernel.shmmni=99"]),
            shell(
                "a first process that reaps",
                "cat /proc/1/comm; sh -c 'exit 5'; exit $?",
            )
            .with(["--init"]),
            shell("an entry", "echo $0").with(["--entrypoint=/bin/sh"]),
            case("an input", ["wc", "-l"]).with(["-i"]).input(&input),
            shell("labels and annotations", "echo").with(["--label=a=b", "--annotation=c=d"]),
            shell("another root of cgroups", "cat /proc/self/cgroup").with(["--cgroupns=private"]),
            shell("score", "cat /proc/self/oom_score_adj").with(["--oom-score-adj=500"]),
            shell("devices", "cd /dev; ls | sort"),
            shell(
                "a disk of the host",
                "stat -c '%F %a' /dev/disk; head -n 1 /dev/disk; echo x > /dev/disk; echo $?",
            )
            .with([&*device]),
        ],
    );
}

/// A program that ends with 3 when it is told to; `@up` in a step.
const UP: &str = "trap 'exit 3' TERM; echo up; while :; do sleep 1; done";

/// What a step gives: its exit code, what it prints, and the state of the container then.
/// `{}` is where a runtime belongs.
fn step(words: &str, runtime: &str) -> String {
    let words = words.replace("{}", runtime);
    let words = words.split(' ');
    let words: Vec<&str> = words
        .map(|word| if word == "@up" { UP } else { word })
        .collect();
    let out = Command::new("docker", &words).run();
    let format = "{{.State.Status}} {{.State.Running}} {{.State.Paused}} {{.State.ExitCode}} {{.State.OOMKilled}} {{.RestartCount}}";
    let state = Command::new("docker", ["inspect", "-f", format, "it"]).run();
    // Ids are random, and statistics are theirs.
    let silent = ["run", "create", "stats", "commit", "top"];
    // Of a failure each runtime tells in its own words.
    let printed = if silent.contains(&words[0]) || out.code >= 125 {
        ""
    } else {
        &*out.stdout
    };
    format!("{words:?}: {} {printed:?} {}", out.code, state.stdout)
}

#[test]
#[ignore = "it takes minutes: cargo xtask test --full runs it"]
fn verbs_of_docker_do_what_they_do_with_runc() {
    let _daemon = start();
    let steps = [
        "run -d --runtime {} --network=none --name it busybox sh -c @up",
        "exec it echo hello",
        "exec -w /tmp -e A=b -u 1000 it sh -c pwd;id;echo${IFS}$A",
        "exec it false",
        "exec it no-such-program",
        "exec -d it sleep 1000",
        "top it",
        "logs it",
        "stats --no-stream it",
        "pause it",
        "exec it true",
        "pause it",
        "unpause it",
        "unpause it",
        "update --memory 64m --memory-swap 64m it",
        "exec it cat /sys/fs/cgroup/memory.max",
        "cp /etc/hostname it:/tmp/copied",
        "exec it cat /tmp/copied",
        "exec it dd if=/dev/zero of=/written bs=64k count=16",
        "commit it committed",
        "run --rm --runtime {} --network=none committed sh -c wc${IFS}-c${IFS}</written;exit${IFS}4",
        "rename it other",
        "rename other it",
        "start it",
        "stop it",
        "wait it",
        "start it",
        "restart -t 1 it",
        "kill -s USR1 it",
        "kill it",
        "wait it",
        "kill it",
        "start it",
        "rm it",
        "rm -f it",
        "run -d --runtime {} --network=none --name it --restart on-failure:2 busybox false",
        "wait it",
        "rm -f it",
        "run --runtime {} --network=none --name it -m 32m busybox tail /dev/zero",
        "rm it",
        "create --runtime {} --network=none --name it busybox no-such-program",
        "start it",
        "rm it",
    ];
    same(&steps, step, || {
        let _ = Command::new("docker", ["rm", "--force", "it"]).run();
    });
}
