//! One process, from its start to its end, joined to our own streams, terminal and
//! signals. The same for the first process of a container and for an exec.

use std::{
    collections::VecDeque,
    future::pending,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    select,
    signal::unix::{Signal, SignalKind, signal},
    sync::oneshot,
    task::JoinHandle,
};

use crate::{
    error::{Error, Result, host},
    streams::{Copied, Streams},
    task::{Process, Task},
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

/// So many presses of Ctrl-C within [`PATIENCE_TIME`] end the process though it ignores
/// them. However often they come otherwise they are passed on, and so is each SIGTERM:
/// what they mean is the program's affair.
const PATIENCE: usize = 3;

/// The time of a person who has lost patience.
const PATIENCE_TIME: Duration = Duration::from_secs(1);

/// Exit code of a process that writes where nobody reads: 128 + SIGPIPE.
const BROKEN_PIPE: u32 = 141;

/// Our handlers; from their making on no signal of [`FORWARDED`] ends bulkhead.
#[derive(Debug)]
pub struct Signals {
    streams: Vec<(i32, Signal)>,
}

impl Signals {
    /// Takes the signals over. Needs a runtime.
    pub fn take() -> Result<Self> {
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
    pub async fn or_stop<T: Send + 'static>(
        &mut self,
        step: impl FnOnce(&AtomicBool) -> T + Send + 'static,
    ) -> Result<T> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut work = tokio::task::spawn_blocking({
            let stop = Arc::clone(&stop);
            move || step(&stop)
        });
        let number = select! {
            done = &mut work => return done.map_err(io::Error::other).map_err(host("wait for a thread")),
            number = self.next() => number,
        };
        stop.store(true, Ordering::Relaxed);
        drop(work.await);
        Err(Error::Interrupted(u8::try_from(number).unwrap_or(0)))
    }

    /// Does `step`, unless a signal comes first.
    pub async fn or<T>(&mut self, step: impl Future<Output = Result<T>>) -> Result<T> {
        select! {
            result = step => result,
            number = self.next() => Err(Error::Interrupted(u8::try_from(number).unwrap_or(0))),
        }
    }
}

/// Presses of Ctrl-C.
#[derive(Debug, Default)]
struct Patience {
    presses: VecDeque<Instant>,
}

impl Patience {
    /// Is this press, at `now`, one too many?
    fn is_over(&mut self, now: Instant) -> bool {
        self.presses.push_back(now);
        if self.presses.len() > PATIENCE {
            self.presses.pop_front();
        }
        self.presses.len() == PATIENCE
            && self
                .presses
                .front()
                .is_some_and(|first| now.duration_since(*first) <= PATIENCE_TIME)
    }
}

/// A process that was started, with our streams.
#[derive(Debug)]
pub struct Attached {
    task: Task,
    process: Process,
    streams: Streams,
    has_terminal: bool,
    waiting: JoinHandle<Result<u32>>,
    status: Option<u32>,
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.waiting.abort();
    }
}

/// Starts `process`. If this fails, or a signal comes first, it has not run.
pub async fn start(
    task: &Task,
    process: &Process,
    streams: Streams,
    has_terminal: bool,
    signals: &mut Signals,
) -> Result<Attached> {
    let waiting = tokio::spawn({
        let (task, process) = (task.clone(), process.clone());
        async move { task.wait(&process).await }
    });
    let mut attached = Attached {
        task: task.clone(),
        process: process.clone(),
        streams,
        has_terminal,
        waiting,
        status: None,
    };
    // An exec has no terminal before its start.
    attached.resize().await;
    signals.or(task.start(process)).await?;
    attached.streams.attached();
    Ok(attached)
}

impl Attached {
    /// Gives the process the size of our terminal.
    async fn resize(&self) {
        if self.has_terminal
            && let Some(size) = terminal::size()
        {
            let _ = self.task.resize(&self.process, size).await;
        }
    }

    /// What the process ended with, once that is known, whatever failed afterwards.
    pub fn status(&self) -> Option<u32> {
        self.status
    }

