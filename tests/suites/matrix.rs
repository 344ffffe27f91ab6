//! `ctr` and `docker` with our runtime and with runc: the same command does the same.
//!
//! Each case is run with both. Exit code, standard output and standard error are compared;
//! where both fail, that both say why. A difference that is meant stands with its case, and
//! `docs/differences.md` says why it is there.
#![expect(
    clippy::tests_outside_test_module,
    reason = "the whole crate is a suite"
)]

#[path = "matrix/case.rs"]
mod case;
#[path = "matrix/docker.rs"]
mod docker;
#[path = "matrix/tasks.rs"]
mod tasks;

use std::fs;

use bulkhead_tests::volume::volume;
use case::{Engine, case, compare, shell};

#[test]
#[ignore = "it takes two minutes: cargo xtask test --full runs it"]
fn programs_end_as_with_runc() {
    let long = "x".repeat(100_000);
    let many = ["sh", "-c", "echo $# $1 $999", "sh"].into_iter();
    let numbers: Vec<String> = (0..1000).map(|number| number.to_string()).collect();
    compare(
        Engine::Ctr,
        [
            case("success", ["true"]),
            case("failure", ["false"]),
            shell("an exit code", "exit 42"),
            shell("the largest exit code", "exit 255"),
            shell(
                "a child that kills itself",
                "sh -c 'kill -KILL $$'; echo $?",
            ),
            shell(
                "a child that crashes",
                "ulimit -c 0; sh -c 'kill -SEGV $$'; echo $?",
            ),
            shell(
                "a first process that kills itself",
                "kill -KILL $$; echo lives",
            ),
            shell(
                "a first process that terminates itself",
                "kill -TERM $$; echo lives",
            ),
            case("a program that is not there", ["nothing-of-that-name"]).fails("not found"),
            case("a path that is not there", ["/no/such/program"]).fails("no such file"),
            case("a file that is no program", ["/etc/passwd"]).fails("permission denied"),
            case("a directory as program", ["/tmp"]).fails(""),
            case("no word as program", [""]).fails(""),
            case(
                "arguments with everything",
                ["printf", "[%s]", "a b", "", "ü", "'\"\\", "\n$x"],
            ),
            case("a long argument", ["sh", "-c", "echo ${#1}", "sh", &long]),
            case(
                "a thousand arguments",
                many.chain(numbers.iter().map(String::as_str)),
            ),
            shell(
                "a file without an interpreter",
                "echo 'echo hi' > /tmp/x; chmod +x /tmp/x; /tmp/x",
            ),
            shell(
                "orphans are reaped",
                "(sleep 0.1 & ) ; sleep 1; ps -o stat | grep -c Z",
            ),
            shell(
                "children end with the first process",
                "sleep 1000 & echo over",
            ),
            shell("a program that replaces the shell", "exec echo replaced"),
        ],
    );
}

#[test]
#[ignore = "it takes two minutes: cargo xtask test --full runs it"]
fn streams_are_those_of_runc() {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("input");
    let words: String = (0..40_000).map(|number| format!("{number}\n")).collect();
    fs::write(&input, words).unwrap();
    compare(
        Engine::Ctr,
        [
            shell("two streams", "echo out; echo err >&2"),
            shell("bytes that are no text", "printf '\\000\\001\\377\\n'"),
            shell("no end of line", "printf word"),
            shell("nothing at all", ":"),
            shell("half a megabyte", "yes 0123456789abcde | head -c 524288"),
            shell(
                "both at once",
                "for i in $(seq 200); do echo o$i; echo e$i >&2; done",
            ),
            case("an input", ["cat"]).input(&input),
            case("a part of an input", ["head", "-n", "3"]).input(&input),
            case("an input that is counted", ["wc", "-c"]).input(&input),
            // Not without an input: ctr closes none that ends before the task is made,
            // and "cat" waits for ever with either runtime.
            shell("an output that is closed", "exec >&-; echo x; echo $? >&2"),
            shell(
                "no terminal",
                "test -t 0 || test -t 1 || test -t 2 || echo none",
            ),
            shell(
                "outputs by their names",
                "echo a > /dev/stdout; echo b > /dev/stderr; echo c > /proc/self/fd/1",
            ),
        ],
    );
}

