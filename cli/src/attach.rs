//! One process, from its start to its end, joined to our own streams, terminal and
//! signals. The same for the first process of a container and for an exec.

use std::{
    future::pending,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::{
    select,
    signal::unix::{Signal, SignalKind, signal},
    sync::oneshot,
};

use crate::{
    client::{Process, Task},
    error::{Error, Result, host},
    stdio::{Copied, Streams},
    terminal,
};

/// Signals that the process gets in our place.
const FORWARDED: [i32; 6] = [
    libc::SIGINT,
    libc::SIGTERM,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGUSR1,
    libc::SIGUSR2,
];

/// So many of the same signal end the container though it ignores them.
const PATIENCE: u8 = 3;

/// Exit code of a process that writes where nobody reads: 128 + SIGPIPE.
const BROKEN_PIPE: u32 = 141;

/// Our handlers; from their making on no signal of [`FORWARDED`] ends bulkhead.
#[derive(Debug)]
pub(crate) struct Signals {
    streams: Vec<(i32, Signal)>,
}

impl Signals {
    /// Takes the signals over. Needs a runtime.
    pub(crate) fn take() -> Result<Self> {
        let on = |number| signal(SignalKind::from_raw(number)).map_err(host("handle signals"));
        let numbers = FORWARDED.iter().chain(&[libc::SIGWINCH]);
        Ok(Signals {
            streams: numbers
                .map(|&number| Ok((number, on(number)?)))
                .collect::<Result<_>>()?,
        })
    }

    /// The next signal that asks for an end.
    async fn next(&mut self) -> i32 {
        loop {
            let number = self.any().await;
            if number != libc::SIGWINCH {
                return number;
            }
        }
    }

    /// The next signal.
    async fn any(&mut self) -> i32 {
        std::future::poll_fn(|context| {
            for (number, stream) in &mut self.streams {
                if stream.poll_recv(context).is_ready() {
                    return std::task::Poll::Ready(*number);
                }
            }
            std::task::Poll::Pending
        })
        .await
    }

    /// Does `step` on a thread of its own. A signal sets the flag that it is given,
    /// and it is waited for: what it makes is undone by its own guards.
    pub(crate) async fn or_stop<T: Send + 'static>(
        &mut self,
        step: impl FnOnce(&AtomicBool) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut work = tokio::task::spawn_blocking({
            let stop = Arc::clone(&stop);
            move || step(&stop)
        });
        let number = select! {
            done = &mut work => return done.map_err(io::Error::other).map_err(host("wait for a thread"))?,
            number = self.next() => number,
        };
        stop.store(true, Ordering::Relaxed);
        drop(work.await);
        Err(Error::Interrupted(u8::try_from(number).unwrap_or(0)))
    }

    /// Does `step`, unless a signal comes first.
    pub(crate) async fn or<T>(&mut self, step: impl Future<Output = Result<T>>) -> Result<T> {
        select! {
            result = step => result,
            number = self.next() => Err(Error::Interrupted(u8::try_from(number).unwrap_or(0))),
        }
    }
}

/// Starts `process` and stays with it to its end; answers its exit code.
pub(crate) async fn run(
    task: &Task,
    process: &Process,
    mut streams: Streams,
    has_terminal: bool,
    signals: &mut Signals,
) -> Result<u32> {
    let waiting = tokio::spawn({
        let (task, process) = (task.clone(), process.clone());
        async move { task.wait(&process).await }
    });
    let _abort = AbortOnDrop(waiting.abort_handle());
    if has_terminal && let Some(size) = terminal::size() {
        // An exec has no terminal before its start.
        let _ = task.resize(process, size).await;
    }
    signals.or(task.start(process)).await?;
    streams.attached();
    // Without our input the keys of our terminal stay ours: Ctrl-C is a signal.
    let raw = if has_terminal && streams.has_stdin() {
        terminal::Raw::enter()?
    } else {
        None
    };
    if has_terminal
        && !process.exec_id.is_empty()
        && let Some(size) = terminal::size()
    {
        let _ = task.resize(process, size).await;
    }
    let mut outputs = Outputs {
        rest: streams.copy_output(),
    };
    let mut stdin = streams.copy_stdin();
    let mut waiting = waiting;
    let mut counts = [0_u8; FORWARDED.len()];
    let mut broken = false;
    let status = loop {
        select! {
            ended = &mut waiting => break ended.map_err(io::Error::other).map_err(host("wait"))??,
            () = closed(&mut stdin) => {
                stdin = None;
                // A process that ended meanwhile is no error.
                let _ = task.close_stdin(process).await;
            }
            number = signals.any() => {
                if number == libc::SIGWINCH {
                    if has_terminal && let Some(size) = terminal::size() {
                        let _ = task.resize(process, size).await;
                    }
                    continue;
                }
                let index = FORWARDED.iter().position(|&known| known == number).unwrap_or(0);
                let count = counts.get_mut(index).map_or(1, |count| { *count = count.saturating_add(1); *count });
                let impatient = count >= PATIENCE && [libc::SIGINT, libc::SIGTERM].contains(&number);
                let number = if impatient { libc::SIGKILL } else { number };
                let _ = task.kill(process, number.unsigned_abs()).await;
            }
            () = outputs.no_reader(), if !broken => {
                broken = true;
                let _ = task.kill(process, libc::SIGKILL.unsigned_abs()).await;
            }
        }
    };
    // What was written before the end is ours to show, however long it takes, but a
    // signal ends that too.
    if !broken {
        let drained = async {
            outputs.all().await;
            Ok(())
        };
        let _ = signals.or(drained).await;
    }
    drop(raw);
    Ok(if broken { BROKEN_PIPE } else { status })
}

struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Comes when standard input has ended.
async fn closed(stdin: &mut Option<oneshot::Receiver<()>>) {
    match stdin {
        Some(ended) => drop(ended.await),
        None => pending().await,
    }
}

/// Copies of output under way.
struct Outputs {
    rest: Vec<oneshot::Receiver<Copied>>,
}

impl Outputs {
    /// Comes when nobody reads one of our streams any more; else never.
    async fn no_reader(&mut self) {
        while !self.rest.is_empty() {
            if self.one().await == Copied::NoReader {
                return;
            }
        }
        pending::<()>().await;
    }

    /// Comes when all copies have ended.
    async fn all(&mut self) {
        while !self.rest.is_empty() {
            self.one().await;
        }
    }

    /// The end of one of the copies, which must not be none.
    async fn one(&mut self) -> Copied {
        std::future::poll_fn(|context| {
            for index in 0..self.rest.len() {
                let Some(copy) = self.rest.get_mut(index) else {
                    continue;
                };
                if let std::task::Poll::Ready(copied) = std::pin::Pin::new(copy).poll(context) {
                    self.rest.swap_remove(index);
                    return std::task::Poll::Ready(copied.unwrap_or(Copied::All));
                }
            }
            std::task::Poll::Pending
        })
        .await
    }
}
