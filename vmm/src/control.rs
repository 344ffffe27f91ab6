//! What may be asked of a running machine by whoever started it: all of it is
//! [`Request`].
//!
//! Requests and answers are JSON, one a message of a SOCK_SEQPACKET socket
//! (`Config::control`), both with the number that the request came with. They are
//! served by the main thread, in order; only the answers to a pause and to what is about
//! a disk may come after those to later requests. The socket is also the machine's life line: when its
//! other end is closed, the machine ends. So it is with a process that was killed;
//! one that replaces itself by another program keeps it.

use std::{
    io::{self, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recvmsg, send},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    devices::{
        block::{self, Access},
        limit::Limits,
        net::{self, Options},
    },
    exit::{End, Ending, Exits},
    hotplug::{Hotplug, Order},
    pause::Gate,
    present::Present,
};

/// Longest message in bytes, in either direction.
pub const LONGEST: usize = 16 << 10;

/// A request with its number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Asked {
    /// Comes back with the answer. Not 0.
    pub number: u64,
    /// What is asked.
    pub request: Request,
}

/// Everything that can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Stops all processors; [`Answer::Done`] once none is in the guest any more.
    /// Devices go on. Always possible; nothing changes if they are stopped already.
    Pause,
    /// Lets the processors go on: [`Answer::Done`]. Always possible; a pause that
    /// is not answered yet is refused then.
    Resume,
    /// How the machine is: [`Answer::Status`]. Always possible.
    Status,
    /// Where the machine stands: [`Answer::Standing`]. Always possible; of processors
    /// more is known while they are stopped.
    Standing,
    /// Puts the disk whose descriptor comes with the message (SCM_RIGHTS) at a free
    /// place: [`Answer::Attached`]. The guest's driver does not look by itself.
    Attach {
        /// Refuse writes.
        read_only: bool,
    },
    /// Puts a network interface, the tap whose descriptor comes with the message, at a
    /// free place: [`Answer::Attached`]. How the tap must be:
    /// [`Net::new`](crate::devices::net::Net::new).
    AttachInterface {
        /// Its address in the guest.
        mac: [u8; 6],
        /// That of the tap, in bytes.
        mtu: u16,
    },
    /// Takes what is at this device's place away and closes it: [`Answer::Done`]. What
    /// the guest still asks of it fails.
    Detach {
        /// As it was answered.
        device: u8,
    },
    /// Bounds what may pass a disk or an interface, from now on and until it is taken
    /// away: [`Answer::Done`]. What waits goes on by the new limits at once, which begin
    /// with full bursts; none at all are no limits. What is attached has none.
    Limit {
        /// As it was answered, or its place among those from the start.
        device: u8,
        /// Of its kind.
        limits: Limits,
    },
    /// What has passed through the interfaces that are attached: [`Answer::Interfaces`].
    Interfaces,
    /// What became of requests to the disks: [`Answer::Disks`].
    Disks,
    /// Has the guest have so much memory in all. Answered by the number of the device by
    /// which it comes, which the guest's driver is to look at; what the guest has taken
    /// of it, the status tells.
    Memory {
        /// MiB.
        mib: u32,
    },
    /// Makes processors until there are so many, which the guest is to bring online.
    Processors {
        /// In all.
        count: u8,
    },
}

/// An answer with the number of its request, or 0 if that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answered {
    /// The request's.
    pub number: u64,
    /// The answer.
    pub answer: Answer,
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It is done.
    Done,
    /// How the machine is.
    Status(Status),
    /// Where it stands: one line for people who look for a fault.
    Standing(String),
    /// Each interface by its device's number.
    Interfaces(Vec<(u8, net::Totals)>),
    /// Each disk by its device's number.
    Disks(Vec<(u8, block::Totals)>),
    /// What was attached is this device, in the order in which the guest was told of its
    /// devices: `virtio-mmio.N` to Linux.
    Attached(u8),
    /// It is not done, for this reason: one line.
    Refused(String),
}

