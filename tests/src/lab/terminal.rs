//! The user's terminal while a job in the lab host has it.

use std::io::{IsTerminal, Stdin};

use anyhow::Result;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use super::protocol::Size;

/// A terminal that hands every key on unchanged, until this is dropped.
#[derive(Debug)]
pub(crate) struct Raw {
    stdin: Stdin,
    before: Termios,
}

impl Raw {
    /// Puts the terminal on standard input into raw mode.
    pub(crate) fn new() -> Result<Raw> {
        let stdin = std::io::stdin();
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Drain, &raw)?;
        Ok(Raw { stdin, before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // Nothing can be done if the terminal is gone.
        let _ = tcsetattr(&self.stdin, OptionalActions::Drain, &self.before);
    }
}

/// The size of the terminal on standard input; none if it is no terminal.
#[must_use]
pub(crate) fn size() -> Option<Size> {
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        return None;
    }
    let size = tcgetwinsize(&stdin).ok()?;
    Some(Size {
        rows: size.ws_row,
        cols: size.ws_col,
    })
}
