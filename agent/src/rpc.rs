//! The agent's service: requests in, answers and status codes out.
//!
//! Owns the connection to the host. No decision is made here: each request is
//! one call to [`Containers`].

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use async_trait::async_trait;
use bulkhead_agent_api::{
    GREETING,
    agent::{
        AcceptRequest, AcceptResponse, CancelCopyRequest, ClockRequest, ClockResponse,
        ContainerRequest, CopyInRequest, CopyOutRequest, CreateRequest, DialRequest, Empty,
        ExecRequest, KillRequest, NamesRequest, NetworkRequest, PidsResponse, ProcessRequest,
        ProcessResponse, ResizePtyRequest, ResizeRequest, ResizeResponse, StatsResponse, Stdio,
        UpdateRequest, UpdateResponse, WaitOomRequest, WaitOomResponse, WaitResponse,
    },
    agent_ttrpc::{Agent, create_agent},
};
use futures::{Stream, StreamExt, pin_mut, stream};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf},
    sync::Notify,
    time::sleep,
};
use ttrpc::r#async::{Server, TtrpcContext, transport::Listener};

use crate::{
    clock,
    container::{Config, Containers},
    error::{Doing, Error},
    names::Names,
    network,
    reaper::Reaper,
    size::Size,
    streams::Streams,
};

/// Why the agent's work is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The host's connection has ended.
    HostGone,
    /// The host asked for it.
    Shutdown,
}

/// Greets the host on `connection` and serves it until either side ends;
/// `streams` are the connections for standard streams.
pub async fn serve<C, S>(
    config: Config,
    mut connection: C,
    streams: impl Stream<Item = io::Result<S>> + Send + 'static,
) -> Result<End, Error>
where
    C: AsyncRead + AsyncWrite + Send + Sync + Unpin + 'static,
    S: crate::streams::Stream + 'static,
{
    let reaper = Reaper::start().doing("collect exits")?;
    let meeting_point = Streams::new();
    tokio::spawn(accept(streams, Arc::clone(&meeting_point)));
    connection
        .write_all(GREETING.as_bytes())
        .await
        .doing("greet the host")?;

    let host_gone = Arc::new(Notify::new());
    let connection = Watched {
        inner: connection,
        end: Arc::clone(&host_gone),
    };
    let shutdown = Arc::new(Notify::new());
    let names = Names::new(config.cgroups.clone());
    let service = Service {
        containers: Containers::new(config, reaper, Arc::clone(&meeting_point)),
        streams: meeting_point,
        names,
        shutdown: Arc::clone(&shutdown),
    };
    // A listener that yields the one connection there is.
    let mut server = Server::new()
        .add_listener(Listener::new(stream::iter([Ok(connection)])))
        .register_service(create_agent(Arc::new(service)));
    server
        .start()
        .await
        .map_err(io::Error::other)
        .doing("serve the host")?;

    tokio::select! {
        () = host_gone.notified() => Ok(End::HostGone),
        () = shutdown.notified() => {
            /// The answer has this long to reach the host.
            const PARTING: Duration = Duration::from_millis(100);
            tokio::select! {
                () = host_gone.notified() => {}
                () = sleep(PARTING) => {}
            }
            Ok(End::Shutdown)
        }
    }
}

async fn accept<S>(connections: impl Stream<Item = io::Result<S>>, meeting_point: Arc<Streams>)
where
    S: crate::streams::Stream + 'static,
{
    const AFTER_FAILURE: Duration = Duration::from_millis(100);
    pin_mut!(connections);
    loop {
        // Without room they wait where they are.
        let room = meeting_point.room().await;
        let Some(connection) = connections.next().await else {
            return;
        };
        match connection {
            Ok(connection) => meeting_point.accept(connection, room),
            // Out of descriptors or memory: the same at once if asked at once.
            Err(_) => sleep(AFTER_FAILURE).await,
        }
    }
}

struct Service {
    containers: Containers,
    streams: Arc<Streams>,
    names: Names,
    shutdown: Arc<Notify>,
}

