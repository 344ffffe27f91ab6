//! A program as a child: with what it is given and no more, born in its cgroup.
//!
//! `clone3` puts it there from its first moment: to move it later would wait for
//! every processor of the host. On hosts with cgroup v1 it moves itself, while it is
//! nothing but a copy of the thread that made it.

use std::{
    convert::Infallible,
    ffi::CString,
    io::{self, PipeReader, Read},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::{ffi::OsStrExt, process::ExitStatusExt},
    },
    path::Path,
    process::ExitStatus,
    sync::Mutex,
};

use rustix::{
    io::{Errno, fcntl_dupfd_cloexec},
    process::{
        Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitOptions, pidfd_open, waitid, waitpid,
    },
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

use crate::{
    carry::pointers,
    cgroup::Entrance,
    inherit,
    lock::lock,
    statedir::{ended, signal},
};

/// Flags of clone3(2) that do not fit the type that `libc` gives them.
const CLONE_CLEAR_SIGHAND: u64 = 1 << 32;
const CLONE_INTO_CGROUP: u64 = 1 << 33;
/// Descriptors of the child's last moments as a copy have this number at least: those
/// below are what its program gets.
const ASIDE: RawFd = 16;

/// What a child is started with.
#[derive(Debug)]
pub(crate) struct Program<'a> {
    /// The executable.
    pub(crate) path: &'a Path,
    /// Its arguments, beside its name.
    pub(crate) arguments: &'a [String],
    /// All of its environment, as `NAME=value`.
    pub(crate) environment: &'a [String],
    /// Its standard error; input and output lead nowhere.
    pub(crate) stderr: BorrowedFd<'a>,
    /// What else it inherits, under the same numbers.
    pub(crate) kept: &'a [RawFd],
    /// What else it inherits under another number, from 3 to 15.
    pub(crate) placed: &'a [(BorrowedFd<'a>, RawFd)],
    /// Where it lives.
    pub(crate) cgroup: Option<&'a Entrance>,
    /// The mount namespace that it is looked up and lives in; `None`: the caller's.
    pub(crate) mounts: Option<BorrowedFd<'a>>,
}

impl<'a> Program<'a> {
    /// A program that is given nothing but its standard error.
    pub(crate) fn new(path: &'a Path, stderr: BorrowedFd<'a>) -> Self {
        Program {
            path,
            arguments: &[],
            environment: &[],
            stderr,
            kept: &[],
            placed: &[],
            cgroup: None,
            mounts: None,
        }
    }
}

/// Why there is no child.
#[derive(Debug)]
pub(crate) enum Failure {
    /// No process could be made, or not where it was to live.
    Birth(io::Error),
    /// It could not become its program.
    Program(io::Error),
}

/// A child process. Dropping it ends and reaps it.
#[derive(Debug)]
pub(crate) struct Child {
    pid: Pid,
    pidfd: OwnedFd,
    reaped: bool,
}

