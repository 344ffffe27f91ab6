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
mod tap;

use std::{
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    thread,
};

use nix::sched::{CloneFlags, setns};
use rtnetlink::{Handle, packet_route::tc::TcHandle};
use tracing::warn;

pub use self::link::Link;

/// All protocols (ETH_P_ALL), in the kernel's order of bytes.
const ALL: u16 = 0x0003_u16.to_be();

/// An interface that has a tap.
#[derive(Debug)]
pub struct Joined {
    /// What the guest is told of it.
    pub link: Link,
    /// Frames for the guest, and from it.
    pub tap: File,
}

/// A namespace whose interfaces have taps; dropped, they are let go of.
#[derive(Debug)]
pub struct Network {
    namespace: OwnedFd,
    /// Numbers of the interfaces.
    joined: Vec<u32>,
}

impl Network {
    /// Joins all interfaces of a namespace that have an address; none if it is the host's
    /// own. Takes its time: for a thread that may wait.
    ///
    /// # Errors
    ///
    /// The kernel refuses it; or an interface is of a kind that cannot be joined, or has no
    /// address of Ethernet.
    pub fn join(namespace: OwnedFd) -> io::Result<(Network, Vec<Joined>)> {
        let mut network = Network {
            namespace,
            joined: Vec::new(),
        };
        if is_the_hosts(&network.namespace)? {
            return Ok((network, Vec::new()));
        }
        let inside = network.namespace.try_clone()?;
        let joined = visit(inside, async |handle| {
            let mut all = Vec::new();
            for link in link::all(&handle).await? {
                all.push(join(&handle, link).await?);
            }
            Ok(all)
        })?;
        network.joined = joined.iter().map(|joined| joined.link.index).collect();
        Ok((network, joined))
    }

    /// That of the program before this one.
    #[must_use]
    pub fn new(namespace: OwnedFd, joined: Vec<u32>) -> Network {
        Network { namespace, joined }
    }

    /// The namespace, and the numbers of the interfaces.
    #[must_use]
    pub fn parts(&self) -> (&OwnedFd, &[u32]) {
        (&self.namespace, &self.joined)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let joined = std::mem::take(&mut self.joined);
        if joined.is_empty() {
            return;
        }
        let left = self.namespace.try_clone().and_then(|namespace| {
            visit(namespace, async move |handle| {
                for index in joined {
                    // One that has gone has no filter either.
                    let mut handle = handle.qdisc();
                    let mut gone = handle.del(number(index)?);
                    gone.message_mut().header.parent = TcHandle::INGRESS;
                    let _ = gone.execute().await;
                }
                Ok(())
            })
        });
        if let Err(error) = left {
            warn!(%error, "an interface of the pod keeps a filter of ours");
        }
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
fn visit<T: Send + 'static>(
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

/// Makes a tap for an interface, and sends each one's frames to the other.
async fn join(handle: &Handle, link: Link) -> io::Result<Joined> {
    let name = format!("bulkhead{}", link.index);
    let tap = tap::make(&name)?;
    let index = link::index_of(handle, &name).await?;
    link::bring_up(handle, index, link.mtu).await?;
    redirect(handle, link.index, index).await?;
    redirect(handle, index, link.index).await?;
    Ok(Joined { link, tap })
}

/// Has what comes in at the one go out at the other.
async fn redirect(handle: &Handle, from: u32, to: u32) -> io::Result<()> {
    let at = number(from)?;
    let made = handle.qdisc().add(at).ingress().execute().await;
    // Somebody else's serves as well.
    done(made, Some(libc::EEXIST))?;
    let filter = handle.traffic_filter(at).add();
    let filter = filter.parent(
        TcHandle {
            major: 0xffff,
            minor: 0,
        }
        .into(),
    );
    let filter = filter.protocol(ALL).redirect(to);
    let made = filter.map_err(io::Error::other)?.execute().await;
    done(made, None)
}

/// An answer of netlink as an error of the kernel, but for one that does not matter.
fn done(answer: Result<(), rtnetlink::Error>, but: Option<i32>) -> io::Result<()> {
    match answer.map_err(error) {
        Err(error) if error.raw_os_error() == but && but.is_some() => Ok(()),
        other => other,
    }
}

fn error(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other.to_string()),
    }
}

fn number(index: u32) -> io::Result<i32> {
    i32::try_from(index).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_own_interfaces_are_never_touched_nw_29() {
        let own = File::open("/proc/self/ns/net").unwrap();
        let (network, joined) = Network::join(own.into()).unwrap();
        assert!(joined.is_empty() && network.parts().1.is_empty());
    }
}
