//! What a container hears of changes that others make in a volume.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
    time::{Duration, Instant},
};

use bulkhead_tests::{
    Command, DEBIAN, Running,
    volume::{debian, volume},
};

/// Runs a shell line and then says what inotify tells of some paths: path, mask, name, and
/// whether another event had the same cookie. Ends at a file `end`.
const WATCH: &str = r#"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <unistd.h>

static char buffer[65536] __attribute__((aligned(8)));

int main(int argc, char **argv)
{
    char *paths[64] = { 0 };
    unsigned last = 0;
    int fd = inotify_init();
    for (int i = 2; i < argc; i++) {
        int wd = inotify_add_watch(fd, argv[i], 0xfce);
        if (wd < 0)
            return 2;
        paths[wd] = argv[i];
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("ready");
    if (system(argv[1]))
        return 3;
    for (;;) {
        ssize_t length = read(fd, buffer, sizeof buffer);
        for (char *at = buffer; at < buffer + length;) {
            struct inotify_event *event = (void *)at;
            const char *name = event->len ? event->name : "";
            const char *path = event->wd > 0 ? paths[event->wd] : "none";
            at += sizeof *event + event->len;
            printf("%s %x %s%s\n", path, event->mask, name,
                   event->cookie && event->cookie == last ? " pair" : "");
            last = event->cookie;
            if (event->mask == 0x80 && !strcmp(name, "..data"))
                system("echo key $(cat /v/..data/key)");
            if (!strncmp(name, "end", 3))
                return 0;
        }
    }
}
"#;

/// Makes it and runs it, with the arguments that follow.
const BUILD: &str = r#"printf %s "$1" > /tmp/watch.c && gcc -o /tmp/watch /tmp/watch.c && shift && exec /tmp/watch "$@""#;

/// Starts it in a container of this name with volumes.
fn watch(name: &str, volumes: &[&str], first: &str, paths: &[&str]) -> Running {
    let mut arguments = vec![
        "run",
        "--rm",
        "--network",
        "none",
        "--name",
        name,
        "--memory",
        "512M",
    ];
    for volume in volumes {
        arguments.extend(["-v", volume]);
    }
    arguments.extend([DEBIAN, "--", "sh", "-c", BUILD, "sh", WATCH, first]);
    arguments.extend(paths);
    let running = Command::bulkhead(arguments).start();
    running.wait_for_output("ready\n");
    running
}

#[test]
fn a_change_on_the_host_is_told_to_who_watches_in_the_container() {
    let (dir, v) = volume();
    let path = |name: &str| dir.path().join(name);
    for (name, key) in [("1", "one"), ("2", "two")] {
        fs::create_dir(path(name)).unwrap();
        fs::write(path(name).join("key"), key).unwrap();
    }
    symlink("1", path("..data")).unwrap();
    fs::write(path("f"), "old").unwrap();
    let (other, _) = volume();
    let conf = other.path().join("conf");
    fs::write(&conf, "old").unwrap();
    let single = format!("{}:/etc/conf", conf.display());
    let paths = ["/v", "/v/f", "/v/1", "/etc/conf"];
    let run = watch("watches", &[&v, &single], "", &paths);

    fs::create_dir(path("new")).unwrap();
    run.wait_for_output("/v 40000100 new\n");
    fs::write(path("f"), "new").unwrap();
    run.wait_for_output("/v 2 f\n");
    run.wait_for_output("/v 8 f\n");
    run.wait_for_output("/v/f 8 \n");
    fs::set_permissions(path("f"), fs::Permissions::from_mode(0o640)).unwrap();
    run.wait_for_output("/v 4 f\n");
    fs::set_permissions(path("1"), fs::Permissions::from_mode(0o750)).unwrap();
    run.wait_for_output("/v 40000004 1\n");
    run.wait_for_output("/v/1 40000004 \n");
    fs::rename(path("f"), path("g")).unwrap();
    run.wait_for_output("/v 40 f\n/v 80 g pair\n");
    run.wait_for_output("/v/f 800 \n");
    fs::remove_file(path("g")).unwrap();
    run.wait_for_output("/v 200 g\n");
    run.wait_for_output("/v/f 400 \n");
    fs::write(&conf, "new").unwrap();
    run.wait_for_output("/etc/conf 8 \n");
    // As the kubelet changes a ConfigMap: whoever hears of it reads what is new.
    symlink("2", path("..data_tmp")).unwrap();
    fs::rename(path("..data_tmp"), path("..data")).unwrap();
    run.wait_for_output("/v 80 ..data pair\nkey two\n");
    fs::remove_dir_all(path("1")).unwrap();
    run.wait_for_output("/v/1 200 key\n");
    run.wait_for_output("/v/1 400 \n");
    run.wait_for_output("/v 40000200 1\n");
    fs::write(path("end"), "").unwrap();
    assert_eq!(run.wait().code, 0);
}

#[test]
fn the_guests_own_change_is_heard_once_and_that_of_another_pod_as_well() {
    let (_dir, v) = volume();
    let first = "mkdir /v/d; echo x > /v/f; mv /v/f /v/g; rm /v/g; echo done";
    let run = watch("hears-once", &[&v], first, &["/v"]);
    run.wait_for_output("done\n");
    debian(&v, "mkdir /v/end").success();
    assert_eq!(
        run.wait().success(),
        "ready\ndone\n/v 40000100 d\n/v 100 f\n/v 2 f\n/v 8 f\n/v 40 f\n/v 80 g pair\n/v 200 g\n\
         /v 40000100 end\n"
    );
}

/// Resident memory of all VMMs in KiB, but for that of their guests.
fn vmm_memory() -> u64 {
    let pids = Command::new("pgrep", ["-x", "bulkhead-vmm"])
        .run()
        .success();
    let mut sum = 0;
    for pid in pids.split_whitespace() {
        let mut is_small = false;
        for line in fs::read_to_string(format!("/proc/{pid}/smaps"))
            .unwrap()
            .lines()
        {
            let mut words = line.split_whitespace();
            match (words.next(), words.next().map(str::parse::<u64>)) {
                (Some("Size:"), Some(Ok(size))) => is_small = size < 200 << 10,
                (Some("Rss:"), Some(Ok(size))) if is_small => sum += size,
                _ => {}
            }
        }
    }
    sum
}

#[test]
fn a_host_that_changes_files_without_end_costs_a_watching_pod_no_memory() {
    let (dir, v) = volume();
    let run = watch("storm", &[&v], "", &["/v"]);
    let before = vmm_memory();
    for number in 0..10_000 {
        let name = dir.path().join(format!("{}", number % 100));
        let _ = fs::remove_file(&name);
        fs::write(&name, "x").unwrap();
    }
    let more = vmm_memory().saturating_sub(before);
    assert!(more < 2 << 10, "{more} KiB more");
    // Of so many changes some are lost; of those that come later none.
    let deadline = Instant::now() + Duration::from_secs(120);
    for number in 0.. {
        fs::write(dir.path().join(format!("end{number}")), "").unwrap();
        if !Path::new("/var/lib/bulkhead/containers/storm").exists() {
            break;
        }
        assert!(Instant::now() < deadline, "nothing is told any more");
        std::thread::sleep(Duration::from_millis(500));
    }
    assert_eq!(run.wait().code, 0);
}

#[test]
fn a_pod_that_hears_too_much_can_be_killed() {
    let (dir, v) = volume();
    let run = watch("too-much", &[&v], "sleep 1000", &["/v"]);
    for number in 0..5_000 {
        let name = dir.path().join(format!("{}", number % 100));
        let _ = fs::remove_file(&name);
        fs::write(&name, "x").unwrap();
    }
    Command::bulkhead(["kill", "too-much", "KILL"])
        .run()
        .success();
    assert_eq!(run.wait().code, 137);
}