impl Child {
    /// Starts it in a session of its own.
    pub(crate) fn start(program: &Program<'_>) -> Result<Child, Failure> {
        let text = |bytes: &[u8]| CString::new(bytes).map_err(|nul| Failure::Program(nul.into()));
        let path = text(program.path.as_os_str().as_bytes())?;
        let mut arguments = vec![path.clone()];
        for argument in program.arguments {
            arguments.push(text(argument.as_bytes())?);
        }
        let mut environment = Vec::new();
        for variable in program.environment {
            environment.push(text(variable.as_bytes())?);
        }
        let (argv, envp) = (pointers(&arguments), pointers(&environment));
        let null = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/null")
            .map_err(Failure::Birth)?;
        let mut kept = program.kept.to_vec();
        let mut placed = Vec::new();
        for (fd, number) in program.placed {
            placed.push((aside(*fd)?, *number));
            kept.push(*number);
        }
        let exec = || -> io::Result<Infallible> {
            rustix::stdio::dup2_stdin(&null)?;
            rustix::stdio::dup2_stdout(&null)?;
            rustix::stdio::dup2_stderr(program.stderr)?;
            if let Some(mounts) = program.mounts {
                move_into_link_name_space(mounts, Some(LinkNameSpaceType::Mount))?;
            }
            // What had these numbers is not needed any more.
            for (fd, number) in &placed {
                // SAFETY: whatever had this number in the child's table is replaced; no
                // value of this process that owns it is used here any more.
                if unsafe { libc::dup2(fd.as_raw_fd(), *number) } < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            inherit::keep(&kept)?;
            rustix::process::chdir(c"/")?;
            // SAFETY: `path` ends with NUL; both arrays end with a null pointer and
            // consist of pointers to strings that end with NUL, which live in
            // `arguments` and `environment`.
            unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
            Err(io::Error::last_os_error())
        };
        // SAFETY: `exec` makes only system calls on memory that is there: it neither
        // allocates nor locks nor panics.
        unsafe { Child::born(program.cgroup, exec) }
    }

    /// Makes a copy of the calling thread in a cgroup, which turns into something else
    /// by `become_it`. Waits until it has, or why it has not.
    ///
    /// # Safety
    /// In the child whatever other threads were about to do stays half done: locks that
    /// they hold (of the allocator, of the standard streams) are never released. So
    /// `become_it` must make system calls only, on memory that is there.
    pub(crate) unsafe fn born(
        cgroup: Option<&Entrance>,
        become_it: impl FnOnce() -> io::Result<Infallible>,
    ) -> Result<Child, Failure> {
        let (failure, end) = io::pipe().map_err(Failure::Birth)?;
        let failed = aside(end.as_fd())?;
        drop(end);
        // SAFETY: as the caller promises; what the child does here beside are system
        // calls, too.
        let side = unsafe { copy_of_this_thread(cgroup.and_then(Entrance::unified)) };
        let child = match side.map_err(Failure::Birth)? {
            Side::Parent(child) => child,
            Side::Child => {
                let number = |error: &io::Error| error.raw_os_error().unwrap_or(libc::EIO);
                let number = match cgroup.map_or(Ok(()), Entrance::enter) {
                    Err(error) => -number(&error),
                    Ok(()) => become_it().err().as_ref().map_or(libc::EIO, number),
                };
                // What nobody reads is seen by the status.
                let _ = rustix::io::write(&failed, &number.to_ne_bytes());
                // SAFETY: ends this process without running anything of it.
                unsafe { libc::_exit(127) }
            }
        };
        drop(failed);
        told(failure).map(|()| child)
    }

    /// A child that the program before this one has started in the same process, and not
    /// reaped: so its number is still its own.
    pub(crate) fn adopt(pid: i32) -> io::Result<Child> {
        let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidData)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        // Of a child only this can be asked, and it changes nothing.
        let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        waitid(WaitId::PidFd(pidfd.as_fd()), look)?;
        Ok(Child {
            pid,
            pidfd,
            reaped: false,
        })
    }

    /// Its number.
    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// A descriptor of the process.
    pub(crate) fn pidfd(&self) -> io::Result<OwnedFd> {
        self.pidfd.try_clone()
    }

    /// Sends it a signal; that it has ended is no error.
    pub(crate) fn signal(&self, number: Signal) -> io::Result<()> {
        signal(&self.pidfd, number)
    }

