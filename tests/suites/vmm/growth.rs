//! Machines that grow and shrink while they run.

use std::{
    io,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use bulkhead_vmm::control::{Answer, Request, Status};

use crate::machine::{Machine, ask, attach, control};

/// What a guest does with what comes: it says what it has, each time that it changes.
const TELL: &str = "
    driver=/sys/bus/platform/drivers/virtio-mmio
    total() { awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo; }
    grown() { while [ $(($(total) - before)) -ne $1 ]; do sleep 0.1; done; echo has $1; }
    before=$(total)";

fn status(socket: &OwnedFd) -> Status {
    match ask(socket, Request::Status) {
        Some(Answer::Status(status)) => status,
        other => panic!("{other:?}"),
    }
}

fn wait_for_memory(socket: &OwnedFd, mib: u32) {
    let begun = Instant::now();
    while status(socket).memory_mib != mib {
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "{:?}",
            status(socket)
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn memory_comes_and_goes_while_the_guest_runs() -> io::Result<()> {
    let (its_end, socket) = control()?;
    let script = format!(
        "{TELL}\necho up
        until echo virtio-mmio.3 > $driver/bind; do sleep 0.1; done 2>/dev/null
        grown 256
        mkdir /big; mount -t tmpfs -o size=300m none /big
        head -c 220m /dev/zero > /big/file && echo used
        rm /big/file; echo 3 > /proc/sys/vm/drop_caches; echo freed
        grown 64
        grown 320
        poweroff -f"
    );
    let machine = Machine::running(&script).growing(0, 512);
    let mut running = machine.start_by_config(&its_end)?;
    drop(its_end);
    running.wait_for("up");
    let first = status(&socket);
    assert_eq!((first.memory_mib, first.most_memory_mib), (128, 640));
    assert_eq!((first.vcpus, first.most_vcpus), (1, 1));
    let memory = |mib| ask(&socket, Request::Memory { mib });
    let too_much = "641 MiB of memory are too many: 640 are the most";
    assert_eq!(memory(641), Some(Answer::Refused(too_much.into())));
    assert_eq!(memory(384), Some(Answer::Attached(3)));
    running.wait_for("has 256");
    assert_eq!(status(&socket).memory_mib, 384);
    running.wait_for("used");
    running.wait_for("freed");
    let used = running.resident_kib();
    assert!(used > 220 << 10, "{used} KiB");
    // What it gives back is the host's again.
    assert_eq!(memory(192), Some(Answer::Attached(3)));
    running.wait_for("has 64");
    wait_for_memory(&socket, 192);
    let left = running.resident_kib();
    assert!(left + (128 << 10) < used, "{left} KiB of {used}");
    assert_eq!(memory(448), Some(Answer::Attached(3)));
    running.wait_for("has 320");
    let (status, report) = running.finish();
    assert_eq!((status, &report["end"]), (Some(0), &"power_off".into()));
    Ok(())
}

#[test]
fn processors_come_while_the_guest_runs() -> io::Result<()> {
    let (its_end, socket) = control()?;
    let script = format!(
        "{TELL}\nnproc; cat /sys/devices/system/cpu/present; echo up
        cpus=/sys/devices/system/cpu
        until echo virtio-mmio.3 > $driver/bind; do sleep 0.1; done 2>/dev/null
        for n in 1 2; do echo 1 > $cpus/cpu$n/online && echo online; done
        nproc
        taskset 2 sh -c 'echo on 1'; taskset 4 sh -c 'echo on 2'
        echo 0 > $cpus/cpu2/online; nproc
        echo 1 > $cpus/cpu2/online; nproc
        poweroff -f"
    );
    let machine = Machine::running(&script).growing(3, 0).places(1);
    let mut running = machine.start_by_config(&its_end)?;
    drop(its_end);
    running.wait_for("1");
    running.wait_for("0-3");
    running.wait_for("up");
    let processors = |count| ask(&socket, Request::Processors { count });
    let too_many = "5 processors are too many: 4 are the most";
    assert_eq!(processors(5), Some(Answer::Refused(too_many.into())));
    assert_eq!(status(&socket).vcpus, 1);
    assert_eq!(processors(3), Some(Answer::Done));
    assert_eq!(processors(2), Some(Answer::Done), "none goes");
    assert_eq!(status(&socket).vcpus, 3);
    // The guest takes the disk for a sign.
    let disk = tempfile::tempfile()?;
    assert_eq!(attach(&socket, &disk, true), Some(Answer::Attached(3)));
    for line in ["online", "online", "3", "on 1", "on 2", "2", "3"] {
        running.wait_for(line);
    }
    let (status, report) = running.finish();
    assert_eq!((status, &report["end"]), (Some(0), &"power_off".into()));
    Ok(())
}

#[test]
fn a_machine_with_processors_that_came_later_is_paused_as_a_whole() -> io::Result<()> {
    let (its_end, socket) = control()?;
    let script = format!(
        "{TELL}\necho up
        until echo virtio-mmio.3 > $driver/bind; do sleep 0.1; done 2>/dev/null
        echo 1 > /sys/devices/system/cpu/cpu1/online
        taskset 2 sh -c 'while :; do :; done' &
        echo busy; sleep 1000"
    );
    let machine = Machine::running(&script).growing(1, 0).places(1);
    let mut running = machine.start_by_config(&its_end)?;
    drop(its_end);
    running.wait_for("up");
    // Made while the others stand still.
    assert_eq!(ask(&socket, Request::Pause), Some(Answer::Done));
    let made = ask(&socket, Request::Processors { count: 2 });
    assert_eq!(made, Some(Answer::Done));
    assert_eq!(ask(&socket, Request::Pause), Some(Answer::Done));
    assert!(status(&socket).paused);
    assert_eq!(ask(&socket, Request::Resume), Some(Answer::Done));
    let disk = tempfile::tempfile()?;
    assert_eq!(attach(&socket, &disk, true), Some(Answer::Attached(3)));
    running.wait_for("busy");
    for _ in 0..20 {
        assert_eq!(ask(&socket, Request::Pause), Some(Answer::Done));
        assert!(status(&socket).paused);
        let Some(Answer::Standing(words)) = ask(&socket, Request::Standing) else {
            panic!("it does not say where it stands");
        };
        assert!(words.contains("processor 1"), "{words}");
        assert_eq!(ask(&socket, Request::Resume), Some(Answer::Done));
    }
    drop(socket);
    let (status, report) = running.finish();
    assert_eq!((status, &report["end"]), (Some(17), &"orphaned".into()));
    Ok(())
}