/// How a machine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// No processor is in the guest.
    pub paused: bool,
    /// Virtual processors that there are.
    pub vcpus: u8,
    /// The most that there can be.
    pub most_vcpus: u8,
    /// Guest memory in MiB: what it began with, and what it has taken since.
    pub memory_mib: u32,
    /// The most that it can have.
    pub most_memory_mib: u32,
    /// Exits to the VMM so far.
    pub exits: Exits,
    /// Microseconds since the first processor entered the guest.
    pub running_us: u64,
}

/// Encodes a message.
pub fn encode(message: &impl Serialize) -> io::Result<Vec<u8>> {
    Ok(serde_json::to_vec(message)?)
}

/// Decodes a message.
pub fn decode<T: DeserializeOwned>(message: &[u8]) -> io::Result<T> {
    Ok(serde_json::from_slice(message)?)
}

/// The machine's end of the socket.
pub(crate) struct Control<'a, S, T> {
    /// Without one nothing is asked.
    pub(crate) socket: Option<OwnedFd>,
    /// Where processors stop.
    pub(crate) gate: &'a Gate,
    /// Brings what comes while the machine runs, if anything may.
    pub(crate) hotplug: Option<&'a Hotplug>,
    /// The disks and interfaces that are there.
    pub(crate) present: &'a Present,
    /// Tells how the machine is, but for whether it is paused.
    pub(crate) status: S,
    /// Tells where it stands.
    pub(crate) standing: T,
}

