//! `bench-net-inside SERVER [OWN]`: what a program can exchange with a server; for each
//! step a line with what it took in nanoseconds. A static program: it runs in any container,
//! and with an address of its `OWN` as the first process of a virtual machine, whose `eth0`
//! gets that address, in a network of 24 bits.
//!
//! A connection begins with a letter and a number of 4 bytes, low byte first: `u` and so many
//! KiB go to the server, which says that it has them by a byte; `d` and so many come from
//! it; `r` and so many messages go there and come back.

#![expect(clippy::print_stdout, reason = "the lines are what it is for")]

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddrV4, TcpStream},
    os::fd::AsRawFd,
    thread,
    time::Instant,
};

use anyhow::{Context, Result, ensure};

/// Where the server listens.
const PORT: u16 = 7000;
/// KiB of a stream, over all of its connections.
const STREAM: u32 = 32 << 10;
/// Messages, over all connections.
const MESSAGES: u32 = 2_000;
/// A message.
const MESSAGE: [u8; 64] = [b'm'; 64];
/// Short connections, one after the other.
const CONNECTIONS: u32 = 100;

fn main() -> Result<()> {
    let mut given = std::env::args().skip(1);
    let server: Ipv4Addr = given.next().context("no server is named")?.parse()?;
    let own: Option<Ipv4Addr> = given.next().map(|own| own.parse()).transpose()?;
    let set_up = own.map_or(Ok(()), set_up);
    let result = set_up.and_then(|()| measure(SocketAddrV4::new(server, PORT)));
    if let Err(error) = &result {
        println!("failed {error:#}");
    }
    if own.is_some() {
        rustix::system::reboot(rustix::system::RebootCommand::Restart)?;
    }
    result
}

/// Gives `eth0` an address.
fn set_up(own: Ipv4Addr) -> Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: all zeroes is a request without a name.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(*b"eth0") {
        *to = from.cast_signed();
    }
    let address = |octets: [u8; 4]| {
        let mut address = libc::sockaddr {
            sa_family: libc::sa_family_t::try_from(libc::AF_INET)?,
            sa_data: [0; 14],
        };
        // Behind the port.
        for (to, from) in address.sa_data[2..].iter_mut().zip(octets) {
            *to = from.cast_signed();
        }
        Ok::<_, anyhow::Error>(address)
    };
    let up = libc::c_short::try_from(libc::IFF_UP)?;
    for (what, value) in [
        (libc::SIOCSIFADDR, Some(address(own.octets())?)),
        (libc::SIOCSIFNETMASK, Some(address([255, 255, 255, 0])?)),
        (libc::SIOCSIFFLAGS, None),
    ] {
        match value {
            Some(address) => request.ifr_ifru.ifru_addr = address,
            None => request.ifr_ifru.ifru_flags = up,
        }
        // SAFETY: these read a `struct ifreq`.
        let done = unsafe { libc::ioctl(socket.as_raw_fd(), what, &raw const request) };
        ensure!(done == 0, "eth0: {}", std::io::Error::last_os_error());
    }
    Ok(())
}

/// A connection with its first words.
fn connect(server: SocketAddrV4, letter: u8, number: u32) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(server)?;
    stream.set_nodelay(true)?;
    let [a, b, c, d] = number.to_le_bytes();
    stream.write_all(&[letter, a, b, c, d])?;
    Ok(stream)
}

fn measure(server: SocketAddrV4) -> Result<()> {
    // The first connection finds the neighbour, and is not measured.
    exchange_on(connect(server, b'r', 1)?, 1)?;
    for connections in [1, 8] {
        step("stream out", connections, server, send)?;
        step("stream in", connections, server, receive)?;
        step("messages", connections, server, exchange)?;
    }
    step("connections", 1, server, |server, _| {
        for _ in 0..CONNECTIONS {
            exchange_on(connect(server, b'r', 1)?, 1)?;
        }
        Ok(())
    })
}

/// Does something on so many connections at once, each its part of the whole.
fn step(
    name: &str,
    connections: u32,
    server: SocketAddrV4,
    work: fn(SocketAddrV4, u32) -> Result<()>,
) -> Result<()> {
    let began = Instant::now();
    let threads: Vec<_> = (0..connections)
        .map(|_| thread::spawn(move || work(server, connections)))
        .collect();
    for thread in threads {
        let done = thread.join().ok().context("a thread panicked")?;
        done.with_context(|| name.to_owned())?;
    }
    println!("{name}, {connections} {}", began.elapsed().as_nanos());
    Ok(())
}

fn send(server: SocketAddrV4, parts: u32) -> Result<()> {
    let mut stream = connect(server, b'u', STREAM / parts)?;
    let block = vec![b'x'; 64 << 10];
    for _ in 0..STREAM / parts / 64 {
        stream.write_all(&block)?;
    }
    Ok(stream.read_exact(&mut [0])?)
}

fn receive(server: SocketAddrV4, parts: u32) -> Result<()> {
    let mut stream = connect(server, b'd', STREAM / parts)?;
    let mut block = vec![0; 64 << 10];
    let mut left = u64::from(STREAM / parts) << 10;
    while left > 0 {
        let count = stream.read(&mut block)?;
        ensure!(count > 0, "the server ended it");
        left = left.saturating_sub(u64::try_from(count)?);
    }
    Ok(())
}

fn exchange(server: SocketAddrV4, parts: u32) -> Result<()> {
    let count = MESSAGES / parts;
    exchange_on(connect(server, b'r', count)?, count)
}

fn exchange_on(mut stream: TcpStream, count: u32) -> Result<()> {
    let mut answer = MESSAGE;
    for _ in 0..count {
        stream.write_all(&MESSAGE)?;
        stream.read_exact(&mut answer)?;
    }
    Ok(())
}