#[test]
#[ignore = "it takes two minutes: cargo xtask test --full runs it"]
fn a_process_has_the_surroundings_that_it_has_with_runc() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("env");
    fs::write(&file, "FROM_FILE=yes\nAND=a b\n").unwrap();
    let file = file.to_str().unwrap();
    compare(
        Engine::Ctr,
        [
            shell("environment", "env | sort"),
            shell("a variable", "echo $A").with(["--env", "A=b c"]),
            shell("another path", "echo $PATH").with(["--env", "PATH=/bin"]),
            shell("variables of a file", "env | sort").with(["--env-file", file]),
            shell("directory", "pwd").with(["--cwd", "/tmp"]),
            shell("a directory that is made", "pwd; ls -ld .").with(["--cwd", "/made/for/it"]),
            case("a relative directory", ["pwd"])
                .with(["--cwd", "tmp"])
                .fails(""),
            shell("nobody in particular", "id; umask; pwd; echo $HOME"),
            shell("a user by number", "id; echo $HOME").with(["--user", "1000"]),
            shell("user and group", "id").with(["--user", "1000:7"]),
            shell("a user by name", "id; echo $HOME").with(["--user", "user"]),
            shell("a user without an entry", "id").with(["--user", "12345"]),
            case("a user who is nobody", ["id"])
                .with(["--user", "stranger"])
                .fails(""),
            shell(
                "limits",
                "ulimit -a | grep -v -e pending -e processes -e core; ulimit -Hc",
            ),
            shell("name of the host", "hostname").with(["--hostname", "other"]),
            shell(
                "what it sees of processes",
                "echo $$; ls /proc | grep -c '^[0-9]'",
            ),
            shell("groups of root", "id -G"),
            shell("network", "ls /sys/class/net; cat /proc/net/route"),
        ],
    );
}

#[test]
#[ignore = "it takes two minutes: cargo xtask test --full runs it"]
fn files_are_those_of_runc() {
    let (dir, _) = volume();
    let source = dir.path().to_str().unwrap();
    fs::write(dir.path().join("file"), "content\n").unwrap();
    let bind = |destination: &str, option: &str| {
        format!("type=bind,src={source},dst={destination},options=rbind:{option}")
    };
    let (rw, ro, new) = (
        bind("/mnt", "rw"),
        bind("/mnt", "ro"),
        bind("/new/place", "rw"),
    );
    let file = format!("type=bind,src={source}/file,dst=/etc/one,options=bind:ro");
    let missing = format!("type=bind,src={source}/none,dst=/mnt,options=rbind");
    let tmpfs = "type=tmpfs,src=tmpfs,dst=/t,options=size=1m:mode=1700:noexec";
    compare(Engine::Ctr, [
        shell("what is mounted", "awk '$2 != \"/\" { print $2, $3, $4 }' /proc/mounts | sed 's/,size=[0-9]*k//; s/,inode64//; s/,nr_inodes=1//' | grep -v -e kcore -e acpi | sort"),
        shell("devices", "cd /dev; for f in *; do stat -c '%n %F %a %u %g %t %T' $f; done"),
        shell("devices work", "echo x > /dev/null; head -c 4 /dev/zero | od -c; head -c 9 /dev/urandom | wc -c; echo x > /dev/full"),
        shell("a read-only root", "touch /x; touch /tmp/x; echo $?").with(["--read-only"]),
        shell("a volume", "cat /mnt/file; echo new > /mnt/new; stat -c '%a %u' /mnt/new; rm /mnt/new").with(["--mount", &rw]),
        shell("a read-only volume", "cat /mnt/file; touch /mnt/new").with(["--mount", &ro]),
        shell("a volume where nothing was", "cat /new/place/file; ls -ld /new").with(["--mount", &new]),
        shell("a file as a volume", "cat /etc/one; echo x > /etc/one").with(["--mount", &file]),
        case("a volume of nothing", ["true"]).with(["--mount", &missing]).fails("no such file"),
        shell("a tmpfs", "stat -c %a /t; cp /bin/busybox /t/x; dd if=/dev/zero of=/t/y bs=1k count=2000 2>&1 | head -1").with(["--mount", tmpfs]),
        shell("what is hidden", "for p in /proc/keys /proc/timer_list /proc/scsi /sys/firmware; do ls -d $p && head -c 10 $p | wc -c; done 2>&1"),
        shell("what cannot be written", "for p in /proc/sys/kernel/shmmax /proc/sysrq-trigger /sys/kernel/mm/transparent_hugepage/enabled; do echo 1 > $p; done"),
        shell("kinds of files", "cd /tmp; mkfifo p; ln -s p l; ln p h; mkdir d; mknod b b 7 0; echo $?; stat -c '%n %F %h' p l h d"),
        shell("owners and modes", "cd /tmp; touch f; chown 7:8 f; chmod 4755 f; stat -c '%a %u %g' f; mv f g; rm g; ls"),
        shell("a file with a hole", "dd if=/dev/zero of=/tmp/s bs=1 count=1 seek=1G 2>/dev/null; stat -c '%s' /tmp/s; du -k /tmp/s | cut -f1"),
        shell("names", "cd /tmp; touch 'a b' ü $(printf '%0255d' 1); ls | wc -l; touch $(printf '%0256d' 1)"),
        shell("a lock", "flock -n /tmp/l flock -n /tmp/l true; echo $?"),
        shell("times", "touch -d @1000000000 /tmp/t; stat -c %Y /tmp/t"),
        shell("a lower file is changed and removed", "echo x >> /etc/group; cat /etc/group; rm /etc/passwd; ls /etc"),
    ]);
}

