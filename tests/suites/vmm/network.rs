//! Network interfaces that come and go while the guest runs.

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::fd::OwnedFd,
    process::Command,
    thread,
    time::Duration,
};

use bulkhead_vmm::control::{Answer, Request};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    thread::{UnshareFlags, unshare_unsafe},
};

use crate::machine::{Machine, Running, ask, attach_interface, control};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 5];
/// More than any queue, buffer of a socket, or segment holds.
const MUCH: usize = 24 << 20;

/// What a guest does with an interface that comes.
const USE: &str = "
    driver=/sys/bus/platform/drivers/virtio-mmio
    bound() { until echo virtio-mmio.3 > $driver/bind; do sleep 0.1; done 2>/dev/null; }
    up() { ip addr add 10.9.0.2/24 dev eth0; ip link set eth0 up; }";

/// A tap in a network namespace that this thread has for itself, and that ends with it.
struct Tap(OwnedFd);

impl Tap {
    fn new(mtu: &str) -> Tap {
        let file = bulkhead_vmm::tap::make("tap0").expect("a tap");
        for line in [
            &format!("link set tap0 mtu {mtu} up"),
            "addr add 10.9.0.1/24 dev tap0",
        ] {
            let ip = Command::new("ip").args(line.split(' ')).status();
            assert!(ip.expect("ip").success(), "{line}");
        }
        Tap(file.into())
    }
}

/// Runs a test in a network namespace.
fn apart(test: impl FnOnce() -> io::Result<()> + Send) -> io::Result<()> {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: descriptors stay shared.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.expect("a network namespace");
            test()
        });
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn pattern(len: usize) -> Vec<u8> {
    (0..=250).cycle().take(len).collect()
}

/// Waits for a connection, but not for ever.
fn accept(listener: &TcpListener, socket: &OwnedFd) -> io::Result<TcpStream> {
    let limit = Timespec {
        tv_sec: 60,
        tv_nsec: 0,
    };
    let mut ready = [PollFd::new(listener, PollFlags::IN)];
    if poll(&mut ready, Some(&limit))? == 0 {
        let passed = ask(socket, Request::Interfaces);
        let paused = ask(socket, Request::Pause);
        let stands = ask(socket, Request::Standing);
        panic!("nobody comes: {passed:?} {paused:?} {stands:?}");
    }
    let stream = listener.accept()?.0;
    let limit = Some(Duration::from_secs(60));
    stream.set_read_timeout(limit)?;
    stream.set_write_timeout(limit)?;
    Ok(stream)
}

/// The guest fetches much, and sends it back.
fn exchange(running: &mut Running, socket: &OwnedFd, much: usize) -> io::Result<()> {
    let from = TcpListener::bind((Ipv4Addr::new(10, 9, 0, 1), 8000))?;
    let to = TcpListener::bind((Ipv4Addr::new(10, 9, 0, 1), 8001))?;
    running.wait_for("asks");
    let sent = pattern(much);
    accept(&from, socket)?.write_all(&sent)?;
    let mut came = Vec::new();
    accept(&to, socket)?.read_to_end(&mut came)?;
    assert!(came == sent, "{} bytes of {much}", came.len());
    Ok(())
}

const EXCHANGE: &str = "echo asks; nc 10.9.0.1 8000 < /dev/null > /much; nc 10.9.0.1 8001 < /much";

#[test]
fn an_interface_comes_carries_megabytes_both_ways_and_goes() -> io::Result<()> {
    apart(|| {
        let (its_end, socket) = control()?;
        let script = format!(
            "{USE}\necho up; bound; cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu
            up; {EXCHANGE}
            echo virtio-mmio.3 > $driver/unbind; ls /sys/class/net; echo gone
            until bound && [ $(cat /sys/class/net/eth0/mtu) = 9000 ]; do
                # It is the first one as yet.
                echo virtio-mmio.3 > $driver/unbind; sleep 0.1
            done
            echo again; up; {EXCHANGE}; poweroff -f"
        );
        let machine = Machine::running(&script).interfaces(2);
        let mut running = machine.start_by_config(&its_end)?;
        drop(its_end);
        running.wait_for("up");
        let tap = Tap::new("1500");
        let attached = attach_interface(&socket, &tap.0, MAC, 1500);
        assert_eq!(attached, Some(Answer::Attached(3)));
        // The machine has it by now.
        drop(tap);
        running.wait_for("02:00:00:00:00:05");
        running.wait_for("1500");
        exchange(&mut running, &socket, MUCH)?;
        running.wait_for("gone");
        let Some(Answer::Interfaces(interfaces)) = ask(&socket, Request::Interfaces) else {
            panic!("it does not say what has passed");
        };
        let [(3, totals)] = interfaces[..] else {
            panic!("{interfaces:?}");
        };
        let much = u64::try_from(MUCH).expect("64 bits");
        assert!(
            totals.received_bytes > much && totals.transmitted_bytes > much,
            "{totals:?}"
        );
        // In segments, and none was lost.
        assert!(
            totals.received_bytes / totals.received_frames > 3000,
            "{totals:?}"
        );
        assert_eq!(totals.transmitted_dropped, 0, "{totals:?}");
        let detached = ask(&socket, Request::Detach { device: 3 });
        assert_eq!(detached, Some(Answer::Done));
        let none = ask(&socket, Request::Interfaces);
        assert_eq!(none, Some(Answer::Interfaces(Vec::new())));
        let tap = Tap::new("9000");
        let attached = attach_interface(&socket, &tap.0, MAC, 9000);
        assert_eq!(attached, Some(Answer::Attached(3)));
        drop(tap);
        running.wait_for("again");
        exchange(&mut running, &socket, MUCH)?;
        let (status, report) = running.finish();
        assert_eq!((status, &report["end"]), (Some(0), &"power_off".into()));
        Ok(())
    })
}

#[test]
fn what_is_no_interface_is_refused_and_the_place_stays_free() -> io::Result<()> {
    apart(|| {
        let (its_end, socket) = control()?;
        let machine = Machine::running("echo up; sleep 1000").interfaces(1);
        let mut running = machine.start_by_config(&its_end)?;
        drop(its_end);
        running.wait_for("up");
        let tap = Tap::new("1500");
        let refused = |why: &str| Some(Answer::Refused(why.into()));
        for (mac, mtu, why) in [
            (
                MAC,
                67,
                "the device cannot be used: The MTU is less than 68",
            ),
            (
                [1, 0, 0, 0, 0, 5],
                1500,
                "the device cannot be used: The MAC address is none of one station",
            ),
        ] {
            assert_eq!(attach_interface(&socket, &tap.0, mac, mtu), refused(why));
        }
        let attached = attach_interface(&socket, &tap.0, MAC, 1500);
        assert_eq!(attached, Some(Answer::Attached(3)));
        let full = "all 1 places for interfaces are taken";
        let attached = attach_interface(&socket, &tap.0, MAC, 1500);
        assert_eq!(attached, refused(full));
        let disk = tempfile::tempfile()?;
        let none = "the machine has no places for disks";
        assert_eq!(crate::machine::attach(&socket, &disk, true), refused(none));
        drop(socket);
        running.finish();
        Ok(())
    })
}
