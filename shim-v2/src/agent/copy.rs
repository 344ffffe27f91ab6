//! Calls of the agent that copy files. The archives never come near the shim's eyes:
//! they pass through streams, as bytes.

use bulkhead_agent_api::agent::{CancelCopyRequest, CopyInRequest, CopyOutRequest};

use super::{Agent, answer, refusal};
use crate::{error::Result, names::ContainerId};

/// What is to be copied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Copying {
    /// An archive into a directory of the container.
    In {
        /// The directory.
        path: String,
        /// Owners as the archive tells; else the container's root.
        preserve_ownership: bool,
    },
    /// An archive of a file or a directory.
    Out {
        /// Which.
        path: String,
        /// Its header alone.
        no_walk: bool,
    },
}

impl Agent {
    /// Copies files, over the stream of this number; answers when that is done, however
    /// long it takes.
    pub async fn copy(
        &self,
        container: &ContainerId,
        stream: u64,
        copying: &Copying,
    ) -> Result<()> {
        let context = ttrpc::context::with_timeout(0);
        let copied = match copying.clone() {
            Copying::In {
                path,
                preserve_ownership,
            } => {
                let request = CopyInRequest {
                    container_id: container.to_string(),
                    stream,
                    path,
                    preserve_ownership,
                    ..CopyInRequest::default()
                };
                self.client.copy_in(context, &request).await
            }
            Copying::Out { path, no_walk } => {
                let request = CopyOutRequest {
                    container_id: container.to_string(),
                    stream,
                    path,
                    no_walk,
                    ..CopyOutRequest::default()
                };
                self.client.copy_out(context, &request).await
            }
        };
        copied
            .map(drop)
            .map_err(|error| refusal("The copy failed", error))
    }

    /// Gives up the copy over this stream.
    pub async fn cancel_copy(&self, stream: u64) -> Result<()> {
        let request = CancelCopyRequest {
            stream,
            ..CancelCopyRequest::default()
        };
        let call = self
            .client
            .cancel_copy(ttrpc::context::with_timeout(0), &request);
        let failed = "Giving up a copy failed";
        answer("CancelCopy", self.limits.request, failed, call).await?;
        Ok(())
    }
}
