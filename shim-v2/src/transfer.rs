//! containerd's transfer service: files between a container and a stream.
//!
//! Parses requests at the edge. What a request names as its stream is closed when the
//! request is over, also when that was refused.

use std::{collections::HashMap, sync::Arc};

use async_trait::async_trait;
use containerd_shim_protos::protobuf::{
    Message,
    well_known_types::{any::Any, empty::Empty},
};
use tokio::sync::oneshot;
use tracing::debug;
use ttrpc::r#async::{Service, TtrpcContext};

use self::proto::{
    transfer::{ContainerPath, ReadStream, TransferRequest, WriteStream},
    transfer_ttrpc::{Transfer, create_transfer},
};
use crate::{
    agent::Copying,
    error::{Error, Result},
    io::streaming::Passage,
    names::ContainerId,
    pod::Pod,
    task::refuse,
};

#[expect(missing_debug_implementations, reason = "generated code")]
#[expect(
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    reason = "generated code"
)]
pub mod proto {
    //! The service's messages, its client and its server.

    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

/// The one kind of content.
const TAR: &str = "application/x-tar";

// What can be a source or a destination.
const CONTAINER_PATH: &str = "containerd.types.transfer.ContainerPath";
const READ_STREAM: &str = "containerd.types.transfer.ReadStream";
const WRITE_STREAM: &str = "containerd.types.transfer.WriteStream";

/// Copies files of one pod.
#[derive(Clone, Debug)]
pub struct TransferService {
    pod: Arc<Pod>,
}

impl TransferService {
    /// A service for `pod`.
    #[must_use]
    pub fn new(pod: Arc<Pod>) -> Self {
        TransferService { pod }
    }

    /// The service under its name.
    #[must_use]
    pub fn services(self) -> HashMap<String, Service> {
        create_transfer(Arc::new(self))
    }

    async fn copy(&self, request: TransferRequest, caller: oneshot::Receiver<()>) -> Result<()> {
        let Asked { stream, what } = Asked::read(&request.source, &request.destination);
        // Held to the end of this request, and closed with it.
        let claim = |id: &str| (!id.is_empty()).then(|| self.pod.hub().claim_here(id));
        let claimed = claim(&stream).flatten();
        let _progress = claim(&request.options.progress_stream);
        let (id, copying) = what?;
        let claimed = claimed.ok_or_else(|| argument("Stream", &stream, "it is used already"))?;
        let passage = Passage::open(claimed, &stream).await?;
        self.pod.copy(&id, &copying, passage, caller).await
    }
}

#[async_trait]
impl Transfer for TransferService {
    async fn transfer(&self, _: &TtrpcContext, request: TransferRequest) -> ttrpc::Result<Empty> {
        let name = request.source.type_url.clone();
        debug!(source = name, "request");
        // The library drops this future when the caller's connection or its patience
        // ends: the task, which has to clean up, learns of it.
        let (_caller, gone) = oneshot::channel();
        let (service, work) = (self.clone(), self.pod.work());
        let copied = tokio::spawn(async move {
            let copied = service.copy(request, gone).await;
            drop(work);
            copied
        });
        let copied = copied.await;
        copied
            .unwrap_or(Err(Error::Panicked("Transfer")))
            .map_err(|error| refuse("Transfer", &name, &error))?;
        Ok(Empty::new())
    }
}

/// A request, understood or not.
struct Asked {
    /// The stream that carries the archive, if one is named.
    stream: String,
    what: Result<(ContainerId, Copying)>,
}

impl Asked {
    fn read(source: &Any, destination: &Any) -> Self {
        let refused = match (kind(source), kind(destination)) {
            ("", _) => argument("Source", "", "there is none"),
            (_, "") => argument("Destination", "", "there is none"),
            (READ_STREAM, CONTAINER_PATH) => {
                let parts = |stream: ReadStream| (stream.stream, stream.media_type);
                return Self::copy(source, destination, parts, |path| Copying::In {
                    path: path.path,
                    preserve_ownership: path.preserve_ownership,
                });
            }
            (CONTAINER_PATH, WRITE_STREAM) => {
                let parts = |stream: WriteStream| (stream.stream, stream.media_type);
                return Self::copy(destination, source, parts, |path| Copying::Out {
                    path: path.path,
                    no_walk: path.no_walk,
                });
            }
            (from, to) => Error::NoTransfer(format!("A transfer from {from} to {to}")),
        };
        refused.into()
    }

    fn copy<S: Message>(
        stream: &Any,
        path: &Any,
        parts: impl FnOnce(S) -> (String, String),
        copying: impl FnOnce(ContainerPath) -> Copying,
    ) -> Self {
        let (stream, media_type) = match parse::<S>(stream) {
            Ok(stream) => parts(stream),
            Err(error) => return error.into(),
        };
        let what = || {
            let path: ContainerPath = parse(path)?;
            if media_type != TAR {
                return Err(Error::NoTransfer(format!("Content of type {media_type:?}")));
            }
            if stream.is_empty() {
                return Err(argument("Stream", "", "it has no name"));
            }
            if path.path.is_empty() || path.path.contains('\0') {
                return Err(argument("Path", &path.path, "it is not a path"));
            }
            Ok((ContainerId::new(&path.container_id)?, copying(path)))
        };
        let what = what();
        Asked { stream, what }
    }
}

impl From<Error> for Asked {
    fn from(error: Error) -> Self {
        Asked {
            stream: String::new(),
            what: Err(error),
        }
    }
}

/// The type, without what may stand before it.
fn kind(any: &Any) -> &str {
    any.type_url.rsplit('/').next().unwrap_or_default()
}

fn parse<M: Message>(any: &Any) -> Result<M> {
    M::parse_from_bytes(&any.value)
        .map_err(|error| argument("Message", kind(any), &error.to_string()))
}

fn argument(what: &'static str, value: &str, reason: &str) -> Error {
    Error::Argument {
        what,
        value: value.chars().take(120).collect(),
        reason: reason.to_owned(),
    }
}

#[cfg(test)]
mod tests;
