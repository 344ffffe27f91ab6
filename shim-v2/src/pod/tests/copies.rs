//! The scripted agent's copies: what comes in is kept, what goes out is what a test has
//! laid down.

use bulkhead_agent::streams::BoxStream;
use bulkhead_agent_api::{
    COPY_BEGINS,
    agent::{CancelCopyRequest, CopyInRequest, CopyOutRequest, Empty},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::script::Script;

/// What a copy that comes in ends with, if its stream does not.
pub(crate) const END: &[u8] = b"END";

/// Of the copies.
#[derive(Debug, Default)]
pub(crate) struct Copied {
    /// What came in.
    pub(crate) taken: Vec<u8>,
    /// What shall go out; without an end if there is nothing.
    pub(crate) gives: Vec<u8>,
    /// So much of it was taken.
    pub(crate) given: usize,
    cancelled: Vec<u64>,
}

impl Script {
    /// What goes out from now on.
    pub(crate) fn gives(&self, bytes: &[u8]) {
        self.copied(|copied| copied.gives = bytes.to_vec());
    }

    async fn stream(&self, id: u64) -> ttrpc::Result<BoxStream> {
        let mut stream = self.streams.claim(id)?.stream().await?;
        stream.write_all(&[COPY_BEGINS]).await.unwrap();
        Ok(stream)
    }

    /// Does it until the host gives it up.
    async fn unless_cancelled(
        &self,
        stream: u64,
        copy: impl Future<Output = ()>,
    ) -> ttrpc::Result<Empty> {
        tokio::select! {
            () = copy => {}
            () = self.until_copied(|copied| copied.cancelled.contains(&stream)) => {}
        }
        Ok(Empty::default())
    }

    pub(super) async fn copy_in(&self, r: CopyInRequest) -> ttrpc::Result<Empty> {
        let owners = if r.preserve_ownership { " kept" } else { "" };
        let rest = format!(" {} {}{owners}", r.container_id, r.path);
        self.enter("CopyIn", rest).await?;
        let mut stream = self.stream(r.stream).await?;
        let copy = async {
            let mut buffer = vec![0; 10_000];
            while let Ok(count @ 1..) = stream.read(&mut buffer).await {
                let ended = self.copied(|copied| {
                    copied.taken.extend(&buffer[..count]);
                    copied.taken.ends_with(END)
                });
                if ended {
                    break;
                }
            }
        };
        self.unless_cancelled(r.stream, copy).await
    }

    pub(super) async fn copy_out(&self, r: CopyOutRequest) -> ttrpc::Result<Empty> {
        let extent = if r.no_walk { " header" } else { "" };
        let rest = format!(" {} {}{extent}", r.container_id, r.path);
        self.enter("CopyOut", rest).await?;
        let mut stream = self.stream(r.stream).await?;
        let copy = async {
            let gives = self.copied(|copied| std::mem::take(&mut copied.gives));
            if !gives.is_empty() {
                let _ = stream.write_all(&gives).await;
                return;
            }
            while let Ok(count) = stream.write(&[b'x'; 1000]).await {
                self.copied(|copied| copied.given += count);
            }
        };
        self.unless_cancelled(r.stream, copy).await
    }

    pub(super) async fn cancel_copy(&self, r: CancelCopyRequest) -> ttrpc::Result<Empty> {
        self.enter("CancelCopy", String::new()).await?;
        self.copied(|copied| copied.cancelled.push(r.stream));
        Ok(Empty::default())
    }
}