impl<S: Fn(bool) -> Status, T: Fn() -> String> Control<'_, S, T> {
    /// Serves requests until the machine ends, by itself or with the socket.
    pub(crate) fn serve(&self, ending: &Ending) -> (End, String) {
        // The pause that waits for the processors.
        let mut pausing = None;
        loop {
            let ready = match self.wait(ending, pausing.is_some()) {
                Ok(ready) => ready,
                Err(error) => return (End::Device, format!("Cannot wait for the end: {error}")),
            };
            if let Some(ended) = ending.get() {
                return ended;
            }
            if let Err(error) = self.serve_once(ready, &mut pausing) {
                return orphaned(&error);
            }
        }
    }

    /// Waits until there is something to do.
    fn wait(&self, ending: &Ending, pausing: bool) -> Result<Ready, Errno> {
        let mut fds = vec![PollFd::new(ending, PollFlags::IN)];
        if pausing {
            fds.push(PollFd::new(self.gate, PollFlags::IN));
        }
        let mut add = |fd| {
            fds.push(fd);
            fds.len() - 1
        };
        let socket = self.socket.as_ref();
        let asked = socket.map(|socket| add(PollFd::new(socket, PollFlags::IN)));
        let hotplug = self.hotplug;
        let done = hotplug.map(|hotplug| add(PollFd::new(hotplug, PollFlags::IN)));
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        let is_ready = |at: Option<usize>| {
            let fd = at.and_then(|at| fds.get(at));
            fd.is_some_and(|fd| !fd.revents().is_empty())
        };
        Ok(Ready {
            asked: is_ready(asked),
            done: is_ready(done),
        })
    }

    fn serve_once(&self, ready: Ready, pausing: &mut Option<u64>) -> io::Result<()> {
        if let Some(number) = *pausing
            && self.gate.all_wait()
        {
            *pausing = None;
            self.answer(number, Answer::Done)?;
        }
        if ready.done
            && let Some(hotplug) = self.hotplug
        {
            for (number, answer) in hotplug.finished() {
                self.answer(number, answer)?;
            }
        }
        if ready.asked {
            self.take(pausing)?;
        }
        Ok(())
    }

    /// Takes one request and answers it, if its time has come.
    fn take(&self, pausing: &mut Option<u64>) -> io::Result<()> {
        let Some(socket) = &self.socket else {
            return Ok(());
        };
        let Some((message, file)) = receive(socket)? else {
            return Ok(());
        };
        let Asked { number, request } = match decode(&message) {
            Ok(asked) => asked,
            Err(error) => {
                return self.answer(0, Answer::Refused(format!("No request: {error}")));
            }
        };
        match request {
            Request::Pause => {
                self.gate.close();
                // An earlier one has the same end, but not the same answer.
                if let Some(earlier) = pausing.replace(number) {
                    self.answer(earlier, Answer::Refused("Asked again".into()))?;
                }
                if self.gate.all_wait() {
                    *pausing = None;
                    self.answer(number, Answer::Done)?;
                }
                Ok(())
            }
            Request::Resume => {
                if let Some(earlier) = pausing.take() {
                    self.answer(earlier, Answer::Refused("Resumed meanwhile".into()))?;
                }
                self.gate.open();
                self.answer(number, Answer::Done)
            }
            Request::Status => {
                let status = (self.status)(self.gate.all_wait());
                self.answer(number, Answer::Status(status))
            }
            Request::Standing => {
                let mut words = (self.standing)();
                // Plain ASCII; a machine with very many queues says less.
                words.truncate(LONGEST / 2);
                self.answer(number, Answer::Standing(words))
            }
            Request::Attach { read_only } => {
                let access = if read_only {
                    Access::ReadOnly
                } else {
                    Access::ReadWrite
                };
                let order = file.map(|file| Order::Attach(file.into(), access));
                self.order_with(number, order)
            }
            Request::AttachInterface { mac, mtu } => {
                let options = Options { mac, mtu };
                let order = file.map(|tap| Order::AttachInterface(tap, options));
                self.order_with(number, order)
            }
            Request::Detach { device } => self.order(number, Order::Detach(device)),
            Request::Limit { device, limits } => {
                let limited = self.present.limit(device, limits);
                let answer = limited.map_or_else(Answer::Refused, |()| Answer::Done);
                self.answer(number, answer)
            }
            Request::Interfaces => {
                let interfaces = self.present.interfaces();
                self.answer(number, Answer::Interfaces(interfaces))
            }
            Request::Disks => self.answer(number, Answer::Disks(self.present.disks())),
            Request::Memory { mib } => self.order(number, Order::Memory(mib)),
            Request::Processors { count } => self.order(number, Order::Processors(count)),
        }
    }

    /// The same, if there was a descriptor to make it with.
    fn order_with(&self, number: u64, order: Option<Order>) -> io::Result<()> {
        match order {
            Some(order) => self.order(number, order),
            None => self.answer(number, Answer::Refused("no descriptor came along".into())),
        }
    }

    fn order(&self, number: u64, order: Order) -> io::Result<()> {
        let ordered = match self.hotplug {
            Some(hotplug) => hotplug.order(number, order).map_err(|e| e.to_string()),
            None => Err("the machine is as large as it will ever be".into()),
        };
        match ordered {
            Ok(()) => Ok(()),
            Err(reason) => self.answer(number, Answer::Refused(reason)),
        }
    }

    fn answer(&self, number: u64, answer: Answer) -> io::Result<()> {
        let Some(socket) = &self.socket else {
            return Ok(());
        };
        let message = encode(&Answered { number, answer })?;
        // Whoever does not read what it asked for is taken for dead.
        send(
            socket.as_fd(),
            &message,
            SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
        )?;
        Ok(())
    }
}

/// What there is to do.
#[derive(Clone, Copy, Debug)]
struct Ready {
    asked: bool,
    done: bool,
}

/// Takes a message with the descriptor that came along, if one did; `None` if there is
/// no message now.
fn receive(socket: &OwnedFd) -> io::Result<Option<(Vec<u8>, Option<OwnedFd>)>> {
    let mut message = vec![0; LONGEST];
    // What comes along beyond one is closed by the kernel.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut message)],
        &mut ancillary,
        RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC,
    );
    let length = match received {
        Ok(received) if received.bytes == 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(received) => received.bytes,
        Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    message.truncate(length);
    let file = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut files) => files.next(),
        _ => None,
    });
    Ok(Some((message, file)))
}

fn orphaned(error: &io::Error) -> (End, String) {
    let gone = matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::NotConnected
    );
    let reason = if gone {
        "Whoever started the virtual machine is gone".to_owned()
    } else {
        format!("Whoever started the virtual machine takes no answer: {error}")
    };
    (End::Orphaned, reason)
}

#[cfg(test)]
mod tests;