    /// Stays with the process to its end; answers its exit code.
    pub async fn follow(&mut self, signals: &mut Signals) -> Result<u32> {
        // Without our input the keys of our terminal stay ours: Ctrl-C is a signal.
        let raw = if self.has_terminal && self.streams.has_stdin() {
            terminal::Raw::enter()?
        } else {
            None
        };
        if !self.process.exec_id.is_empty() {
            self.resize().await;
        }
        let mut outputs = Outputs {
            rest: self.streams.copy_output(),
        };
        let mut stdin = self.streams.copy_stdin();
        let mut patience = Patience::default();
        // Why our output came to its end before the process.
        let mut cut = None;
        let status = loop {
            select! {
                ended = &mut self.waiting => {
                    break ended.map_err(io::Error::other).map_err(host("wait"))??;
                }
                () = closed(&mut stdin) => {
                    stdin = None;
                    // A process that ended meanwhile is no error.
                    let _ = self.task.close_stdin(&self.process).await;
                }
                number = signals.any() => {
                    if number == libc::SIGWINCH {
                        self.resize().await;
                        continue;
                    }
                    let impatient = number == libc::SIGINT && patience.is_over(Instant::now());
                    let number = if impatient { libc::SIGKILL } else { number };
                    let _ = self.task.kill(&self.process, number.unsigned_abs()).await;
                }
                why = outputs.cut(), if cut.is_none() => {
                    cut = Some(why);
                    let _ = self.task.kill(&self.process, libc::SIGKILL.unsigned_abs()).await;
                }
            }
        };
        // What was written before the end is ours to show, however long that takes, but
        // a signal ends that too. What was left in the background may hold the streams
        // for longer than anybody waits.
        self.status = Some(status);
        self.streams.process_ended();
        if cut.is_none() {
            let rest = async { Ok(outputs.all().await) };
            cut = signals.or(rest).await.unwrap_or(None);
        }
        drop(raw);
        match cut {
            None => Ok(status),
            Some(Cut::NoReader) => Ok(BROKEN_PIPE),
            Some(Cut::Failed(error)) => Err(Error::Output(error)),
        }
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

/// Why no more output can be passed on.
#[derive(Debug)]
enum Cut {
    /// Nobody reads it.
    NoReader,
    /// It cannot be written.
    Failed(io::Error),
}

impl Outputs {
    /// Comes when one of our streams takes no more; else never.
    async fn cut(&mut self) -> Cut {
        match self.all().await {
            Some(cut) => cut,
            None => pending().await,
        }
    }

    /// Comes when all copies have ended, or one was cut.
    async fn all(&mut self) -> Option<Cut> {
        while !self.rest.is_empty() {
            match self.one().await {
                Copied::All => {}
                Copied::NoReader => return Some(Cut::NoReader),
                Copied::Failed(error) => return Some(Cut::Failed(error)),
            }
        }
        None
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_presses_in_quick_succession_end_a_process() {
        let start = Instant::now();
        let at = |tenths: u64| start + Duration::from_millis(100 * tenths);
        let verdicts = |times: &[u64]| -> Vec<bool> {
            let mut patience = Patience::default();
            times
                .iter()
                .map(|time| patience.is_over(at(*time)))
                .collect()
        };
        // A program that takes the signal for its own, over and over.
        assert_eq!(verdicts(&[0, 8, 16, 24, 32, 40]), [false; 6]);
        assert_eq!(verdicts(&[0, 3, 6]), [false, false, true]);
        assert_eq!(verdicts(&[0, 50, 53, 56]), [false, false, false, true]);
    }

    #[tokio::test]
    async fn output_that_fails_is_told_apart_from_output_that_ends() {
        let copies = |ends: Vec<Copied>| Outputs {
            rest: ends
                .into_iter()
                .map(|end| {
                    let (sender, receiver) = oneshot::channel();
                    sender.send(end).unwrap();
                    receiver
                })
                .collect(),
        };
        assert!(copies(vec![Copied::All, Copied::All]).all().await.is_none());
        let full = Copied::Failed(io::ErrorKind::StorageFull.into());
        let cut = copies(vec![Copied::All, full]).all().await;
        assert!(matches!(cut, Some(Cut::Failed(_))), "{cut:?}");
        let cut = copies(vec![Copied::NoReader]).cut().await;
        assert!(matches!(cut, Cut::NoReader), "{cut:?}");
    }
}
