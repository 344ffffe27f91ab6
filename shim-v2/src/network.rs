//! A network namespace of the host, joined with the guest.
//!
//! For each interface that is found there a tap is made beside it, and what comes in at
//! the one is sent out at the other (tc mirred redirection): the host's own stack does
//! nothing on the way. The guest gets an interface with the same name, addresses and
//! routes. The interface itself stays as it is, for whoever made it takes it away.
//!
//! A socket of netlink belongs to the namespace in which it was made, and a thread that
//! has entered one is not to be used for anything else: each visit has a thread of its own.

mod answers;
mod bpf;
mod link;
mod loopback;
mod names;
mod source;
mod watch;

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::mpsc,
    thread::{self, JoinHandle},
};

use bulkhead_vmm::tap;
use futures::StreamExt;
use nix::sched::{CloneFlags, setns};
use rtnetlink::{
    Handle,
    packet_core::{
        NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
    },
    packet_route::{
        RouteNetlinkMessage,
        tc::{
            TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcMessage, TcOption,
        },
    },
};
use serde::{Deserialize, Serialize};
use tokio::{sync::oneshot, task::spawn_blocking};
use tracing::warn;

use self::source::Own;
pub use self::{
    link::Link,
    loopback::Loopback,
    names::{Asked, Names},
    watch::Watch,
};

/// All protocols (ETH_P_ALL), in the kernel's order of bytes.
const ALL: u16 = 0x0003_u16.to_be();

/// Place of our filters among others on the same interface: after them, since nothing is
/// left of a packet that was sent on.
const PRIORITY: u16 = 0xb000;

/// What is joined with a guest.
#[derive(Debug)]
pub struct Network {
    namespace: OwnedFd,
    redirected: Vec<Redirected>,
    /// Whether the guest may speak in another name than its own.
    trusted: bool,
    watched: bool,
    led: bool,
    /// There is a name server, and the guest asks it.
    named: bool,
}

/// An interface whose frames go elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Redirected {
    /// Its number.
    index: u32,
    /// Whether what the filter hangs on is ours too.
    made: bool,
    /// In whose name alone the guest can speak, if that is known.
    #[serde(skip)]
    own: Option<Own>,
}

/// What a look answers, and what is redirected then.
type Looked = (io::Result<Seen>, Vec<Redirected>);

/// What is in a namespace.
#[derive(Debug, Default)]
pub struct Seen {
    /// Its interfaces.
    pub links: Vec<Link>,
    /// Rules of policy routing, each the body of an RTM_NEWRULE.
    pub rules: Vec<Vec<u8>>,
    /// Frames for the guest and from it, by the numbers of the interfaces that were not
    /// joined before.
    pub taps: Vec<(u32, File)>,
    /// Why others cannot be joined.
    pub refused: Vec<io::Error>,
    /// Tells of changes; the first time only.
    pub watch: Option<Watch>,
    /// Connections to its loopback addresses; the first time only that it has interfaces.
    pub loopback: Option<io::Result<Loopback>>,
    /// A name server at 127.0.0.11; the first time only that there is one.
    pub names: Option<Names>,
}

impl Network {
    /// That of a namespace, of which nothing is joined yet. Whoever is `trusted` may send
    /// frames whose source is somebody else.
    #[must_use]
    pub fn new(namespace: OwnedFd, trusted: bool) -> Network {
        Network::unpack(namespace, Vec::new(), trusted)
    }

    /// That of the program before this one.
    #[must_use]
    pub fn unpack(namespace: OwnedFd, redirected: Vec<Redirected>, trusted: bool) -> Network {
        Network {
            namespace,
            redirected,
            trusted,
            watched: false,
            led: false,
            named: false,
        }
    }

    /// The namespace, the interfaces, and whether the guest is trusted.
    #[must_use]
    pub fn parts(&self) -> (&OwnedFd, &[Redirected], bool) {
        (&self.namespace, &self.redirected, self.trusted)
    }

    /// Trusts the guest from the next look on; whether it did not.
    pub fn trust(&mut self) -> bool {
        !std::mem::replace(&mut self.trusted, true)
    }

