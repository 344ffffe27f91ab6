//! What the shim asks of the VMM while it runs (`bulkhead_vmm::control`).
//!
//! The socket is also the VMM's life line: it ends when this end is closed, by
//! [`Control::release`] or because the shim is gone. It survives a shim that
//! executes itself anew with the descriptor open.
//!
//! Answers come from a process that is presumed hostile: they are bounded, decoded
//! into values, and belong to the request of the same number or are dropped.

use std::{
    fs::File,
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    os::unix::net::UnixStream as StdStream,
    time::Duration,
};

use bulkhead_vmm::{
    control::{Answer, Answered, Asked, LONGEST, Request, Status, decode, encode},
    devices::limit::Limits,
};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown,
    SocketFlags, SocketType, recv, sendmsg, shutdown, socketpair,
};
use serde::{Deserialize, Serialize};
use tokio::{io::Interest, net::UnixStream, sync::Mutex, time::timeout};

use crate::{
    agent::escape,
    carry::{Bag, CarriedFd},
    error::{Error, Result, host},
};

/// Time for an answer.
const LIMIT: Duration = Duration::from_secs(5);

/// The shim's end of the socket.
#[derive(Debug)]
pub struct Control {
    /// Only watched as a stream; it keeps messages apart.
    socket: UnixStream,
    /// Number of the last request. Held while one is asked: one at a time.
    last: Mutex<u64>,
    limit: Duration,
}

/// What goes along of it when the program changes.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Carried {
    socket: CarriedFd,
    last: u64,
}

impl Control {
    /// Our end, and the one for the VMM.
    pub(super) fn pair() -> Result<(Control, OwnedFd)> {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(host("make a socket pair"))?;
        rustix::io::ioctl_fionbio(&ours, true).map_err(host("make a socket non-blocking"))?;
        let control = Control::over(ours, 0).map_err(host("watch the VMM's socket"))?;
        Ok((control, theirs))
    }

    fn over(socket: OwnedFd, last: u64) -> io::Result<Self> {
        Ok(Control {
            socket: UnixStream::from_std(StdStream::from(socket))?,
            last: Mutex::new(last),
            limit: LIMIT,
        })
    }

    /// Goes on with that of the program before this one.
    pub(super) fn unpack(carried: Carried) -> io::Result<Self> {
        Control::over(carried.socket.take()?, carried.last)
    }

    /// What goes along when the program changes; `None` while something is asked.
    pub(super) fn carry(&self, bag: &mut Bag) -> io::Result<Option<Carried>> {
        let Ok(last) = self.last.try_lock() else {
            return Ok(None);
        };
        Ok(Some(Carried {
            socket: bag.put(&self.socket)?,
            last: *last,
        }))
    }

    /// Stops all processors of the guest; returns when none runs any more.
    pub async fn pause(&self) -> Result<()> {
        done(self.ask(Request::Pause, "pause").await?)
    }

    /// Lets the processors go on.
    pub async fn resume(&self) -> Result<()> {
        done(self.ask(Request::Resume, "resume").await?)
    }

    /// Gives the machine a disk; answers the number of its device.
    pub async fn attach(&self, disk: File, read_only: bool) -> Result<u8> {
        let request = Request::Attach { read_only };
        match self.ask_with(request, "attach", Some(disk)).await? {
            Answer::Attached(device) => Ok(device),
            other => Err(unexpected(other)),
        }
    }

    /// Has the machine have so much memory in all, as soon as the guest takes it; answers
    /// the number of the device by which it comes.
    pub async fn memory(&self, mib: u32) -> Result<u8> {
        match self.ask(Request::Memory { mib }, "memory").await? {
            Answer::Attached(device) => Ok(device),
            other => Err(unexpected(other)),
        }
    }

    /// Gives it processors until there are so many, which the guest has to bring online.
    pub async fn processors(&self, count: u8) -> Result<()> {
        let request = Request::Processors { count };
        done(self.ask(request, "processors").await?)
    }

