//! Connections to the loopback addresses of a pod's network namespace, carried to the
//! guest's own: `kubectl port-forward` and whoever else enters the namespace on the host.
//!
//! The guest is asked first whether somebody listens there; if not, the connection is
//! reset, as if there had been nobody (NW-26). At most [`CONNECTIONS`] at once; others wait
//! in the listener's queue. They do not live through a change of the shim's program.

use std::{io, os::fd::OwnedFd, sync::Arc, time::Duration};

use bulkhead_agent_api::relay;
use rustix::net::sockopt::set_socket_linger;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
};
use tracing::warn;

use crate::{error::Error, guest::Guest, network::Loopback};

/// Most connections at once.
const CONNECTIONS: usize = 128;

/// How long it is waited after a failure that would come again at once.
const AFTER_FAILURE: Duration = Duration::from_millis(100);

/// Connections being served. Dropped, all are closed, and none is led here any more.
#[derive(Debug)]
pub(crate) struct Served {
    _tasks: JoinSet<()>,
    _steering: OwnedFd,
}

/// Serves them.
pub(crate) fn serve(guest: &Arc<dyn Guest>, loopback: Loopback) -> io::Result<Served> {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let mut tasks = JoinSet::new();
    for listener in loopback.listeners {
        let listener = TcpListener::from_std(listener)?;
        tasks.spawn(listen(Arc::clone(guest), listener, Arc::clone(&places)));
    }
    Ok(Served {
        _tasks: tasks,
        _steering: loopback.steering,
    })
}

async fn listen(guest: Arc<dyn Guest>, listener: TcpListener, places: Arc<Semaphore>) {
    let mut connections = JoinSet::new();
    // Nobody closes the semaphore.
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        let connection = match listener.accept().await {
            Ok((connection, _)) => connection,
            Err(error) => {
                warn!(%error, "a connection to the pod's loopback address is not accepted");
                tokio::time::sleep(AFTER_FAILURE).await;
                continue;
            }
        };
        while connections.try_join_next().is_some() {}
        let guest = Arc::clone(&guest);
        connections.spawn(async move {
            forward(&*guest, connection).await;
            drop(place);
        });
    }
}

async fn forward(guest: &dyn Guest, connection: TcpStream) {
    let dialled = async {
        let port = connection.local_addr().map_err(Error::Stream)?.port();
        let _room = guest.dialer().reserve(1).await;
        let (id, stream) = guest.dialer().stream().await?;
        guest.agent().dial(id, port).await?;
        Ok::<_, Error>(stream)
    };
    match dialled.await {
        Ok(stream) => relay(connection, stream).await,
        // The reset comes with the end of the socket.
        Err(_) => drop(set_socket_linger(&connection, Some(Duration::ZERO))),
    }
}