    /// Looks what there is, and joins what is new and has an address.
    ///
    /// # Errors
    ///
    /// The kernel refuses to tell, or to make what is needed. An interface that cannot be
    /// joined is no error.
    pub async fn look(&mut self) -> io::Result<Seen> {
        let (_, answer) = self.begin_look()?;
        let (seen, redirected) = answer.await.map_err(io::Error::other)?;
        // However it went: what is redirected is to be let go of.
        self.redirected = redirected;
        let seen = seen?;
        self.watched = true;
        self.led |= seen.loopback.is_some();
        self.named |= seen.names.is_some();
        Ok(seen)
    }

    /// The same, for whoever waits for the answer.
    fn begin_look(&self) -> io::Result<(JoinHandle<()>, oneshot::Receiver<Looked>)> {
        let namespace = self.namespace.try_clone()?;
        let mut redirected = self.redirected.clone();
        let (watched, led, named) = (self.watched, self.led, self.named);
        let trusted = self.trusted;
        let (told, answer) = oneshot::channel();
        let visitor = begin_visit(namespace, async move |handle| {
            let handle = match handle {
                Ok(handle) => handle,
                Err(error) => return drop(told.send((Err(error), redirected))),
            };
            let before = redirected.clone();
            let mut seen = look(&handle, &mut redirected, watched, trusted).await;
            if let Ok(seen) = &mut seen {
                let leads = !led && !seen.links.is_empty();
                seen.loopback = leads.then(Loopback::new);
                if !named {
                    seen.names = Names::find();
                }
            }
            // Whoever asked may have given up, and knows nothing of what is new.
            if let Err((_, redirected)) = told.send((seen, redirected)) {
                let is_fresh = |it: &Redirected| before.iter().all(|old| old.index != it.index);
                let fresh = redirected.into_iter().filter(is_fresh);
                for redirected in fresh {
                    let _ = redirected.let_go(&handle).await;
                }
            }
        })?;
        Ok((visitor, answer))
    }

    /// Leaves an interface as it was before.
    pub async fn let_go(&mut self, index: u32) {
        let all = std::mem::take(&mut self.redirected).into_iter();
        let (these, others) = all.partition(|it| it.index == index);
        self.redirected = others;
        if let Some(visitor) = leave(&self.namespace, these) {
            // It says itself what went wrong.
            let _ = spawn_blocking(move || visitor.join()).await;
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let redirected = std::mem::take(&mut self.redirected);
        if let Some(visitor) = leave(&self.namespace, redirected) {
            let _ = visitor.join();
        }
    }
}

/// Whether a network namespace is this program's, or that of the host's first process: what
/// is there is nobody's to redirect.
///
/// # Errors
///
/// The kernel does not tell.
pub fn is_the_hosts(namespace: impl AsFd) -> io::Result<bool> {
    let known = |stat: rustix::fs::Stat| (stat.st_dev, stat.st_ino);
    let it = known(rustix::fs::fstat(namespace)?);
    let own = known(rustix::fs::stat("/proc/self/ns/net")?);
    let first = rustix::fs::stat("/proc/1/ns/net").ok().map(known);
    Ok(it == own || Some(it) == first)
}

/// Lets go of interfaces; none if there is nothing to do.
fn leave(namespace: &OwnedFd, redirected: Vec<Redirected>) -> Option<JoinHandle<()>> {
    if redirected.is_empty() {
        return None;
    }
    let left_over = |error: io::Error| {
        warn!(%error, "an interface of the pod keeps a filter of ours");
    };
    let visitor = namespace.try_clone().and_then(|namespace| {
        begin_visit(namespace, async move |handle| {
            let all = async {
                let handle = handle?;
                for redirected in redirected {
                    redirected.let_go(&handle).await?;
                }
                Ok(())
            };
            all.await.unwrap_or_else(left_over);
        })
    });
    visitor.map_err(left_over).ok()
}

impl Redirected {
    /// Has the guest speak in its own name only, unless it is trusted.
    async fn guard(&mut self, handle: &Handle, link: &Link, trusted: bool) -> io::Result<()> {
        let own = (!trusted).then(|| Own::of(link));
        if own == self.own {
            return Ok(());
        }
        let tap = link::index_of(handle, &tap_name(self.index)).await?;
        match &own {
            Some(own) => source::only(handle, tap, own).await?,
            None => source::any(handle, tap).await?,
        }
        self.own = own;
        Ok(())
    }