    /// Gives it a network interface, the other side of a tap; answers the number of its
    /// device.
    pub async fn attach_interface(&self, tap: File, mac: [u8; 6], mtu: u16) -> Result<u8> {
        let request = Request::AttachInterface { mac, mtu };
        let answer = self.ask_with(request, "attach an interface", Some(tap));
        match answer.await? {
            Answer::Attached(device) => Ok(device),
            other => Err(unexpected(other)),
        }
    }

    /// Takes a disk or an interface from it.
    pub async fn detach(&self, device: u8) -> Result<()> {
        done(self.ask(Request::Detach { device }, "detach").await?)
    }

    /// Bounds what may pass a disk or an interface, from now on and until it is taken from
    /// it; what waits goes on by the new limits at once. Limits of nothing are none.
    pub async fn limit(&self, device: u8, limits: Limits) -> Result<()> {
        let request = Request::Limit { device, limits };
        done(self.ask(request, "limit").await?)
    }

    /// How the machine is.
    pub async fn status(&self) -> Result<Status> {
        match self.ask(Request::Status, "status").await? {
            Answer::Status(status) => Ok(status),
            other => Err(unexpected(other)),
        }
    }

    /// Where the machine stands: a line for people who look for a fault.
    pub async fn standing(&self) -> Result<String> {
        match self.ask(Request::Standing, "standing").await? {
            Answer::Standing(words) => Ok(escape(&words)),
            other => Err(unexpected(other)),
        }
    }

    /// Lets go of the VMM: it reports that it is alone, and ends.
    pub fn release(&self) {
        // Fails only if it has ended.
        let _ = shutdown(&self.socket, Shutdown::Both);
    }

    async fn ask(&self, request: Request, call: &'static str) -> Result<Answer> {
        self.ask_with(request, call, None).await
    }

    async fn ask_with(
        &self,
        request: Request,
        call: &'static str,
        file: Option<File>,
    ) -> Result<Answer> {
        match timeout(self.limit, self.exchange(request, file)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(Error::VmGone(format!("the VMM does not answer: {error}"))),
            Err(_) => Err(Error::Deadline {
                call,
                limit_ms: self.limit.as_millis(),
            }),
        }
    }

    /// May be dropped at any moment: an answer that nobody waits for any more is
    /// passed over by the next exchange.
    async fn exchange(&self, request: Request, file: Option<File>) -> io::Result<Answer> {
        let mut last = self.last.lock().await;
        *last += 1;
        let number = *last;
        let message = encode(&Asked { number, request })?;
        self.socket
            .async_io(Interest::WRITABLE, || {
                send(&self.socket, &message, file.as_ref())
            })
            .await?;
        // The machine is its only holder, so that it is closed with it.
        drop(file);
        loop {
            let mut message = vec![0; LONGEST];
            let (length, _) = self
                .socket
                .async_io(Interest::READABLE, || {
                    Ok(recv(
                        &self.socket,
                        message.as_mut_slice(),
                        RecvFlags::empty(),
                    )?)
                })
                .await?;
            if length == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            message.truncate(length);
            let answered: Answered = decode(&message)?;
            // 0: it could not read what was asked last.
            if answered.number == number || answered.number == 0 {
                return Ok(answered.answer);
            }
        }
    }
}

