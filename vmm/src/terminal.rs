//! The user's terminal as the guest's console: raw mode, and a way out.

use std::{
    io::{self, Read, Write},
    os::fd::OwnedFd,
    sync::{Mutex, PoisonError},
    thread,
};

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

/// Ctrl-A: the next key is meant for us.
const ESCAPE: u8 = 1;

/// What the terminal was before.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Keeps the terminal raw.
#[derive(Debug)]
pub(crate) struct Raw(());

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

/// Makes the terminal what it was before.
pub(crate) fn restore() {
    let before = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(before) = before {
        // A terminal that is gone needs nothing any more.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &before);
    }
}

/// Standard input for the guest. A terminal is made raw, and Ctrl-A x calls
/// `quit`; anything else is handed over as it is.
pub(crate) fn input(quit: fn()) -> io::Result<(OwnedFd, Option<Raw>)> {
    use std::os::fd::AsFd;
    if !isatty(io::stdin()) {
        return Ok((io::stdin().as_fd().try_clone_to_owned()?, None));
    }
    let before = tcgetattr(io::stdin())?;
    let mut raw = before.clone();
    raw.make_raw();
    *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
    let guard = Raw(());
    tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
    let (reader, writer) = io::pipe()?;
    thread::Builder::new()
        .name("terminal".into())
        .spawn(move || pass_on(writer, quit))?;
    Ok((reader.into(), Some(guard)))
}

fn pass_on(mut guest: impl Write, quit: fn()) {
    let mut escaped = false;
    for byte in io::stdin().lock().bytes() {
        let Ok(byte) = byte else { return };
        match (escaped, byte) {
            (false, ESCAPE) => {
                escaped = true;
                continue;
            }
            (true, b'x') => quit(),
            (true, ESCAPE) | (false, _) => {
                if guest.write_all(&[byte]).is_err() {
                    return;
                }
            }
            (true, _) => {}
        }
        escaped = false;
    }
}
