//! Standard streams over containerd's streaming service.
//!
//! A stream has a name and, at a time, one [`Link`]: a call of `Stream` that named it.
//! On the shim's own socket the caller is containerd, which may come before the
//! process is created ([`Hub`] keeps it) and comes again after it was restarted: the
//! newest link is the one that counts. A stream on another socket is dialled, and
//! dialled again when its link breaks.
//!
//! Who receives grants credit ([`outgoing`]): output is read from the guest no faster
//! than that, and what was sent on a link that broke without having been acknowledged
//! by further credit is sent again on the next one.
//!
//! What copies files has streams too ([`passage`]), each for one link only: who has lost
//! a part of an archive begins anew.

mod inlet;
mod link;
mod outgoing;
mod outlet;
mod passage;
mod window;

use std::{
    collections::{HashMap, VecDeque},
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use tokio::{
    sync::{Notify, oneshot},
    task::JoinHandle,
    time::{sleep, timeout},
};
use tracing::{debug, warn};
use ttrpc::{
    Code, Response,
    r#async::{ServerStream, StreamHandler, StreamInner, TtrpcContext},
};

use self::link::Link;
pub(crate) use self::passage::{Interrupted, Passage};
pub(super) use self::{inlet::Inlet, outlet::Outlet};
use super::target::refused;
use crate::{
    error::{Error, Result},
    lock::lock,
};

/// Name of the service.
pub const SERVICE: &str = "containerd.services.streaming.v1.Streaming";
/// Its only method.
pub const METHOD: &str = "Stream";

/// Time for a caller to name its stream, and for a server to answer.
const GREETING: Duration = Duration::from_secs(10);
/// Links that wait for a process which names their streams. Callers are root, so this
/// is a bound of mistakes only.
const EARLY: usize = 256;
/// Time to the next attempt to dial: first, and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Where a stream is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) socket: PathBuf,
    pub(super) id: String,
}

/// The streams of a pod.
#[derive(Debug, Default)]
pub struct Hub {
    /// The shim's own socket.
    socket: Option<PathBuf>,
    slots: Mutex<Slots>,
}

#[derive(Debug, Default)]
struct Slots {
    /// Of processes.
    claimed: HashMap<String, Arc<Slot>>,
    /// Of which no process has heard yet, the oldest first.
    early: VecDeque<(String, Arc<Slot>)>,
}

/// The place for the newest link of one stream.
#[derive(Debug, Default)]
struct Slot {
    link: Mutex<Option<Link>>,
    news: Notify,
}

impl Slot {
    fn put(&self, link: Link) {
        *lock(&self.link) = Some(link);
        self.news.notify_one();
    }

    /// Waits for a link that is newer than the last one.
    async fn next(&self) -> Link {
        loop {
            if let Some(link) = lock(&self.link).take() {
                return link;
            }
            self.news.notified().await;
        }
    }
}

impl Hub {
    /// The streams of a shim that listens on `socket`.
    #[must_use]
    pub fn new(socket: Option<PathBuf>) -> Arc<Self> {
        Arc::new(Hub {
            socket,
            slots: Mutex::default(),
        })
    }

    /// The place of a stream that somebody calls for.
    fn called(&self, id: &str) -> Arc<Slot> {
        let mut slots = lock(&self.slots);
        let early = slots.early.iter().find(|(early, _)| early == id);
        let known = slots
            .claimed
            .get(id)
            .or_else(|| early.map(|(_, slot)| slot));
        if let Some(slot) = known {
            return Arc::clone(slot);
        }
        if slots.early.len() >= EARLY {
            warn!("a stream that no process has asked for is closed");
            slots.early.pop_front();
        }
        let slot = Arc::<Slot>::default();
        slots.early.push_back((id.to_owned(), Arc::clone(&slot)));
        slot
    }