/// Sends a message, with a descriptor if there is one.
fn send(socket: &UnixStream, message: &[u8], file: Option<&File>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let files: Vec<BorrowedFd<'_>> = file.iter().map(|file| file.as_fd()).collect();
    if !files.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&files));
    }
    let message = [IoSlice::new(message)];
    sendmsg(socket, &message, &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn done(answer: Answer) -> Result<()> {
    match answer {
        Answer::Done => Ok(()),
        other => Err(unexpected(other)),
    }
}

fn unexpected(answer: Answer) -> Error {
    let reason = match answer {
        Answer::Refused(reason) => escape(&reason),
        Answer::Done
        | Answer::Status(_)
        | Answer::Standing(_)
        | Answer::Interfaces(_)
        | Answer::Disks(_)
        | Answer::Attached(_) => "it answers something else".to_owned(),
    };
    host("control the VMM")(io::Error::other(reason))
}

#[cfg(test)]
mod tests {
    use bulkhead_vmm::{
        devices::limit::{Limit, Rate},
        exit::Exits,
    };
    use rustix::net::send;

    use super::*;

    /// A client with a short limit, and what plays the VMM.
    fn pair() -> (Control, OwnedFd) {
        let (mut control, theirs) = Control::pair().unwrap();
        control.limit = Duration::from_millis(300);
        (control, theirs)
    }

    fn asked(socket: &OwnedFd) -> Option<Asked> {
        let mut message = vec![0; LONGEST];
        let (length, _) = recv(socket, message.as_mut_slice(), RecvFlags::empty()).unwrap();
        (length > 0).then(|| decode(&message[..length]).unwrap())
    }

    fn answer(socket: &OwnedFd, number: u64, answer: Answer) {
        let message = encode(&Answered { number, answer }).unwrap();
        send(socket, &message, SendFlags::empty()).unwrap();
    }

    const STATUS: Status = Status {
        paused: true,
        vcpus: 2,
        most_vcpus: 2,
        memory_mib: 64,
        most_memory_mib: 64,
        exits: Exits {
            port: 1,
            mmio: 2,
            collected: 3,
            other: 4,
        },
        running_us: 5,
    };

    const LIMITS: Limits = Limits::Disk(Limit {
        bytes: Rate {
            per_second: 1 << 20,
            burst: 1 << 16,
        },
        operations: Rate {
            per_second: 100,
            burst: 0,
        },
    });

    #[tokio::test]
    async fn requests_are_answered_by_their_number() {
        let (control, theirs) = pair();
        let vmm = std::thread::spawn(move || {
            let (device, limits) = (3, LIMITS);
            let limit = Request::Limit { device, limits };
            for expected in [Request::Pause, limit, Request::Status, Request::Resume] {
                let Asked { number, request } = asked(&theirs).unwrap();
                assert_eq!(request, expected);
                // What belongs to another request is passed over.
                answer(&theirs, number + 7, Answer::Refused("not this".into()));
                let good = match request {
                    Request::Status => Answer::Status(STATUS),
                    _ => Answer::Done,
                };
                answer(&theirs, number, good);
            }
            assert_eq!(asked(&theirs), None);
        });
        control.pause().await.unwrap();
        control.limit(3, LIMITS).await.unwrap();
        assert_eq!(control.status().await.unwrap(), STATUS);
        control.resume().await.unwrap();
        control.release();
        vmm.join().unwrap();
    }

    #[tokio::test]
    async fn an_answer_that_comes_too_late_is_not_taken_for_the_next_one() {
        let (control, theirs) = pair();
        let error = control.pause().await.unwrap_err();
        assert_eq!(error.code(), ttrpc::Code::DEADLINE_EXCEEDED);
        let late = asked(&theirs).unwrap();
        answer(&theirs, late.number, Answer::Done);
        let vmm = std::thread::spawn(move || {
            let next = asked(&theirs).unwrap();
            answer(&theirs, next.number, Answer::Status(STATUS));
            theirs
        });
        assert_eq!(control.status().await.unwrap(), STATUS);
        drop(vmm.join().unwrap());
    }

    #[tokio::test]
    async fn refusals_lies_and_the_end_are_errors() {
        let (control, theirs) = pair();
        answer(&theirs, 1, Answer::Refused("no\nway".into()));
        let text = control.pause().await.unwrap_err().text();
        assert!(text.ends_with("no\\nway"), "{text}");
        answer(&theirs, 2, Answer::Done);
        assert!(control.status().await.is_err());
        send(&theirs, b"{\"number\":3", SendFlags::empty()).unwrap();
        assert!(control.status().await.is_err());
        drop(theirs);
        let error = control.resume().await.unwrap_err();
        assert_eq!(error.code(), ttrpc::Code::UNAVAILABLE);
    }
}
