//! Connections that the guest opens, as the VMM hands them over.
//!
//! One message of a SOCK_SEQPACKET socket for each: the port as four little-endian
//! bytes, the connection's descriptor beside it.

use std::{
    io,
    mem::MaybeUninit,
    os::{fd::OwnedFd, unix::net::UnixStream as StdStream},
};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
    recvmsg, socketpair,
};
use tokio::{io::Interest, net::UnixStream};

use crate::error::{Result, host};

/// Our end and the VMM's.
pub(super) fn pair() -> Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(host("make a socket pair"))?;
    rustix::io::ioctl_fionbio(&ours, true).map_err(host("make a socket non-blocking"))?;
    Ok((ours, theirs))
}

/// Waits for a connection to `port`; those to other ports are dropped.
pub(super) async fn accept(socket: OwnedFd, port: u32) -> io::Result<UnixStream> {
    // Only watched as a stream; messages are taken by recvmsg.
    let socket = UnixStream::from_std(StdStream::from(socket))?;
    loop {
        let (number, stream) = socket
            .async_io(Interest::READABLE, || receive(&socket))
            .await?;
        if number == port {
            let stream = StdStream::from(stream);
            stream.set_nonblocking(true)?;
            return UnixStream::from_std(stream);
        }
    }
}

fn receive(socket: &UnixStream) -> io::Result<(u32, OwnedFd)> {
    let mut port = [0; 4];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        socket,
        &mut [io::IoSliceMut::new(&mut port)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    if received.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let stream = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    match stream {
        Some(stream) if received.bytes == port.len() => Ok((u32::from_le_bytes(port), stream)),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the VMM hands over no connection",
        )),
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    use tokio::io::AsyncReadExt;

    use super::*;

    fn hand_over(socket: &OwnedFd, port: u32, stream: &StdStream) {
        let fds = [std::os::fd::AsFd::as_fd(stream)];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let bytes = port.to_le_bytes();
        sendmsg(
            socket,
            &[io::IoSlice::new(&bytes)],
            &mut control,
            SendFlags::empty(),
        )
        .unwrap();
    }

    #[tokio::test]
    async fn the_connection_to_the_wanted_port_is_taken() {
        let (ours, theirs) = pair().unwrap();
        let (mut guest, host) = StdStream::pair().unwrap();
        let (other, _keep) = StdStream::pair().unwrap();
        hand_over(&theirs, 9999, &other);
        hand_over(&theirs, 1024, &host);
        let mut stream = accept(ours, 1024).await.unwrap();
        io::Write::write_all(&mut guest, b"hi").unwrap();
        let mut text = [0; 2];
        stream.read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"hi");
    }

    #[tokio::test]
    async fn a_vmm_that_ends_or_lies_is_an_error() {
        let (ours, theirs) = pair().unwrap();
        drop(theirs);
        assert!(accept(ours, 1024).await.is_err());
        let (ours, theirs) = pair().unwrap();
        rustix::io::write(&theirs, &1024_u32.to_le_bytes()).unwrap();
        assert!(accept(ours, 1024).await.is_err());
    }
}
