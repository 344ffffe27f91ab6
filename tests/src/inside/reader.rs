//! What comes out of a pipe, a FIFO or a terminal, as it comes.

use std::{
    io::Read,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Instant,
};

/// Bytes that one read takes.
const BUFFER: usize = 64 << 10;

/// Collects all that somebody writes.
#[derive(Clone, Debug)]
pub struct Reader(Arc<(Mutex<Collected>, Condvar)>);

#[derive(Debug, Default)]
struct Collected {
    bytes: Vec<u8>,
    closed: bool,
}

impl Reader {
    /// Begins to read, in a thread of its own.
    #[must_use]
    pub fn start(mut from: impl Read + Send + 'static) -> Reader {
        let reader = Reader(Arc::default());
        let shared = reader.clone();
        thread::spawn(move || {
            let mut buffer = vec![0; BUFFER];
            loop {
                // A terminal whose other side is closed gives an error.
                let n = from.read(&mut buffer).unwrap_or(0);
                let mut collected = shared.lock();
                collected.bytes.extend_from_slice(&buffer[..n]);
                collected.closed = n == 0;
                shared.0.1.notify_all();
                if n == 0 {
                    return;
                }
            }
        });
        reader
    }

    fn lock(&self) -> MutexGuard<'_, Collected> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What has come so far.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.lock().bytes).into_owned()
    }

    /// How many bytes have come so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lock().bytes.len()
    }

    /// Has nothing come so far?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Waits until there is this text; false if it never will be.
    #[must_use]
    pub fn wait_for(&self, text: &str, end: Instant) -> bool {
        self.wait_until(end, |bytes| String::from_utf8_lossy(bytes).contains(text))
    }

    /// Waits until what was read satisfies `done`; false if it never will.
    pub fn wait_until(&self, end: Instant, done: impl Fn(&[u8]) -> bool) -> bool {
        self.wait(end, |collected| done(&collected.bytes)).1
    }

    /// Everything, once the other side is closed; `None` if it is still open at `end`.
    #[must_use]
    pub fn end(&self, end: Instant) -> Option<Vec<u8>> {
        let (collected, closed) = self.wait(end, |collected| collected.closed);
        closed.then(|| collected.bytes.clone())
    }

    fn wait(
        &self,
        end: Instant,
        done: impl Fn(&Collected) -> bool,
    ) -> (MutexGuard<'_, Collected>, bool) {
        let mut collected = self.lock();
        loop {
            if done(&collected) {
                return (collected, true);
            }
            let left = end.saturating_duration_since(Instant::now());
            if collected.closed || left.is_zero() {
                return (collected, false);
            }
            let waited = self.0.1.wait_timeout(collected, left);
            collected = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