    /// Makes a stream that of one process.
    pub(super) async fn claim(self: &Arc<Self>, address: &Address) -> Result<Claim> {
        let (socket, id) = (&address.socket, &address.id);
        if self.socket.as_ref() != Some(socket) {
            let slot = Arc::<Slot>::default();
            let (link, open) = dial(address).await?;
            slot.put(link);
            let dialler = tokio::spawn(keep_dialled(address.clone(), Arc::clone(&slot), open));
            return Ok(Claim {
                slot,
                registered: None,
                dialler: Some(dialler),
            });
        }
        self.claim_here(id)
            .ok_or_else(|| refused(id, "another process has the stream"))
    }

    /// Takes a stream of the shim's own socket; `None` if somebody has it.
    pub(crate) fn claim_here(self: &Arc<Self>, id: &str) -> Option<Claim> {
        let mut slots = lock(&self.slots);
        if slots.claimed.contains_key(id) {
            return None;
        }
        let early = slots.early.iter().position(|(early, _)| early == id);
        let slot = early.and_then(|place| slots.early.remove(place));
        let slot = slot.map_or_else(Arc::default, |(_, slot)| slot);
        slots.claimed.insert(id.to_owned(), Arc::clone(&slot));
        Some(Claim {
            slot,
            registered: Some((Arc::clone(self), id.to_owned())),
            dialler: None,
        })
    }
}

/// The right of a process to a stream. Dropping it gives the stream up.
#[derive(Debug)]
pub(crate) struct Claim {
    slot: Arc<Slot>,
    registered: Option<(Arc<Hub>, String)>,
    dialler: Option<JoinHandle<()>>,
}

impl Claim {
    /// Waits for a link that is newer than the last one.
    async fn next(&self) -> Link {
        self.slot.next().await
    }

    /// There is no more to be said: nobody need be dialled again.
    fn close(&self) {
        if let Some(dialler) = &self.dialler {
            dialler.abort();
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.close();
        if let Some((hub, id)) = &self.registered {
            lock(&hub.slots).claimed.remove(id);
        }
    }
}

/// Calls for a stream of another server.
async fn dial(address: &Address) -> Result<(Link, oneshot::Receiver<()>)> {
    let dialled = timeout(GREETING, Link::dial(address)).await;
    let error = match dialled {
        Ok(Ok(link)) => return Ok(link),
        Ok(Err(error)) => std::io::Error::other(error),
        Err(_) => std::io::ErrorKind::TimedOut.into(),
    };
    Err(Error::Path {
        action: "open a stream at",
        path: address.socket.clone(),
        source: error,
    })
}

/// Dials anew whenever the link that was dialled last is given up.
async fn keep_dialled(address: Address, slot: Arc<Slot>, mut open: oneshot::Receiver<()>) {
    loop {
        let _ = (&mut open).await;
        let mut pause = PAUSE.0;
        open = loop {
            sleep(pause).await;
            match dial(&address).await {
                Ok((link, open)) => {
                    slot.put(link);
                    break open;
                }
                Err(error) => debug!(error = error.text(), "a stream is dialled again"),
            }
            pause = PAUSE.1.min(pause * 2);
        };
    }
}

/// The method `Stream`, by which others come for streams of this shim.
#[derive(Debug)]
pub struct Calls(pub Arc<Hub>);

#[async_trait]
impl StreamHandler for Calls {
    async fn handler(
        &self,
        _: TtrpcContext,
        inner: StreamInner,
    ) -> ttrpc::Result<Option<Response>> {
        let mut stream = ServerStream::new(inner);
        let Ok(first) = timeout(GREETING, stream.recv()).await else {
            return Ok(Some(refusal(Code::DEADLINE_EXCEEDED, "no stream is named")));
        };
        let Some(id) = first?.as_ref().and_then(link::named) else {
            return Ok(Some(refusal(Code::INVALID_ARGUMENT, "no stream is named")));
        };
        stream.send(&link::acknowledgement()).await?;
        let (link, open) = Link::called(stream);
        self.0.called(&id).put(link);
        // The library ends the stream when this returns.
        let _ = open.await;
        Ok(None)
    }
}

fn refusal(code: Code, text: &str) -> Response {
    Response {
        status: Some(ttrpc::get_status(code, text)).into(),
        ..Response::default()
    }
}

#[cfg(test)]
mod tests;