    async fn let_go(&self, handle: &Handle) -> io::Result<()> {
        let at = number(self.index)?;
        // An interface that has gone has no filter either.
        if self.made {
            let mut qdisc = handle.qdisc().del(at);
            qdisc.message_mut().header.parent = TcHandle::INGRESS;
            let _ = qdisc.execute().await;
        } else {
            for priority in [answers::BEFORE, PRIORITY] {
                let _ = forget(handle, self.index, priority).await;
            }
        }
        Ok(())
    }
}

/// Runs something with a socket of netlink in this namespace, and waits for its end.
///
/// # Errors
///
/// The namespace cannot be entered, or what the work itself says.
pub fn visit<T: Send + 'static>(
    namespace: OwnedFd,
    what: impl AsyncFnOnce(Handle) -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let (told, answer) = mpsc::channel();
    begin_visit(namespace, async move |handle| {
        let done = match handle {
            Ok(handle) => what(handle).await,
            Err(error) => Err(error),
        };
        // Whoever began it waits.
        let _ = told.send(done);
    })?;
    answer.recv().map_err(io::Error::other)?
}

/// Joins what there is in a namespace and lets go of it again: whether this host can.
///
/// # Errors
///
/// It cannot.
pub fn try_to_join(namespace: OwnedFd) -> io::Result<()> {
    visit(namespace, async |handle| {
        let mut redirected = Vec::new();
        let seen = look(&handle, &mut redirected, true, false).await;
        for redirected in redirected {
            redirected.let_go(&handle).await?;
        }
        seen?.refused.pop().map_or(Ok(()), Err)
    })
}

/// Runs something with a socket of netlink in this namespace, on a thread of its own.
fn begin_visit(
    namespace: OwnedFd,
    what: impl AsyncFnOnce(io::Result<Handle>) + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    begin_in(namespace, async move |entered| {
        let connected = entered.and_then(|()| rtnetlink::new_connection());
        match connected {
            Ok((connection, handle, _)) => {
                let connection = tokio::spawn(connection);
                what(Ok(handle)).await;
                connection.abort();
            }
            Err(error) => what(Err(error)).await,
        }
    })
}

/// Runs something whose sockets are in this namespace, on a thread of its own.
fn begin_in(
    namespace: OwnedFd,
    what: impl AsyncFnOnce(io::Result<()>) + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().build()?;
    let visitor = thread::Builder::new().name("network".to_owned());
    visitor.spawn(move || {
        let entered = setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET);
        runtime.block_on(what(entered.map_err(io::Error::from)));
    })
}

/// Joins the interfaces that are new, and writes down each that is redirected as soon as
/// it may be.
async fn look(
    handle: &Handle,
    redirected: &mut Vec<Redirected>,
    watched: bool,
    trusted: bool,
) -> io::Result<Seen> {
    let mut seen = Seen::default();
    // Before it is looked: so no change is missed.
    if !watched {
        seen.watch = Some(Watch::new()?);
    }
    let known: Vec<u32> = redirected.iter().map(|it| it.index).collect();
    let found = link::all(handle, &known).await?;
    redirected.retain(|it| found.there.contains(&it.index));
    seen.rules = found.rules;
    seen.refused = found.refused;
    for link in found.links {
        if let Some(known) = redirected.iter_mut().find(|it| it.index == link.index) {
            // What it may not say yet it says in vain.
            if let Err(error) = known.guard(handle, &link, trusted).await {
                let text = format!("the addresses of {:?} are not its own: {error}", link.name);
                seen.refused.push(io::Error::new(error.kind(), text));
            }
        } else {
            match join(handle, &link, redirected, trusted).await {
                Ok(tap) => seen.taps.push((link.index, tap)),
                Err(error) => {
                    let text = format!("the interface {:?} cannot be joined: {error}", link.name);
                    seen.refused.push(io::Error::new(error.kind(), text));
                    let index = link.index;
                    for it in redirected.extract_if(.., |it| it.index == index) {
                        it.let_go(handle).await?;
                    }
                    continue;
                }
            }
        }
        seen.links.push(link);
    }
    Ok(seen)
}

