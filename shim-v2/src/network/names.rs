//! Docker's name server, which knows the names of the containers of a network and listens
//! on 127.0.0.11 of the namespace. The guest asks it by us (NW-34): its own 127.0.0.11 is
//! another one.

use std::{
    fs, io,
    net::{Ipv4Addr, Shutdown, SocketAddrV4},
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::Arc,
    time::Duration,
};

use bulkhead_agent_api::names::{Message, QUESTIONS, read_body, write_body};
use tokio::{
    net::{TcpStream, UdpSocket},
    sync::{Semaphore, mpsc},
    task::JoinSet,
    time::timeout,
};
use tracing::warn;

use super::begin_in;

/// Where it listens. Rules of Docker's in the namespace lead from here to its ports.
const SERVER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 11), 53);

/// How long an answer may take; Docker itself asks each server of the world for seconds.
const ANSWER: Duration = Duration::from_secs(12);

/// The namespace of such a name server.
#[derive(Debug)]
pub struct Names(OwnedFd);

/// Questions being answered, until it is dropped.
#[derive(Debug)]
pub struct Asked(UnixStream);

impl Names {
    /// In the network namespace of the calling thread.
    pub(super) fn find() -> Option<Names> {
        let sockets = fs::read_to_string("/proc/thread-self/net/udp").ok()?;
        if !is_there(&sockets) {
            return None;
        }
        let namespace = fs::File::open("/proc/thread-self/ns/net").ok()?;
        Some(Names(namespace.into()))
    }

    /// Answers the questions that come by this stream.
    ///
    /// # Errors
    ///
    /// No thread can be started, or no descriptor had.
    pub fn serve(self, stream: UnixStream) -> io::Result<Asked> {
        let asked = Asked(stream.try_clone()?);
        begin_in(self.0, async move |entered| {
            let served = match entered {
                Ok(()) => serve(stream).await,
                Err(error) => Err(error),
            };
            if let Err(error) = served
                && error.kind() != io::ErrorKind::UnexpectedEof
            {
                warn!(%error, "the pod's names are not looked up any more");
            }
        })?;
        Ok(asked)
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        // The thread sees the end. A guest that has gone has ended it already.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// Whether somebody listens at 127.0.0.11, in a table of sockets as the kernel writes it.
fn is_there(sockets: &str) -> bool {
    let mut local = sockets
        .lines()
        .filter_map(|line| line.split_whitespace().nth(1));
    local.any(|address| address.starts_with("0B00007F:"))
}

async fn serve(stream: UnixStream) -> io::Result<()> {
    let (mut from, mut to) = tokio::net::UnixStream::from_std(stream)?.into_split();
    let (answers, mut answered) = mpsc::channel::<Message>(QUESTIONS);
    let places = Arc::new(Semaphore::new(QUESTIONS));
    let read = async {
        let mut asking = JoinSet::new();
        loop {
            let question = Message::read(&mut from).await?;
            // A guest that asks more waits with all that it asks.
            let place = Arc::clone(&places).acquire_owned().await;
            while asking.try_join_next().is_some() {}
            let answers = answers.clone();
            asking.spawn(async move {
                let answer = timeout(ANSWER, ask(&question)).await;
                let body = answer.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
                let body = body.unwrap_or_default();
                // It is gone with the stream only.
                let _ = answers.send(Message { body, ..question }).await;
                drop(place);
            });
        }
    };
    let write = async {
        while let Some(answer) = answered.recv().await {
            answer.write(&mut to).await?;
        }
        Ok(())
    };
    tokio::select! {
        ended = read => ended,
        ended = write => ended,
    }
}

/// Asks as it was asked.
async fn ask(question: &Message) -> io::Result<Vec<u8>> {
    if question.tcp {
        let mut server = TcpStream::connect(SERVER).await?;
        write_body(&mut server, &question.body).await?;
        return read_body(&mut server).await;
    }
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
    socket.connect(SERVER).await?;
    socket.send(&question.body).await?;
    let mut answer = vec![0; usize::from(u16::MAX)];
    let count = socket.recv(&mut answer).await?;
    answer.truncate(count);
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_of_dockers_is_told_from_others() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue\n\
            \x20 12: 0100007F:0035 00000000:0000 07 00000000:00000000\n";
        assert!(!is_there(table));
        let docker = "  13: 0B00007F:9C4B 00000000:0000 07 00000000:00000000\n";
        assert!(is_there(&format!("{table}{docker}")));
        assert!(!is_there(""));
    }
}
