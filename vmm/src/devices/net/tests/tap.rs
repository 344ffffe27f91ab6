//! The device with taps of this machine's kernel, each in a network namespace of its
//! own.

use std::{
    fs,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    thread::UnshareFlags,
};

use super::*;
use crate::{event_loop::event_fd, exit::Ending};

const NAME: &str = "tap0";
const PORT: u16 = 5000;

/// How long a test waits for what does not come.
const LIMIT: Duration = Duration::from_secs(30);

/// Bytes that go each way.
const AMOUNT: usize = 24 << 20;

/// An interface of this thread's namespace.
struct Interface {
    tap: OwnedFd,
    control: OwnedFd,
}

fn request() -> libc::ifreq {
    // SAFETY: all zeroes is a request without a name.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(NAME.bytes()) {
        *to = from.cast_signed();
    }
    request
}

/// One of the calls whose argument is a pointer to what the kernel reads or fills.
fn ioctl<T>(fd: &OwnedFd, number: libc::c_ulong, argument: &mut T) -> io::Result<()> {
    // SAFETY: each caller gives what the call has for an argument, and nobody else has it.
    done(unsafe { libc::ioctl(fd.as_raw_fd(), number, &raw mut *argument) })
}

fn done(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

impl Interface {
    /// Takes this thread into a network namespace of its own, with one tap in it.
    fn new() -> io::Result<Interface> {
        // SAFETY: only this thread's network is another one.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
        let tap = crate::tap::make(NAME)?.into();
        // No address is tried out first. Where there is no IPv6 it is said later.
        for interface in ["all", NAME] {
            let path = format!("/proc/sys/net/ipv6/conf/{interface}/accept_dad");
            let _ = fs::write(path, "0");
        }
        let control = net::socket(AddressFamily::INET, SocketType::DGRAM, None)?;
        let interface = Interface { tap, control };
        interface.set_up(true)?;
        Ok(interface)
    }

    fn set_up(&self, up: bool) -> io::Result<()> {
        let mut request = request();
        let flags = if up { libc::IFF_UP } else { 0 };
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap();
        ioctl(&self.control, libc::SIOCSIFFLAGS, &mut request)
    }

    /// Gives it an address, in a network of 256 or of all with the same first half.
    fn set_address(&self, address: IpAddr) -> io::Result<()> {
        match address {
            IpAddr::V4(address) => {
                for (number, octets) in [
                    (libc::SIOCSIFADDR, address.octets()),
                    (libc::SIOCSIFNETMASK, [255, 255, 255, 0]),
                ] {
                    let mut request = request();
                    let [a, b, c, d] = octets.map(u8::cast_signed);
                    request.ifr_ifru.ifru_addr = libc::sockaddr {
                        sa_family: libc::sa_family_t::try_from(libc::AF_INET).unwrap(),
                        sa_data: [0, 0, a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0],
                    };
                    ioctl(&self.control, number, &mut request)?;
                }
                Ok(())
            }
            IpAddr::V6(address) => {
                let mut request = libc::in6_ifreq {
                    ifr6_addr: libc::in6_addr {
                        s6_addr: address.octets(),
                    },
                    ifr6_prefixlen: 64,
                    ifr6_ifindex: self.index()?,
                };
                let control = net::socket(AddressFamily::INET6, SocketType::DGRAM, None)?;
                ioctl(&control, libc::SIOCSIFADDR, &mut request)
            }
        }
    }

    fn index(&self) -> io::Result<i32> {
        let mut request = request();
        ioctl(&self.control, libc::SIOCGIFINDEX, &mut request)?;
        // SAFETY: the call has just filled this field.
        Ok(unsafe { request.ifr_ifru.ifru_ifindex })
    }

    /// `ip link delete`, in a thread of its namespace.
    fn remove(&self) -> io::Result<()> {
        let netlink = net::socket(AddressFamily::NETLINK, SocketType::RAW, None)?;
        let mut message = Vec::new();
        // Length, RTM_DELLINK, NLM_F_REQUEST and NLM_F_ACK, sequence, sender.
        message.extend(32_u32.to_ne_bytes());
        message.extend(17_u16.to_ne_bytes());
        message.extend(5_u16.to_ne_bytes());
        message.extend([0; 8]);
        // Family and type, index, flags and their mask.
        message.extend([0; 4]);
        message.extend(self.index()?.to_ne_bytes());
        message.extend([0; 8]);
        net::send(&netlink, &message, SendFlags::empty())?;
        let mut answer = [0; 64];
        net::recv(&netlink, &mut answer[..], RecvFlags::empty())?;
        match i32::from_ne_bytes(answer[16..20].try_into().unwrap()) {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(-error)),
        }
    }

    fn guest(&self) -> Guest {
        let tap = self.tap.try_clone().unwrap();
        let (_, nobody) = pair();
        Guest::at(tap, nobody, feature::OFFERED, usize::from(QUEUE), BUFFER)
    }
}

