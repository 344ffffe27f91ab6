//! Names that only the host can look up: what is asked at 127.0.0.11 of the guest goes to
//! the host by a stream, and its answers come back by it (NW-34).

use std::{
    collections::HashMap,
    io,
    net::{Ipv4Addr, SocketAddrV4},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bulkhead_agent_api::names::{Message, QUESTIONS, read_body, write_body};
use tokio::{
    io::split,
    net::{TcpListener, TcpStream, UdpSocket},
    sync::{Semaphore, mpsc, oneshot},
    task::{JoinHandle, JoinSet},
    time::{sleep, timeout},
};

use crate::{
    error::{Doing, Error},
    streams::{BoxStream, Streams},
};

mod lead;

/// Where it is asked: from there it is led to where we listen.
const SERVER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 11), 53);

/// How long an answer may take, and a connection be silent: longer than the host waits.
const ANSWER: Duration = Duration::from_secs(15);

/// How long it is waited after a failure that would come again at once.
const AFTER_FAILURE: Duration = Duration::from_millis(100);

/// Whoever serves at present.
#[derive(Debug, Default)]
pub(crate) struct Names {
    /// The cgroup of those who ask.
    cgroup: Option<PathBuf>,
    serving: tokio::sync::Mutex<Option<JoinHandle<()>>>,
}

impl Names {
    /// For the processes of a cgroup.
    pub(crate) fn new(cgroup: PathBuf) -> Self {
        Names {
            cgroup: Some(cgroup),
            ..Names::default()
        }
    }

    /// Serves from now on by the stream with this id, when that comes, and by no other.
    /// Answers the port at which it listens.
    pub(crate) async fn serve(&self, streams: &Arc<Streams>, stream: u64) -> Result<u16, Error> {
        let claim = streams.claim(stream)?;
        let mut serving = self.serving.lock().await;
        if let Some(before) = serving.take() {
            before.abort();
            // Its sockets are closed then.
            let _ = before.await;
        }
        let doing = "listen for questions after names";
        let (udp, tcp) = listen().await.doing(doing)?;
        let port = tcp.local_addr().doing(doing)?.port();
        let leads = match &self.cgroup {
            Some(cgroup) => lead::lead(cgroup, port).doing(doing)?,
            None => Vec::new(),
        };
        *serving = Some(tokio::spawn(async move {
            if let Ok(stream) = claim.stream().await {
                // It ends with the stream.
                let _ = serve(udp, tcp, stream).await;
            }
            drop(leads);
        }));
        Ok(port)
    }
}

/// Listens at some port, the same of both protocols.
async fn listen() -> io::Result<(UdpSocket, TcpListener)> {
    const TRIES: usize = 10;
    let mut refused = None;
    for _ in 0..TRIES {
        let tcp = TcpListener::bind((*SERVER.ip(), 0)).await?;
        match UdpSocket::bind(tcp.local_addr()?).await {
            Ok(udp) => return Ok((udp, tcp)),
            Err(error) => refused = Some(error),
        }
    }
    Err(refused.unwrap_or_else(|| io::ErrorKind::AddrInUse.into()))
}

/// Questions on their way.
#[derive(Debug)]
struct Questions {
    to_host: mpsc::Sender<Message>,
    waiting: Mutex<Waiting>,
    places: Arc<Semaphore>,
}

#[derive(Debug, Default)]
struct Waiting {
    last: u32,
    /// By the numbers of their questions.
    answers: HashMap<u32, oneshot::Sender<Vec<u8>>>,
}

impl Questions {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().expect("no holder of the lock panics")
    }

    /// Asks the host; no answer is an answer of no bytes.
    async fn ask(&self, tcp: bool, body: Vec<u8>) -> Vec<u8> {
        let (answer, answered) = oneshot::channel();
        let number = {
            let mut waiting = self.waiting();
            waiting.last = waiting.last.wrapping_add(1);
            let number = waiting.last;
            waiting.answers.insert(number, answer);
            number
        };
        let asked = async {
            let message = Message { number, tcp, body };
            self.to_host.send(message).await.ok()?;
            answered.await.ok()
        };
        let answer = timeout(ANSWER, asked).await;
        self.waiting().answers.remove(&number);
        answer.ok().flatten().unwrap_or_default()
    }

    fn answer(&self, answer: Message) {
        if let Some(asked) = self.waiting().answers.remove(&answer.number) {
            // Who has given up asks again.
            let _ = asked.send(answer.body);
        }
    }
}

async fn serve(udp: UdpSocket, tcp: TcpListener, stream: BoxStream) -> io::Result<()> {
    let (mut from, mut to) = split(stream);
    let (to_host, mut asked) = mpsc::channel::<Message>(QUESTIONS);
    let questions = Arc::new(Questions {
        to_host,
        waiting: Mutex::default(),
        places: Arc::new(Semaphore::new(QUESTIONS)),
    });
    let udp = Arc::new(udp);
    let write = async {
        while let Some(question) = asked.recv().await {
            question.write(&mut to).await?;
        }
        Ok(())
    };
    let read = async {
        loop {
            questions.answer(Message::read(&mut from).await?);
        }
    };
    tokio::select! {
        ended = write => ended,
        ended = read => ended,
        () = hear(&udp, &questions) => Ok(()),
        () = accept(&tcp, &questions) => Ok(()),
    }
}