impl Service {
    /// Lets go of the streams of a request that has failed.
    fn forget(&self, stdio: &Stdio) {
        self.streams
            .forget([stdio.stdin, stdio.stdout, stdio.stderr]);
    }
}

#[async_trait]
impl Agent for Service {
    async fn create(&self, _: &TtrpcContext, r: CreateRequest) -> ttrpc::Result<ProcessResponse> {
        let pid = self
            .containers
            .create(&r)
            .await
            .inspect_err(|_| self.forget(&r.stdio))?;
        Ok(ProcessResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, r: ContainerRequest) -> ttrpc::Result<Empty> {
        self.containers.start(&r.container_id).await?;
        Ok(Empty::default())
    }

    async fn exec(&self, _: &TtrpcContext, r: ExecRequest) -> ttrpc::Result<ProcessResponse> {
        let pid = self
            .containers
            .exec(&r.container_id, &r.exec_id, &r.process, &r.stdio)
            .await
            .inspect_err(|_| self.forget(&r.stdio))?;
        Ok(ProcessResponse {
            pid,
            ..Default::default()
        })
    }

    async fn wait(&self, _: &TtrpcContext, r: ProcessRequest) -> ttrpc::Result<WaitResponse> {
        let ended = self.containers.wait(&r.container_id, &r.exec_id).await?;
        Ok(WaitResponse {
            exit_status: ended.exit.status,
            exited_at_ns: ended.exit.at_ns,
            oom_kills: ended.oom_kills,
            output_open: ended.output_open,
            stats: ended.stats.into(),
            ..Default::default()
        })
    }

    async fn wait_oom(
        &self,
        _: &TtrpcContext,
        r: WaitOomRequest,
    ) -> ttrpc::Result<WaitOomResponse> {
        let oom_kills = self.containers.wait_oom(&r.container_id, r.seen).await?;
        Ok(WaitOomResponse {
            oom_kills,
            ..Default::default()
        })
    }

    async fn ping(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        Ok(Empty::default())
    }

    async fn kill(&self, _: &TtrpcContext, r: KillRequest) -> ttrpc::Result<Empty> {
        if r.all {
            self.containers.kill_all(&r.container_id, r.signal)?;
        } else {
            self.containers
                .kill(&r.container_id, &r.exec_id, r.signal)?;
        }
        Ok(Empty::default())
    }

    async fn delete(&self, _: &TtrpcContext, r: ProcessRequest) -> ttrpc::Result<Empty> {
        self.containers.delete(&r.container_id, &r.exec_id).await?;
        Ok(Empty::default())
    }

    async fn pids(&self, _: &TtrpcContext, r: ContainerRequest) -> ttrpc::Result<PidsResponse> {
        let pids = self.containers.pids(&r.container_id)?;
        Ok(PidsResponse {
            pids,
            ..Default::default()
        })
    }

    async fn close_stdin(&self, _: &TtrpcContext, r: ProcessRequest) -> ttrpc::Result<Empty> {
        self.containers.close_stdin(&r.container_id, &r.exec_id)?;
        Ok(Empty::default())
    }

    async fn resize_pty(&self, _: &TtrpcContext, r: ResizePtyRequest) -> ttrpc::Result<Empty> {
        self.containers
            .resize(&r.container_id, &r.exec_id, r.columns, r.rows)?;
        Ok(Empty::default())
    }

    async fn clock(&self, _: &TtrpcContext, r: ClockRequest) -> ttrpc::Result<ClockResponse> {
        if r.move_ns != 0 {
            clock::adjust(r.move_ns).doing("set the clock")?;
        }
        Ok(ClockResponse {
            now_ns: clock::now_ns(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        self.containers.kill_everything()?;
        rustix::fs::sync();
        self.shutdown.notify_one();
        Ok(Empty::default())
    }

    async fn stats(&self, _: &TtrpcContext, r: ContainerRequest) -> ttrpc::Result<StatsResponse> {
        Ok(self.containers.stats(&r.container_id)?)
    }

    async fn update(&self, _: &TtrpcContext, r: UpdateRequest) -> ttrpc::Result<UpdateResponse> {
        let notes = self
            .containers
            .update(&r.container_id, &r.resources)
            .await?;
        Ok(UpdateResponse {
            notes,
            ..Default::default()
        })
    }

    async fn resize(&self, _: &TtrpcContext, r: ResizeRequest) -> ttrpc::Result<ResizeResponse> {
        let to = Size {
            processors: r.processors,
            more_memory: r.more_memory_bytes,
        };
        let device = Some(r.memory_device).filter(|device| *device > 0);
        let size = self.containers.resize_machine(to, device).await?;
        Ok(ResizeResponse {
            processors: size.processors,
            more_memory_bytes: size.more_memory,
            ..Default::default()
        })
    }

    async fn set_up_network(&self, _: &TtrpcContext, r: NetworkRequest) -> ttrpc::Result<Empty> {
        self.containers.set_up_network(&r).await?;
        Ok(Empty::default())
    }

    async fn freeze(&self, _: &TtrpcContext, r: ContainerRequest) -> ttrpc::Result<Empty> {
        self.containers.freeze(&r.container_id).await?;
        Ok(Empty::default())
    }

    async fn thaw(&self, _: &TtrpcContext, r: ContainerRequest) -> ttrpc::Result<Empty> {
        self.containers.thaw(&r.container_id).await?;
        Ok(Empty::default())
    }

    async fn accept(&self, _: &TtrpcContext, r: AcceptRequest) -> ttrpc::Result<AcceptResponse> {
        let socket = self.containers.accept(&r.container_id, r.stream).await?;
        Ok(AcceptResponse {
            socket,
            ..Default::default()
        })
    }

    async fn dial(&self, _: &TtrpcContext, r: DialRequest) -> ttrpc::Result<Empty> {
        network::dial(&self.streams, r.stream, r.port).await?;
        Ok(Empty::default())
    }

    async fn names(&self, _: &TtrpcContext, r: NamesRequest) -> ttrpc::Result<Empty> {
        let served = self.names.serve(&self.streams, r.stream).await;
        served.inspect_err(|_| self.streams.forget([r.stream, 0, 0]))?;
        Ok(Empty::default())
    }

    async fn copy_in(&self, _: &TtrpcContext, r: CopyInRequest) -> ttrpc::Result<Empty> {
        let copied = self.containers.copy_in(&r).await;
        copied.inspect_err(|_| self.streams.forget([r.stream, 0, 0]))?;
        Ok(Empty::default())
    }

    async fn copy_out(&self, _: &TtrpcContext, r: CopyOutRequest) -> ttrpc::Result<Empty> {
        let copied = self.containers.copy_out(&r).await;
        copied.inspect_err(|_| self.streams.forget([r.stream, 0, 0]))?;
        Ok(Empty::default())
    }

    async fn cancel_copy(&self, _: &TtrpcContext, r: CancelCopyRequest) -> ttrpc::Result<Empty> {
        self.containers.cancel_copy(r.stream);
        Ok(Empty::default())
    }
}

/// A connection that says when it has ended, in whichever way.
struct Watched<C> {
    inner: C,
    end: Arc<Notify>,
}

impl<C> Drop for Watched<C> {
    fn drop(&mut self) {
        self.end.notify_one();
    }
}

impl<C: AsyncRead + Unpin> AsyncRead for Watched<C> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let result = Pin::new(&mut self.inner).poll_read(context, buffer);
        let ended = match &result {
            Poll::Ready(Ok(())) => buffer.filled().len() == before && buffer.remaining() > 0,
            Poll::Ready(Err(_)) => true,
            Poll::Pending => false,
        };
        if ended {
            self.end.notify_one();
        }
        result
    }
}

impl<C: AsyncWrite + Unpin> AsyncWrite for Watched<C> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}
