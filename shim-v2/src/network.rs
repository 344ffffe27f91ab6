//! A network namespace of the host, joined with the guest.
//!
//! For each interface that is found there a tap is made beside it, and what comes in at
//! the one is sent out at the other (tc mirred redirection): the host's own stack does
//! nothing on the way. The guest gets an interface with the same name, addresses and
//! routes. The interface itself stays as it is, for whoever made it takes it away.
//!
//! A socket of netlink belongs to the namespace in which it was made, and a thread that
//! has entered one is not to be used for anything else: each visit has a thread of its own.

mod link;

use std::{
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    thread,
};

use bulkhead_vmm::tap;
use futures::StreamExt;
use nix::sched::{CloneFlags, setns};
use rtnetlink::{
    Handle,
    packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage},
    packet_route::{
        RouteNetlinkMessage,
        tc::{TcHandle, TcMessage},
    },
};
use serde::{Deserialize, Serialize};
use tracing::warn;

pub use self::link::Link;

/// All protocols (ETH_P_ALL), in the kernel's order of bytes.
const ALL: u16 = 0x0003_u16.to_be();

/// Place of our filters among others on the same interface: after them, since nothing is
/// left of a packet that was sent on.
const PRIORITY: u16 = 0xb000;

/// An interface that has a tap.
#[derive(Debug)]
pub struct Joined {
    /// What the guest is told of it.
    pub link: Link,
    /// Frames for the guest, and from it.
    pub tap: File,
}

/// An interface whose frames go elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Redirected {
    /// Its number.
    index: u32,
    /// Whether what the filter hangs on is ours too.
    made: bool,
}

/// A namespace whose interfaces have taps; dropped, they are let go of.
#[derive(Debug)]
pub struct Network {
    namespace: OwnedFd,
    redirected: Vec<Redirected>,
}

impl Network {
    /// Joins all interfaces of a namespace that have an address; none if it is the host's
    /// own. Takes its time: for a thread that may wait.
    ///
    /// # Errors
    ///
    /// The kernel refuses it; or an interface is of a kind that cannot be joined, or has no
    /// address of Ethernet. Then none is joined.
    pub fn join(namespace: OwnedFd) -> io::Result<(Network, Vec<Joined>)> {
        let mut network = Network {
            namespace,
            redirected: Vec::new(),
        };
        if is_the_hosts(&network.namespace)? {
            return Ok((network, Vec::new()));
        }
        let inside = network.namespace.try_clone()?;
        let (redirected, joined) = visit(inside, async |handle| {
            let mut redirected = Vec::new();
            let joined = join_all(&handle, &mut redirected).await;
            Ok((redirected, joined))
        })?;
        network.redirected = redirected;
        Ok((network, joined?))
    }

    /// That of the program before this one.
    #[must_use]
    pub fn new(namespace: OwnedFd, redirected: Vec<Redirected>) -> Network {
        Network {
            namespace,
            redirected,
        }
    }

    /// The namespace, and the interfaces.
    #[must_use]
    pub fn parts(&self) -> (&OwnedFd, &[Redirected]) {
        (&self.namespace, &self.redirected)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let redirected = std::mem::take(&mut self.redirected);
        if redirected.is_empty() {
            return;
        }
        let left = self.namespace.try_clone().and_then(|namespace| {
            visit(namespace, async move |handle| {
                for redirected in redirected {
                    redirected.let_go(&handle).await?;
                }
                Ok(())
            })
        });
        if let Err(error) = left {
            warn!(%error, "an interface of the pod keeps a filter of ours");
        }
    }
}

impl Redirected {
    async fn let_go(self, handle: &Handle) -> io::Result<()> {
        let at = number(self.index)?;
        // An interface that has gone has no filter either.
        if self.made {
            let mut qdisc = handle.qdisc().del(at);
            qdisc.message_mut().header.parent = TcHandle::INGRESS;
            let _ = qdisc.execute().await;
        } else {
            let mut filter = TcMessage::with_index(at);
            filter.header.parent = TcHandle {
                major: 0xffff,
                minor: TcHandle::MIN_INGRESS,
            };
            filter.header.info = (u32::from(PRIORITY) << 16) | u32::from(ALL);
            let filter = RouteNetlinkMessage::DelTrafficFilter(filter);
            let mut message = NetlinkMessage::from(filter);
            message.header.flags = NLM_F_REQUEST | NLM_F_ACK;
            let mut answers = handle.clone().request(message).map_err(error)?;
            while answers.next().await.is_some() {}
        }
        Ok(())
    }
}

/// Whether a namespace is this program's, or that of the host's first process: what is
/// there is nobody's to redirect.
fn is_the_hosts(namespace: &OwnedFd) -> io::Result<bool> {
    let known = |stat: rustix::fs::Stat| (stat.st_dev, stat.st_ino);
    let it = known(rustix::fs::fstat(namespace)?);
    let own = known(rustix::fs::stat("/proc/self/ns/net")?);
    let first = rustix::fs::stat("/proc/1/ns/net").ok().map(known);
    Ok(it == own || Some(it) == first)
}

/// Runs something with a socket of netlink in this namespace.
///
/// # Errors
///
/// The namespace cannot be entered, or what the work itself says.
pub fn visit<T: Send + 'static>(
    namespace: OwnedFd,
    what: impl AsyncFnOnce(Handle) -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let visitor = thread::Builder::new().name("network".to_owned());
    let visitor = visitor.spawn(move || {
        setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(async move {
            let (connection, handle, _) = rtnetlink::new_connection()?;
            let connection = tokio::spawn(connection);
            let done = what(handle).await;
            connection.abort();
            done
        })
    })?;
    visitor
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the thread ended")))
}

/// Joins all interfaces, and writes down each that is redirected as soon as it may be.
async fn join_all(handle: &Handle, redirected: &mut Vec<Redirected>) -> io::Result<Vec<Joined>> {
    let mut all = Vec::new();
    for link in link::all(handle).await? {
        let name = format!("bulkhead{}", link.index);
        let tap = tap::make(&name)?;
        let index = link::index_of(handle, &name).await?;
        link::bring_up(handle, index, link.mtu).await?;
        let made = make_ingress(handle, link.index).await?;
        redirected.push(Redirected {
            index: link.index,
            made,
        });
        redirect(handle, link.index, index).await?;
        // What hangs on the tap goes with it.
        make_ingress(handle, index).await?;
        redirect(handle, index, link.index).await?;
        all.push(Joined { link, tap });
    }
    Ok(all)
}

/// Gives an interface a queueing discipline for what comes in; whether it had none.
async fn make_ingress(handle: &Handle, index: u32) -> io::Result<bool> {
    let made = handle.qdisc().add(number(index)?).ingress().execute().await;
    match made.map_err(error) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Has what comes in at the one go out at the other.
async fn redirect(handle: &Handle, from: u32, to: u32) -> io::Result<()> {
    let filter = handle.traffic_filter(number(from)?).add();
    let filter = filter.ingress().priority(PRIORITY).protocol(ALL);
    let filter = filter.redirect(to).map_err(io::Error::other)?;
    filter.execute().await.map_err(error)
}

/// What the kernel said, as an error of the system.
#[must_use]
pub fn error(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other.to_string()),
    }
}

fn number(index: u32) -> io::Result<i32> {
    i32::try_from(index).map_err(io::Error::other)
}

#[cfg(test)]
pub(crate) mod tests;
