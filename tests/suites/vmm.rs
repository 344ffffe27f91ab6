//! `bulkhead-vmm` by itself: real kernels with a shell script as their first
//! process, each machine ended in each way that there is.
//!
//! Runs in the lab host, or wherever KVM, the guest kernel in /usr/share/bulkhead
//! and a static busybox are.
#![expect(
    clippy::tests_outside_test_module,
    reason = "the whole crate is a suite"
)]

#[path = "vmm/growth.rs"]
mod growth;
#[path = "vmm/machine.rs"]
mod machine;
#[path = "vmm/network.rs"]
mod network;

use std::{
    fs,
    io::{self, Read, Seek, SeekFrom, Write},
    os::{fd::AsRawFd, unix::fs::PermissionsExt},
};

use bulkhead_vmm::control::{Answer, Request};
use machine::{Machine, ask, attach, control, ended_with};

#[test]
fn power_off_ends_with_0_and_the_console_is_complete() {
    let end = Machine::running("echo one; echo two; uname -r; poweroff -f").run();
    ended_with(&end, 0, "The guest powered off");
    let lines: Vec<&str> = end.console.lines().map(str::trim_end).collect();
    assert_eq!(lines[..2], ["one", "two"]);
    assert!(lines[2].starts_with("6.12."), "{lines:?}");
}

#[test]
fn a_reboot_ends_with_10() {
    let end = Machine::running("reboot -f").run();
    ended_with(&end, 10, "The guest asked for a reset");
}

#[test]
fn a_panic_ends_with_11_and_the_kernels_words() {
    let end = Machine::running("echo c > /proc/sysrq-trigger").run();
    ended_with(
        &end,
        11,
        "The guest's kernel panicked: sysrq triggered crash",
    );
    let end = Machine::running("exit 3").run();
    let reason = "The guest's kernel panicked: Attempted to kill init! exitcode=0x00000300";
    ended_with(&end, 11, reason);
}

#[test]
fn a_triple_fault_ends_with_12() {
    let end = Machine::running("reboot -f").cmdline("reboot=t").run();
    ended_with(&end, 12, "The guest's processor shut down (triple fault)");
}

#[test]
fn what_cannot_start_ends_with_15_and_the_reason() {
    let check = |option: &str, value: &str, reason: &str| {
        let end = Machine::running("poweroff -f").option(option, value).run();
        ended_with(&end, 15, reason);
    };
    check(
        "--kernel",
        "/none",
        "Cannot open the kernel \"/none\": No such file or directory (os error 2)",
    );
    check(
        "--kernel",
        "/etc/passwd",
        "The kernel is not an uncompressed x86-64 ELF executable (vmlinux): no ELF header",
    );
    check(
        "--memory",
        "31M",
        "Guest memory of 31 MiB is not possible: 32 to 1048576 MiB are",
    );
    check(
        "--cpus",
        "65",
        "65 virtual processors are not possible: 1 to 64 are",
    );
}

#[test]
fn all_processors_and_all_memory_come_up() {
    let script = "nproc; grep MemTotal /proc/meminfo; poweroff -f";
    let end = Machine::running(script)
        .option("--cpus", "4")
        .option("--memory", "3500M")
        .run();
    ended_with(&end, 0, "The guest powered off");
    let mut lines = end.console.lines();
    assert_eq!(lines.next().map(str::trim_end), Some("4"));
    let total: u64 = lines
        .next()
        .and_then(|line| line.split_whitespace().nth(1))
        .and_then(|number| number.parse().ok())
        .expect("MemTotal");
    assert!((3300 << 10..3500 << 10).contains(&total), "{total} KiB");
}

#[test]
fn what_is_typed_reaches_the_guest() {
    let end = Machine::running("echo ready; read line; echo \"got $line\"; poweroff -f")
        .input_after("ready", "some words\n")
        .run();
    ended_with(&end, 0, "The guest powered off");
    assert!(end.console.contains("got some words"), "{}", end.console);
}

#[test]
fn much_output_is_neither_lost_nor_changed() {
    let script = "i=0; while [ $i -lt 200 ]; do echo \"line $i\"; i=$((i+1)); done; poweroff -f";
    let end = Machine::running(script).run();
    ended_with(&end, 0, "The guest powered off");
    let expected: String = (0..200).map(|i| format!("line {i}\n")).collect();
    // The kernel has the last word.
    let console = end.console.replace('\r', "");
    let (own, kernels) = console.split_at(expected.len().min(console.len()));
    assert!(own == expected, "{console}");
    assert!(
        kernels.lines().all(|line| line.starts_with('[')),
        "{kernels}"
    );
}

