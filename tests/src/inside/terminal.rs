//! A program on a pseudo-terminal, as a person would use it.

use std::{
    fs::File,
    io::Write,
    os::{fd::AsRawFd, unix::process::CommandExt},
    process::Child,
    thread,
    time::{Duration, Instant},
};

use nix::pty::{Winsize, openpty};

use super::{command::Command, reader::Reader};

const DEADLINE: Duration = Duration::from_secs(300);

/// The person's side of the terminal. The program is killed when it is dropped.
#[derive(Debug)]
pub struct Terminal {
    child: Child,
    master: File,
    reader: Reader,
    /// Output before this byte was already expected.
    seen: usize,
}

impl Terminal {
    /// Starts `command` on a new terminal of this size.
    #[must_use]
    pub fn open(columns: u16, rows: u16, command: &Command) -> Terminal {
        let pty = openpty(&winsize(columns, rows), None).expect("there are terminals");
        let side = || pty.slave.try_clone().expect("descriptors are left");
        let mut process = command.to_process();
        process.stdin(side()).stdout(side()).stderr(side());
        // SAFETY: the function makes two system calls and allocates nothing.
        unsafe { process.pre_exec(take_terminal) };
        let child = process.spawn().expect("the program starts");
        let master = File::from(pty.master);
        let reader = Reader::start(master.try_clone().expect("descriptors are left"));
        Terminal {
            child,
            master,
            reader,
            seen: 0,
        }
    }

    /// Types.
    pub fn send(&mut self, text: &str) {
        self.master
            .write_all(text.as_bytes())
            .expect("the terminal is open");
    }

    /// Waits until `text` comes after what was expected before.
    pub fn expect(&mut self, text: &str) {
        let seen = self.seen;
        let after = |bytes: &[u8]| {
            String::from_utf8_lossy(bytes.get(seen..).unwrap_or_default()).contains(text)
        };
        let found = self.reader.wait_until(Instant::now() + DEADLINE, after);
        assert!(
            found,
            "No {text:?} on the terminal: {:?}",
            self.reader.text()
        );
        self.seen = self.reader.len();
    }

    /// Gives the terminal another size.
    pub fn resize(&mut self, columns: u16, rows: u16) {
        let size = winsize(columns, rows);
        // SAFETY: the descriptor is a terminal and `size` outlives the call.
        let result =
            unsafe { libc::ioctl(self.master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
        assert_eq!(result, 0);
    }

    /// Exit code of the program.
    #[must_use]
    pub fn wait(mut self) -> i32 {
        let end = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = self.child.try_wait().expect("the child is ours") {
                return status.code().unwrap_or(-1);
            }
            assert!(
                Instant::now() < end,
                "The program does not end: {:?}",
                self.reader.text()
            );
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Both fail only if it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Makes standard input the controlling terminal of a new session.
fn take_terminal() -> std::io::Result<()> {
    nix::unistd::setsid()?;
    rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
    Ok(())
}

fn winsize(columns: u16, rows: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}