#[test]
#[ignore = "it takes two minutes: cargo xtask test --full runs it"]
fn a_container_may_what_it_may_with_runc() {
    const STATUS: &str =
        "grep -e ^Cap -e ^NoNewPrivs -e ^Seccomp: -e ^Uid -e ^Gid -e ^Groups /proc/self/status";
    compare(
        Engine::Ctr,
        [
            shell("rights", STATUS),
            shell("rights of a user", STATUS).with(["--user", "1000"]),
            shell("one right more", STATUS).with(["--cap-add", "CAP_SYS_TIME"]),
            shell("one right less", STATUS).with(["--cap-drop", "CAP_CHOWN"]),
            shell("a filter", STATUS).with(["--seccomp"]),
            shell("new privileges", STATUS).with(["--allow-new-privs"]),
            shell("mounting", "mount -t tmpfs x /tmp; echo $?"),
            shell("a namespace for users", "unshare -U true; echo $?").with(["--seccomp"]),
            shell("the name of the host", "hostname other; echo $?"),
            shell("the clock", "date -s @1; echo $?"),
            shell("the log of the kernel", "dmesg | wc -l; echo 1 > /dev/kmsg").with(["--seccomp"]),
            shell("modules", "rmmod loop 2>&1")
                .ours("rmmod: can't unload module 'loop': Function not implemented\n"),
            shell("another root", "chroot / true; echo $?"),
            shell("privileged ports", "nc -l -p 80 -w 1; echo $?"),
            shell("raw sockets", "ping -c 1 127.0.0.1 > /dev/null; echo $?"),
            shell("where it is among the groups", "cat /proc/self/cgroup").ours("0::/\n"),
            shell("its score", "cat /proc/self/oom_score_adj").ours("0\n"),
            shell(
                "namespaces",
                "ls -l /proc/self/ns | wc -l; test $(readlink /proc/1/ns/pid) = $(readlink /proc/self/ns/pid); echo $?",
            ),
        ],
    );
}

#[test]
fn limits_hold_as_with_runc() {
    const GROUP: &str = "cd /sys/fs/cgroup; cat memory.max cpu.max cpu.weight pids.max";
    let memory = ["--memory-limit", "67108864"];
    compare(
        Engine::Ctr,
        [
            shell("no limits", GROUP),
            shell("memory", GROUP).with(memory),
            shell("processors", GROUP).with(["--cpus", "0.5"]),
            shell("shares", GROUP).with(["--cpu-shares", "512"]),
            shell(
                "more memory than there may be",
                "head -c 200M /dev/zero | tail | wc -c; echo $?",
            )
            .with(memory),
            case(
                "a first process that takes too much",
                ["sh", "-c", "exec tail /dev/zero"],
            )
            .with(memory),
        ],
    );
}
