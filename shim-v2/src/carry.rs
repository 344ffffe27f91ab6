//! What a shim hands over to the program that takes its place.
//!
//! The daemon can execute its own file anew, which may be a newer one by now
//! ([`upgrade`](crate::upgrade)). The process stays the same: its number, its mount
//! namespace, its children and what it was given to hold. Everything else goes along as
//! one text in a memory file, which names descriptors by their numbers.
//!
//! Between two programs [`FORMAT`] must be the same, and the protocol with agents that
//! run already. `-carries` prints both, and is asked before anything is begun; then it is
//! given what the other program would get, and must have understood it.

use std::{
    ffi::{CString, OsString},
    fs::File,
    io::{self, Seek, Write},
    os::{
        fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::Path,
    ptr,
};

use bulkhead_agent_api::PROTOCOL;
use libc::c_char;
use nix::sys::signal::{SigSet, Signal};
use rustix::{
    fs::{MemfdFlags, memfd_create},
    io::{FdFlags, fcntl_setfd},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Counts up whenever a newer program cannot read what an older one hands over.
const FORMAT: u32 = 3;

/// Environment variable with the number of the memory file.
pub(crate) const CARRIED_FD: &str = "BULKHEAD_CARRIED_FD";

/// What `-carries` says: who says the same may take over.
#[must_use]
pub(crate) fn version() -> String {
    format!("bulkhead-shim carries {FORMAT} agents {PROTOCOL}\n")
}

/// The same, of a program that understands this text if there is any: what it would get.
pub(crate) fn understood<T: DeserializeOwned>(text: &[u8]) -> io::Result<String> {
    if !text.is_empty() {
        serde_json::from_slice::<T>(text)?;
    }
    Ok(version())
}

/// A file in memory with the text of what goes along.
pub(crate) fn shown(carried: &impl Serialize) -> io::Result<File> {
    let mut file = File::from(memfd_create("carried", MemfdFlags::CLOEXEC)?);
    file.write_all(&serde_json::to_vec(carried)?)?;
    file.rewind()?;
    Ok(file)
}

/// Duplicates of descriptors that outlive an execution. Dropping it closes them.
#[derive(Debug, Default)]
pub struct Bag(Vec<OwnedFd>);

/// A descriptor in a [`Bag`].
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct CarriedFd(RawFd);

impl Bag {
    /// Takes one more along.
    pub(crate) fn put(&mut self, fd: impl AsFd) -> io::Result<CarriedFd> {
        use std::os::fd::AsRawFd;
        // Without the flag by which an execution closes it.
        let fd = rustix::io::dup(fd)?;
        let number = CarriedFd(fd.as_raw_fd());
        self.0.push(fd);
        Ok(number)
    }
}

impl CarriedFd {
    /// Takes it out, on the other side.
    pub(crate) fn take(self) -> io::Result<OwnedFd> {
        if self.0 <= 2 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        // SAFETY: the number is only used while this function runs, and a wrong one
        // fails here.
        let fd = unsafe { BorrowedFd::borrow_raw(self.0) };
        fcntl_setfd(fd, FdFlags::CLOEXEC)?;
        // SAFETY: it is open. It was put into the bag for this one value, which is gone
        // now, and nothing else in this process knows of it.
        Ok(unsafe { OwnedFd::from_raw_fd(self.0) })
    }
}

/// Bytes of whatever kind.
pub(crate) type Bytes = Vec<u8>;

/// Signals that must wait until the next program listens to them.
fn signals() -> SigSet {
    let mut signals = SigSet::empty();
    for signal in [
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
    ] {
        signals.add(signal);
    }
    signals
}

/// Lets signals come again that waited for this program.
pub(crate) fn listens() -> io::Result<()> {
    Ok(signals().thread_unblock()?)
}

/// Becomes the program `path` with the arguments of this one, and hands `carried` over.
/// Returns only if that fails, and then nothing has changed.
pub(crate) fn execute(path: &Path, carried: &impl Serialize, mut bag: Bag) -> io::Error {
    let mut prepared = || -> io::Result<_> {
        let file = shown(carried)?;
        let number = bag.put(&file)?.0;
        let text = |text: OsString| CString::new(text.into_vec()).map_err(io::Error::from);
        let path = CString::new(path.as_os_str().as_bytes())?;
        let arguments: io::Result<Vec<_>> = std::env::args_os().map(text).collect();
        let others = std::env::vars_os().filter(|(name, _)| name != CARRIED_FD);
        let ours = (CARRIED_FD.into(), number.to_string().into());
        let environment: io::Result<Vec<_>> = others
            .chain([ours])
            .map(|(mut variable, value)| {
                variable.push("=");
                variable.push(value);
                text(variable)
            })
            .collect();
        Ok((path, arguments?, environment?))
    };
    let (path, arguments, environment) = match prepared() {
        Ok(prepared) => prepared,
        Err(error) => return error,
    };
    let (argv, envp) = (pointers(&arguments), pointers(&environment));
    if let Err(error) = signals().thread_block() {
        return error.into();
    }
    // SAFETY: `path` ends with NUL; both arrays end with a null pointer and consist of
    // pointers to strings that end with NUL and live as long.
    unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
    let error = io::Error::last_os_error();
    let _ = listens();
    error
}

/// An array as execve(2) takes it, valid as long as `texts`.
pub(crate) fn pointers(texts: &[CString]) -> Vec<*const c_char> {
    let pointers = texts.iter().map(|text| text.as_ptr());
    pointers.chain([ptr::null()]).collect()
}

/// What the program before this one has handed over; `None` if there was none.
pub(crate) fn received<T: DeserializeOwned>() -> io::Result<Option<T>> {
    let Ok(number) = std::env::var(CARRIED_FD) else {
        return Ok(None);
    };
    let number = number.parse().map_err(io::Error::other)?;
    let file = File::from(CarriedFd(number).take()?);
    let carried = serde_json::from_reader(io::BufReader::new(file));
    Ok(Some(carried?))
}

#[cfg(test)]
mod tests {
    use std::{io::Read, os::fd::AsRawFd};

    use super::*;

    #[test]
    fn a_descriptor_is_taken_out_as_what_was_put_in() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut bag = Bag::default();
        let number = bag.put(&writer).unwrap();
        drop(writer);
        let text = serde_json::to_string(&number).unwrap();
        // As the execution would have it: nobody closes them any more.
        std::mem::forget(bag);
        let number: CarriedFd = serde_json::from_str(&text).unwrap();
        let taken = number.take().unwrap();
        let flags = rustix::io::fcntl_getfd(&taken).unwrap();
        assert!(flags.contains(FdFlags::CLOEXEC));
        File::from(taken).write_all(b"word").unwrap();
        let mut said = String::new();
        reader.read_to_string(&mut said).unwrap();
        assert_eq!(said, "word");
    }

    #[test]
    fn who_does_not_understand_what_it_would_get_does_not_say_so() {
        assert_eq!(understood::<CarriedFd>(b"").unwrap(), version());
        assert_eq!(understood::<CarriedFd>(b"7").unwrap(), version());
        assert!(understood::<CarriedFd>(b"{\"other\": 7}").is_err());
        let mut text = String::new();
        let mut file = shown(&CarriedFd(7)).unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "7");
    }

    #[test]
    fn a_number_that_is_no_descriptor_is_an_error() {
        for number in [-1, 0, 2, 1_000_000] {
            assert!(CarriedFd(number).take().is_err(), "{number}");
        }
    }

    #[test]
    fn what_cannot_be_executed_leaves_everything_as_it_was() {
        let mut bag = Bag::default();
        let (reader, _writer) = io::pipe().unwrap();
        assert_ne!(bag.put(&reader).unwrap().0, reader.as_raw_fd());
        let error = execute(Path::new("/no/such"), &"carried", bag);
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
        assert!(!SigSet::thread_get_mask().unwrap().contains(Signal::SIGHUP));
    }
}