#[test]
fn disks_are_read_and_written_and_a_read_only_one_is_not() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (writable, fixed) = (dir.path().join("writable"), dir.path().join("fixed"));
    fs::write(&writable, vec![b'w'; 1 << 20]).expect("disk");
    fs::write(&fixed, vec![b'f'; 1 << 20]).expect("disk");
    let script = "head -c 3 /dev/vda; head -c 3 /dev/vdb; echo;
        printf new | dd of=/dev/vda bs=3 seek=1 conv=fsync 2>/dev/null && echo written;
        printf new | dd of=/dev/vdb bs=3 seek=1 conv=fsync 2>/dev/null || echo refused;
        cat /sys/block/vda/serial; echo; poweroff -f";
    let end = Machine::running(script)
        .option("--disk", writable.to_str().expect("UTF-8"))
        .option("--disk", &format!("{}:ro", fixed.display()))
        .run();
    ended_with(&end, 0, "The guest powered off");
    let lines: Vec<&str> = end.console.lines().map(str::trim_end).collect();
    assert_eq!(lines[..4], ["wwwfff", "written", "refused", "bulkhead-0"]);
    assert_eq!(&fs::read(&writable).expect("disk")[..8], b"wwwnewww");
    assert!(
        fs::read(&fixed)
            .expect("disk")
            .iter()
            .all(|byte| *byte == b'f')
    );
}