/// Takes questions that come by UDP. One too many is lost, and asked again.
async fn hear(udp: &Arc<UdpSocket>, questions: &Arc<Questions>) {
    let mut asking = JoinSet::new();
    let mut space = vec![0; usize::from(u16::MAX)];
    loop {
        let Ok((count, from)) = udp.recv_from(&mut space).await else {
            sleep(AFTER_FAILURE).await;
            continue;
        };
        while asking.try_join_next().is_some() {}
        let Ok(place) = Arc::clone(&questions.places).try_acquire_owned() else {
            continue;
        };
        let body = space[..count].to_vec();
        let (udp, questions) = (Arc::clone(udp), Arc::clone(questions));
        asking.spawn(async move {
            let answer = questions.ask(false, body).await;
            if !answer.is_empty() {
                let _ = udp.send_to(&answer, from).await;
            }
            drop(place);
        });
    }
}

/// Takes those that come by TCP; a connection too many is closed.
async fn accept(tcp: &TcpListener, questions: &Arc<Questions>) {
    let mut connections = JoinSet::new();
    loop {
        let Ok((connection, _)) = tcp.accept().await else {
            sleep(AFTER_FAILURE).await;
            continue;
        };
        while connections.try_join_next().is_some() {}
        let Ok(place) = Arc::clone(&questions.places).try_acquire_owned() else {
            continue;
        };
        let questions = Arc::clone(questions);
        connections.spawn(async move {
            // Whoever asks has gone, or the host has no answer: both end it.
            let _ = converse(connection, &questions).await;
            drop(place);
        });
    }
}

async fn converse(mut connection: TcpStream, questions: &Questions) -> io::Result<()> {
    loop {
        let question = timeout(ANSWER, read_body(&mut connection)).await;
        let question = question.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        let answer = questions.ask(true, question).await;
        if answer.is_empty() {
            return Ok(());
        }
        write_body(&mut connection, &answer).await?;
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use nix::sched::{CloneFlags, unshare};
    use tokio::io::{AsyncWriteExt, DuplexStream, duplex};

    use super::*;
    use crate::sys;

    /// Runs something in a network namespace with a loopback interface.
    fn alone(what: impl AsyncFnOnce() + Send + 'static) {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: needs root");
            return;
        }
        let done = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            sys::bring_up_interface(c"lo").unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = { runtime }.enable_all().build().unwrap();
            let limit = Duration::from_secs(60);
            runtime.block_on(async { timeout(limit, what()).await.expect("it hangs") });
        });
        done.join().unwrap();
    }

    /// The host's end of a stream by which names are asked from now on, and where.
    async fn served(
        names: &Names,
        streams: &Arc<Streams>,
        id: u64,
    ) -> (DuplexStream, SocketAddrV4) {
        let (mut host, guest) = duplex(1 << 17);
        streams.accept(guest, streams.room().await);
        host.write_all(&id.to_le_bytes()).await.unwrap();
        let port = names.serve(streams, id).await.unwrap();
        (host, SocketAddrV4::new(*SERVER.ip(), port))
    }

    async fn asked(host: &mut DuplexStream) -> Message {
        Message::read(host).await.unwrap()
    }

    #[test]
    fn what_is_asked_goes_to_the_host_and_its_answers_to_who_asked_nw_34() {
        alone(async || {
            let (names, streams) = (Names::default(), Streams::new());
            let (mut host, server) = served(&names, &streams, 7).await;
            let mut clients = Vec::new();
            for body in [b"one", b"two"] {
                let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
                client.connect(server).await.unwrap();
                client.send(body).await.unwrap();
                clients.push(client);
            }
            // Answered in another order than asked.
            let (first, second) = (asked(&mut host).await, asked(&mut host).await);
            assert!(!first.tcp && first.number != second.number);
            for question in [second, first] {
                let body = [&question.body[..], b"!"].concat();
                let answer = Message { body, ..question };
                answer.write(&mut host).await.unwrap();
            }
            for (client, expected) in clients.iter().zip([b"one!", b"two!"]) {
                let mut answer = [0; 9];
                let count = client.recv(&mut answer).await.unwrap();
                assert_eq!(&answer[..count], expected);
            }
            // By TCP several on one connection, until there is no answer.
            let mut client = TcpStream::connect(server).await.unwrap();
            for body in [&[1; 60_000][..], b"x"] {
                write_body(&mut client, body).await.unwrap();
                let question = asked(&mut host).await;
                assert!(question.tcp && question.body == body);
                question.write(&mut host).await.unwrap();
                assert_eq!(read_body(&mut client).await.unwrap(), body);
            }
            write_body(&mut client, b"unknown").await.unwrap();
            let body = Vec::new();
            let answer = Message {
                body,
                ..asked(&mut host).await
            };
            answer.write(&mut host).await.unwrap();
            read_body(&mut client).await.unwrap_err();
        });
    }

    #[test]
    fn the_last_stream_counts_and_more_questions_than_may_wait_are_lost_nw_34() {
        alone(async || {
            let (names, streams) = (Names::default(), Streams::new());
            let (mut before, _) = served(&names, &streams, 7).await;
            let (mut host, server) = served(&names, &streams, 8).await;
            Message::read(&mut before).await.unwrap_err();
            let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            client.connect(server).await.unwrap();
            for number in 0..=u8::try_from(QUESTIONS).unwrap() {
                client.send(&[number]).await.unwrap();
                // Each is taken before the next one comes.
                sleep(Duration::from_millis(5)).await;
            }
            for number in 0..u8::try_from(QUESTIONS).unwrap() {
                assert_eq!(asked(&mut host).await.body, [number]);
            }
            let more = timeout(Duration::from_millis(300), asked(&mut host)).await;
            assert!(more.is_err(), "{more:?}");
        });
    }
}