/// Runs `test` with an interface in a thread of its own, where that can be had.
fn with_interface<T: Send>(test: impl FnOnce(&Interface) -> T + Send) -> Option<T> {
    thread::scope(|scope| {
        let thread = scope.spawn(|| match Interface::new() {
            Ok(interface) => Some(test(&interface)),
            Err(error) => {
                println!("skipped: no tap can be made: {error}");
                None
            }
        });
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Gives what one guest has received to the other to send.
fn relay(from: &mut Guest, to: &mut Guest, longest: &mut usize) {
    let mut any = false;
    while let Some((header, bytes)) = from.received() {
        *longest = bytes.len().max(*longest);
        to.tx.all_used();
        to.send(header, &bytes);
        any = true;
    }
    if any {
        to.tx.notify();
        from.offer(from.free.len());
        from.rx.notify();
    }
}

fn limit(stream: &TcpStream) {
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.set_write_timeout(Some(LIMIT)).unwrap();
}

/// An address may take a moment until it can be used.
fn connect(address: SocketAddr) -> TcpStream {
    let deadline = Instant::now() + LIMIT;
    loop {
        match TcpStream::connect_timeout(&address, LIMIT) {
            Ok(stream) => {
                limit(&stream);
                return stream;
            }
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        thread::yield_now();
    }
}

/// A connection over two taps and two guests, who pass on frames as they are.
fn talk(server: IpAddr, client: IpAddr) {
    let (to_main, taps) = mpsc::channel();
    let (go, wait) = mpsc::channel::<()>();
    let content = || (0..AMOUNT).map(|at| u8::try_from(at / 3 % 251).unwrap());
    let check = move |stream: &mut TcpStream| {
        let mut got = vec![0; AMOUNT];
        stream.read_exact(&mut got).unwrap();
        assert!(got.into_iter().eq(content()));
    };
    let content = move || content().collect::<Vec<_>>();
    thread::scope(|scope| {
        let sender = to_main.clone();
        let served = scope.spawn(move || {
            with_interface(move |interface| {
                interface.set_address(server).unwrap();
                let any: IpAddr = match server {
                    IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                    IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
                };
                let listener = TcpListener::bind((any, PORT)).unwrap();
                sender.send(interface.guest()).unwrap();
                let mut ready = [PollFd::new(&listener, PollFlags::IN)];
                poll(&mut ready, Some(&Timespec::try_from(LIMIT).unwrap())).unwrap();
                listener.set_nonblocking(true).unwrap();
                let (mut stream, _) = listener.accept().unwrap();
                stream.set_nonblocking(false).unwrap();
                limit(&stream);
                check(&mut stream);
                stream.write_all(&content()).unwrap();
                // The other end closes first.
                stream.read_exact(&mut [0]).unwrap_err();
            })
        });
        let asked = scope.spawn(move || {
            with_interface(move |interface| {
                interface.set_address(client).unwrap();
                to_main.send(interface.guest()).unwrap();
                wait.recv().unwrap();
                let mut stream = connect((server, PORT).into());
                stream.write_all(&content()).unwrap();
                check(&mut stream);
            })
        });
        let next = || taps.recv_timeout(LIMIT).ok();
        let (Some(mut one), Some(mut other)) = (next(), next()) else {
            return;
        };
        for guest in [&one, &other] {
            guest.events.spawn(Ending::new().unwrap()).unwrap();
        }
        go.send(()).unwrap();
        let mut longest = [0; 2];
        while !(served.is_finished() && asked.is_finished()) {
            let (first, second) = (Arc::clone(&one.irq), Arc::clone(&other.irq));
            let mut ready = [
                PollFd::from_borrowed_fd(event_fd(&first), PollFlags::IN),
                PollFd::from_borrowed_fd(event_fd(&second), PollFlags::IN),
            ];
            let limit = Timespec {
                tv_sec: 5,
                tv_nsec: 0,
            };
            poll(&mut ready, Some(&limit)).unwrap();
            let _ = (first.read(), second.read());
            relay(&mut one, &mut other, &mut longest[0]);
            relay(&mut other, &mut one, &mut longest[1]);
        }
        assert!(served.join().unwrap().is_some() && asked.join().unwrap().is_some());
        for (guest, longest) in [&one, &other].into_iter().zip(longest) {
            let counters = guest.counters();
            assert!(longest > 20_000, "{longest}: the host makes no segments");
            let total = AMOUNT as u64;
            for passed in [&counters.received, &counters.transmitted] {
                assert!((total..total * 2).contains(&value(&passed.bytes)));
                assert!(value(&passed.frames) < total / 1500, "segments");
            }
            for dropped in [
                &counters.unfit,
                &counters.not_negotiated,
                &counters.unusable,
                &counters.malformed,
                &counters.refused,
            ] {
                assert_eq!(value(dropped), 0, "{counters:?}");
            }
        }
    });
}

#[test]
fn two_hosts_talk_over_two_guests_in_large_frames() {
    talk(
        Ipv4Addr::new(10, 0, 0, 1).into(),
        Ipv4Addr::new(10, 0, 0, 2).into(),
    );
}

#[test]
fn two_hosts_talk_over_two_guests_in_large_frames_of_ipv6() {
    let address = |last| Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last).into();
    talk(address(1), address(2));
}

/// A frame of a kind that no host answers.
fn experiment() -> Vec<u8> {
    let mut bytes = frame(100, 1);
    bytes[..6].fill(0xff);
    bytes[6..12].copy_from_slice(&OPTIONS.mac);
    bytes[12..14].copy_from_slice(&[0x88, 0xb5]);
    bytes
}

#[test]
fn an_interface_that_is_down_refuses_frames_and_takes_them_again_f47() {
    with_interface(|interface| {
        let mut guest = interface.guest();
        let counters = guest.counters();
        for (up, transmitted, refused) in [(false, 0, 1), (true, 1, 1), (false, 1, 2)] {
            interface.set_up(up).unwrap();
            guest.send(plain(), &experiment());
            guest.notify_sent();
            assert_eq!(value(&counters.transmitted.frames), transmitted);
            assert_eq!(value(&counters.refused), refused);
        }
        assert_eq!(guest.tx.all_used().len(), 3);
    });
}

#[test]
fn an_interface_that_is_removed_ends_nothing_f47() {
    with_interface(|interface| {
        let mut guest = interface.guest();
        interface.remove().unwrap();
        // It is told of once.
        guest.turns();
        for _ in 0..3 {
            guest.send(plain(), &experiment());
            guest.notify_sent();
            guest.rx.notify();
            guest.turns();
        }
        assert_eq!(value(&guest.counters().refused), 3);
        assert_eq!(guest.tx.all_used().len(), 3);
    });
}

#[test]
fn the_kernel_takes_whatever_header_the_device_lets_pass() {
    with_interface(|interface| {
        let mut guest = interface.guest();
        let counters = guest.counters();
        // Of IPv4 and TCP as far as the kernel looks.
        let mut bytes = experiment();
        bytes.resize(3000, 0);
        bytes[12..34].copy_from_slice(&[
            8, 0, 0x45, 0, 0x0b, 0xaa, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1,
        ]);
        bytes[46] = 5 << 4;
        let sum_only = Header {
            gso_type: NONE,
            ..to_be_cut()
        };
        guest.send(to_be_cut(), &bytes);
        guest.send(sum_only, &bytes[..1000]);
        guest.send(plain(), &bytes[..14]);
        guest.send(
            Header {
                hdr_len: 0,
                gso_size: 8,
                ..to_be_cut()
            },
            &bytes,
        );
        guest.notify_sent();
        assert_eq!(value(&counters.transmitted.frames), 4, "{counters:?}");
    });
}