/// What a guest does with disks that come: it reads and writes the first sector of
/// each, lets go of it, and says so.
const WITH_EACH_DISK: &str = "
    driver=/sys/bus/platform/drivers/virtio-mmio
    use() {
        until echo virtio-mmio.$1 > $driver/bind; do sleep 0.1; done 2>/dev/null
        disk=$(ls /sys/bus/platform/devices/virtio-mmio.$1/virtio*/block)
        head -c 3 /dev/$disk; echo
        printf new | dd of=/dev/$disk bs=3 seek=1 conv=fsync 2>/dev/null || echo refused
        [ -n \"$2\" ] || echo virtio-mmio.$1 > $driver/unbind
        echo done
    }";

fn disk(content: u8) -> io::Result<fs::File> {
    let mut file = tempfile::tempfile()?;
    file.write_all(&[content; 4096])?;
    Ok(file)
}

fn content(mut disk: &fs::File) -> io::Result<String> {
    let mut start = [0; 8];
    disk.seek(SeekFrom::Start(0))?;
    disk.read_exact(&mut start)?;
    Ok(String::from_utf8_lossy(&start).into_owned())
}

#[test]
fn disks_come_and_go_while_the_guest_runs() -> io::Result<()> {
    let (its_end, socket) = control()?;
    // The first disk may still be at the place that the last one gets.
    let last = "until echo virtio-mmio.3 > $driver/bind &&
            disk=$(ls /sys/bus/platform/devices/virtio-mmio.3/virtio*/block) &&
            [ \"$(head -c 3 /dev/$disk)\" = 444 ]; do
            echo virtio-mmio.3 > $driver/unbind; sleep 0.1
        done 2>/dev/null
        echo virtio-mmio.3 > $driver/unbind";
    let script = format!("{WITH_EACH_DISK}\necho up; use 3; use 4\n{last}\nuse 3; poweroff -f");
    let mut running = Machine::running(&script)
        .places(2)
        .start_by_config(&its_end)?;
    drop(its_end);
    running.wait_for("up");
    let [first, second, third, fourth] = [disk(b'1')?, disk(b'2')?, disk(b'3')?, disk(b'4')?];
    assert_eq!(attach(&socket, &first, false), Some(Answer::Attached(3)));
    assert_eq!(attach(&socket, &second, true), Some(Answer::Attached(4)));
    let full = Answer::Refused("all 2 places for disks are taken".into());
    assert_eq!(attach(&socket, &third, false), Some(full));
    running.wait_for("111");
    running.wait_for("done");
    running.wait_for("222");
    running.wait_for("refused");
    running.wait_for("done");
    let gone = ask(&socket, Request::Detach { device: 3 });
    assert_eq!(gone, Some(Answer::Done));
    let twice = Answer::Refused("nothing was attached as device 3".into());
    assert_eq!(ask(&socket, Request::Detach { device: 3 }), Some(twice));
    // The place and its thread serve the next one.
    assert_eq!(attach(&socket, &fourth, false), Some(Answer::Attached(3)));
    running.wait_for("444");
    let (status, report) = running.finish();
    assert_eq!((status, &report["end"]), (Some(0), &"power_off".into()));
    assert_eq!(content(&first)?, "111new11");
    assert_eq!(content(&second)?, "22222222");
    assert_eq!(content(&fourth)?, "444new44");
    Ok(())
}

#[test]
fn a_disk_that_the_guest_keeps_is_taken_from_it() -> io::Result<()> {
    let (its_end, socket) = control()?;
    let script = format!(
        "{WITH_EACH_DISK}\necho up; use 3 keep
        dd if=/dev/vda of=/dev/null bs=512 count=1 iflag=direct"
    );
    let mut running = Machine::running(&script)
        .places(1)
        .start_by_config(&its_end)?;
    drop(its_end);
    running.wait_for("up");
    let disk = disk(b'1')?;
    assert_eq!(attach(&socket, &disk, false), Some(Answer::Attached(3)));
    running.wait_for("done");
    let gone = ask(&socket, Request::Detach { device: 3 });
    assert_eq!(gone, Some(Answer::Done));
    // Nobody answers what it asks, but the machine can be asked and ends as always.
    assert!(matches!(
        ask(&socket, Request::Status),
        Some(Answer::Status(_))
    ));
    drop(socket);
    let (status, report) = running.finish();
    assert_eq!((status, &report["end"]), (Some(17), &"orphaned".into()));
    Ok(())
}

#[test]
fn entropy_comes_from_the_host() {
    let script =
        "cat /sys/class/misc/hw_random/rng_current; head -c 64 /dev/hwrng | wc -c; poweroff -f";
    let end = Machine::running(script).option("--rng", "").run();
    ended_with(&end, 0, "The guest powered off");
    let lines: Vec<&str> = end.console.lines().map(str::trim_end).collect();
    assert_eq!(lines[..2], ["virtio_rng.0", "64"]);
}

#[test]
fn a_directory_is_shared_and_a_read_only_one_refuses_writes() {
    let dir = tempfile::tempdir().expect("temporary directory");
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("mode");
    fs::write(dir.path().join("hello"), "from the host\n").expect("file");
    let script = "mkdir /a /b; mount -t virtiofs a /a; mount -t virtiofs b /b;
        cat /a/hello; echo from the guest > /a/answer; cat /b/answer;
        touch /b/new || echo refused; poweroff -f";
    let end = Machine::running(script)
        .option("--share", &format!("a={}", dir.path().display()))
        .option("--share", &format!("b={}:ro", dir.path().display()))
        .run();
    ended_with(&end, 0, "The guest powered off");
    let lines: Vec<&str> = end.console.lines().map(str::trim_end).collect();
    assert_eq!(lines[..2], ["from the host", "from the guest"]);
    assert!(lines.contains(&"refused"), "{lines:?}");
    let answer = fs::read_to_string(dir.path().join("answer")).expect("answer");
    assert_eq!(answer, "from the guest\n");
    assert!(!dir.path().join("new").exists());
}

#[test]
fn a_boot_with_file_system_and_vsock_stays_within_60_exits() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let end = Machine::running("poweroff -f")
        .without_console()
        .option("--share", &format!("a={}", dir.path().display()))
        .option("--vsock", dir.path().to_str().expect("UTF-8"))
        .option("--rng", "")
        .run();
    ended_with(&end, 0, "The guest powered off");
    let count = |kind: &str| end.stats["exits"][kind].as_u64().expect("a number");
    let exits = count("port") + count("mmio") + count("other");
    assert!(exits <= 60, "{}", end.stats);
}

#[test]
fn the_machine_ends_with_whoever_started_it() -> io::Result<()> {
    let (its_end, parent) = control()?;
    let machine = Machine::running("echo up; sleep 1000");
    let mut running = machine.start_by_config(&its_end)?;
    running.wait_for("up");
    drop(parent);
    let (status, report) = running.finish();
    assert_eq!(status, Some(17));
    assert_eq!(report["end"], "orphaned");
    assert_eq!(
        report["reason"],
        "Whoever started the virtual machine is gone"
    );
    assert_eq!(report["console"][0], "up");
    Ok(())
}

#[test]
fn an_idle_machine_takes_at_most_5_mib_beside_the_guests_memory() -> io::Result<()> {
    let (its_end, parent) = control()?;
    let machine = Machine::running("echo up; sleep 1000");
    let mut running = machine.start_by_config(&its_end)?;
    running.wait_for("up");
    let resident = running.resident_beside_guest_kib();
    assert!(resident <= 5 << 10, "{resident} KiB");
    assert!(parent.as_raw_fd() >= 0);
    drop(parent);
    running.finish();
    Ok(())
}

#[test]
fn a_guest_survives_being_paused_again_and_again() -> io::Result<()> {
    let (its_end, socket) = control()?;
    let machine = Machine::running(
        "echo up; i=0; while [ $i -lt 300 ]; do echo \"line $i\"; i=$((i+1)); done; poweroff -f",
    );
    let mut running = machine.start_by_config(&its_end)?;
    running.wait_for("up");
    drop(its_end);
    let mut paused = 0;
    // Until it has ended: then nobody answers.
    while let Some(answer) = ask(&socket, Request::Pause) {
        assert_eq!(answer, Answer::Done);
        match ask(&socket, Request::Status) {
            Some(Answer::Status(status)) => assert!(status.paused),
            other => panic!("{other:?}"),
        }
        assert_eq!(ask(&socket, Request::Resume), Some(Answer::Done));
        paused += 1;
    }
    assert!(paused > 0);
    running.wait_for("line 299");
    let (status, report) = running.finish();
    assert_eq!((status, &report["end"]), (Some(0), &"power_off".into()));
    Ok(())
}