/// Makes a tap for an interface, and sends each one's frames to the other.
async fn join(
    handle: &Handle,
    link: &Link,
    redirected: &mut Vec<Redirected>,
    trusted: bool,
) -> io::Result<File> {
    let name = tap_name(link.index);
    let tap = tap::make(&name).map_err(|error| match error.raw_os_error() {
        Some(libc::EBUSY) => {
            let text = format!(
                "another virtual machine has it, by {name}: containers of different machines \
                 cannot have one network namespace"
            );
            io::Error::new(error.kind(), text)
        }
        _ => error,
    })?;
    let index = link::index_of(handle, &name).await?;
    link::bring_up(handle, index, link.mtu).await?;
    let mut joined = Redirected {
        index: link.index,
        made: make_ingress(handle, link.index).await?,
        own: None,
    };
    // What hangs on the tap goes with it.
    let guarded = async {
        make_ingress(handle, index).await?;
        joined.guard(handle, link, trusted).await
    };
    let guarded = guarded.await;
    redirected.push(joined);
    guarded?;
    redirect(handle, link.index, index).await?;
    if let Err(error) = answers::stay(handle, link.index, index).await {
        let name = &link.name;
        warn!(%error, name, "programs of the host in the pod's network get no answers");
    }
    redirect(handle, index, link.index).await?;
    Ok(tap)
}

/// The name of the tap beside an interface.
fn tap_name(index: u32) -> String {
    format!("bulkhead{index}")
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

/// A filter of ours on what comes in at an interface, without what it does.
fn filter(index: u32, priority: u16) -> io::Result<TcMessage> {
    let mut filter = TcMessage::with_index(number(index)?);
    filter.header.parent = TcHandle {
        major: 0xffff,
        minor: TcHandle::MIN_INGRESS,
    };
    filter.header.info = (u32::from(priority) << 16) | u32::from(ALL);
    Ok(filter)
}

/// Has a program look at what comes in at an interface, instead of another one of ours in
/// the same place.
async fn classify(handle: &Handle, index: u32, priority: u16, program: &OwnedFd) -> io::Result<()> {
    let mut filter = filter(index, priority)?;
    filter.header.handle = 1.into();
    let options = [
        TcFilterBpfOption::ProgFd(program.as_raw_fd().cast_unsigned()),
        TcFilterBpfOption::ProgName("bulkhead".to_owned()),
        TcFilterBpfOption::Flags(TcBpfFlags::DirectAction),
    ];
    let options = options.into_iter().map(TcOption::Bpf).collect();
    filter.attributes = vec![
        TcAttribute::Kind(TcFilterBpf::KIND.to_owned()),
        TcAttribute::Options(options),
    ];
    let new = RouteNetlinkMessage::NewTrafficFilter(filter);
    tell(handle, new, NLM_F_CREATE | NLM_F_REPLACE).await
}

/// Takes the filters of ours in this place away.
async fn forget(handle: &Handle, index: u32, priority: u16) -> io::Result<()> {
    let filter = filter(index, priority)?;
    tell(handle, RouteNetlinkMessage::DelTrafficFilter(filter), 0).await
}

/// Tells the kernel something that the crate has no words for.
async fn tell(handle: &Handle, what: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
    let mut message = NetlinkMessage::from(what);
    message.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
    let mut answers = handle.clone().request(message).map_err(error)?;
    while let Some(answer) = answers.next().await {
        if let NetlinkPayload::Error(refusal) = answer.payload
            && refusal.code.is_some()
        {
            return Err(refusal.to_io());
        }
    }
    Ok(())
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