    /// Ends it, and reaps it if it is gone so soon; else whoever ends the next one does. The
    /// kernel cannot end what is frozen by cgroup v1; that one is left to whoever comes
    /// after this process.
    pub(crate) fn end(self, limit_ms: u32) {
        /// Those that took longer.
        static LATE: Mutex<Vec<Child>> = Mutex::new(Vec::new());
        lock(&LATE).retain(|late| !ended(&late.pidfd, 0));
        let _ = signal(&self.pidfd, Signal::KILL);
        if !ended(&self.pidfd, limit_ms) {
            lock(&LATE).push(self);
        }
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self) -> io::Result<ExitStatus> {
        loop {
            match waitpid(Some(self.pid), WaitOptions::empty()) {
                Ok(Some((_, status))) => {
                    self.reaped = true;
                    return Ok(ExitStatus::from_raw(status.as_raw()));
                }
                Ok(None) | Err(Errno::INTR) => {}
                Err(errno) => {
                    // Somebody else has reaped it: the number may be another's.
                    self.reaped = true;
                    return Err(errno.into());
                }
            }
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.reaped {
            // Both fail only if it has ended.
            let _ = signal(&self.pidfd, Signal::KILL);
            let _ = self.wait();
        }
    }
}

/// One more of a descriptor, away from the numbers of a program.
fn aside(fd: BorrowedFd<'_>) -> Result<OwnedFd, Failure> {
    fcntl_dupfd_cloexec(fd, ASIDE).map_err(|error| Failure::Birth(error.into()))
}

/// Why the child did not become its program; waits until it has or has not.
fn told(mut failure: PipeReader) -> Result<(), Failure> {
    let mut number = [0; 4];
    let number = match failure.read_exact(&mut number) {
        Ok(()) => i32::from_ne_bytes(number),
        // The pipe closed as the program began, or as the child was killed.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
        Err(error) => return Err(Failure::Birth(error)),
    };
    let error = io::Error::from_raw_os_error(number.saturating_abs());
    Err(match number {
        ..0 => Failure::Birth(error),
        _ => Failure::Program(error),
    })
}

/// On which side of a copy the caller finds itself.
enum Side {
    Parent(Child),
    Child,
}

/// Makes a process that is a copy of this one with the calling thread only, in the
/// given cgroup of v2. No handler of a signal runs in it.
///
/// # Safety
/// In the child whatever other threads were about to do stays half done: locks that
/// they hold (of the allocator, of the standard streams) are never released.
unsafe fn copy_of_this_thread(cgroup: Option<BorrowedFd<'_>>) -> io::Result<Side> {
    let mut pidfd: RawFd = -1;
    let arguments = libc::clone_args {
        flags: u64::from(libc::CLONE_PIDFD.cast_unsigned())
            | CLONE_CLEAR_SIGHAND
            | if cgroup.is_some() {
                CLONE_INTO_CGROUP
            } else {
                0
            },
        pidfd: (&raw mut pidfd).expose_provenance() as u64,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: u64::from(libc::SIGCHLD.unsigned_abs()),
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: cgroup.map_or(0, |cgroup| u64::from(cgroup.as_raw_fd().unsigned_abs())),
    };
    // SAFETY: without CLONE_VM the child has a copy of all memory, this stack
    // included, as after fork(2); the caller heeds what that means. The kernel reads
    // `arguments`, which has the given size, and writes to `pidfd`.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const arguments,
            size_of_val(&arguments),
        )
    };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Side::Child),
        pid => {
            // SAFETY: the call has just written it, and nobody else knows of it.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
            let pid = pid.ok_or_else(|| io::Error::other("a child without a number"))?;
            Ok(Side::Parent(Child {
                pid,
                pidfd,
                reaped: false,
            }))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::{cgroup::Cgroup, statedir::HostProcess};

    fn start(path: &str, arguments: &[&str], stderr: &impl AsFd) -> Result<Child, Failure> {
        let arguments: Vec<String> = arguments.iter().map(|&text| text.into()).collect();
        Child::start(&Program {
            arguments: &arguments,
            ..Program::new(Path::new(path), stderr.as_fd())
        })
    }

    #[test]
    fn a_child_has_its_program_and_what_it_is_given_and_no_more() {
        let (mut said, stderr) = io::pipe().unwrap();
        let script = "echo $0 $1 $(pwd) $(ls /proc/self/fd | tr '\\n' ' ') >&2; env >&2; \
            set -- $(cat /proc/$$/stat); test $6 = $$ || echo session >&2; exit 7";
        let mut child = start("/bin/sh", &["-c", script, "name", "one"], &stderr).unwrap();
        drop(stderr);
        let mut text = String::new();
        said.read_to_string(&mut text).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(7));
        let mut lines = text.lines();
        // The fourth descriptor is that of the directory which is listed.
        assert_eq!(lines.next(), Some("name one / 0 1 2 3"));
        for line in lines {
            // The shell's own.
            assert!(line.starts_with("PWD=") || line.starts_with("_="), "{text}");
        }
    }

    #[test]
    fn what_is_placed_has_its_number_whatever_had_it_before() {
        let ((mut said, end), (read, mut write)) = (io::pipe().unwrap(), io::pipe().unwrap());
        write.write_all(b"word\n").unwrap();
        let mut child = Child::start(&Program {
            arguments: &[
                "-c".to_owned(),
                "read w <&4; echo $w $A $(ls /proc/self/fd | tr '\\n' ' ') >&3".to_owned(),
            ],
            environment: &["A=a value".to_owned()],
            // Each in the place of the other, and one where the report of a failure was.
            placed: &[(end.as_fd(), 3), (read.as_fd(), 4), (read.as_fd(), 5)],
            ..Program::new(Path::new("/bin/sh"), io::stderr().as_fd())
        })
        .unwrap();
        drop(end);
        assert!(child.wait().unwrap().success());
        let mut text = String::new();
        said.read_to_string(&mut text).unwrap();
        assert_eq!(text, "word a value 0 1 2 3 4 5 6\n");
        assert!(matches!(
            Child::start(&Program {
                placed: &[(read.as_fd(), 3), (read.as_fd(), 4), (read.as_fd(), 5)],
                ..Program::new(Path::new("/no/such"), io::stderr().as_fd())
            }),
            Err(Failure::Program(_))
        ));
    }

    #[test]
    fn a_program_that_cannot_be_started_is_an_error() {
        let stderr = io::stderr();
        for (path, errno) in [("/no/such", libc::ENOENT), ("/etc/passwd", libc::EACCES)] {
            let Err(Failure::Program(error)) = start(path, &[], &stderr) else {
                panic!("{path}");
            };
            assert_eq!(error.raw_os_error(), Some(errno), "{path}");
        }
        assert!(start("/a\0b", &[], &stderr).is_err());
    }

    #[test]
    fn a_child_begins_its_life_in_its_cgroup() {
        let name = format!("/bulkhead-test-{}-born", std::process::id());
        let state = tempfile::tempdir().unwrap();
        let place = crate::cgroup::Place::new(&name).unwrap().unwrap();
        let Ok(Some(cgroup)) = Cgroup::make(&place, 5, state.path()) else {
            println!("skipped: no cgroups can be made here");
            return;
        };
        let (mut said, stderr) = io::pipe().unwrap();
        let mut child = Child::start(&Program {
            // Nothing but the shell's own.
            arguments: &[
                "-c".to_owned(),
                "while read l; do echo $l; done < /proc/self/cgroup >&2".to_owned(),
            ],
            cgroup: Some(cgroup.entrance()),
            ..Program::new(Path::new("/bin/sh"), stderr.as_fd())
        })
        .unwrap();
        drop(stderr);
        let mut text = String::new();
        said.read_to_string(&mut text).unwrap();
        assert!(child.wait().unwrap().success());
        let inside = text.lines().filter(|line| line.ends_with(&name)).count();
        let hierarchies = std::fs::read_to_string(state.path().join(crate::cgroup::RECORD));
        assert_eq!(
            inside,
            hierarchies.unwrap().matches(&name).count(),
            "{text}"
        );
        drop(cgroup);
    }

    #[test]
    fn a_cgroup_that_is_gone_is_no_place_to_be_born_f14() {
        let name = format!("/bulkhead-test-{}-gone", std::process::id());
        let state = tempfile::tempdir().unwrap();
        let place = crate::cgroup::Place::new(&name).unwrap().unwrap();
        let Ok(Some(cgroup)) = Cgroup::make(&place, 5, state.path()) else {
            println!("skipped: no cgroups can be made here");
            return;
        };
        std::fs::remove_dir(cgroup.path()).unwrap();
        let failure = Child::start(&Program {
            cgroup: Some(cgroup.entrance()),
            ..Program::new(Path::new("/bin/true"), io::stderr().as_fd())
        });
        assert!(matches!(failure, Err(Failure::Birth(_))), "{failure:?}");
    }

    #[test]
    fn only_a_child_that_was_not_reaped_is_adopted() {
        let child = start("/bin/sleep", &["1000"], &io::stderr()).unwrap();
        let pid = child.pid();
        std::mem::forget(child);
        let adopted = Child::adopt(pid).unwrap();
        assert_eq!(adopted.pid(), pid);
        drop(adopted);
        assert!(Child::adopt(pid).is_err());
        // It lives, and is nobody's child of ours.
        assert_eq!(
            Child::adopt(1).unwrap_err().raw_os_error(),
            Some(libc::ECHILD)
        );
    }

    #[test]
    fn a_child_that_ends_late_is_reaped_with_the_next_lc_42() {
        let sleeps = || start("/bin/sleep", &["1000"], &io::stderr()).unwrap();
        let child = sleeps();
        let (pid, pidfd) = (child.pid(), child.pidfd().unwrap());
        child.end(0);
        assert!(ended(&pidfd, 5_000));
        sleeps().end(5_000);
        assert!(HostProcess::of(pid).is_err());
    }

    #[test]
    fn a_dropped_child_is_ended_and_reaped() {
        let child = start("/bin/sleep", &["1000"], &io::stderr()).unwrap();
        let (pid, pidfd) = (child.pid(), child.pidfd().unwrap());
        drop(child);
        assert!(ended(&pidfd, 0));
        assert!(HostProcess::of(pid).is_err());
    }
}
