//! A process of a container, the first one or an exec, and its streams.

use std::{
    fs::File,
    path::{Path, PathBuf},
    time::Instant,
};

use bulkhead_tests::Reader;
use containerd_shim_protos::{
    api::{CloseIORequest, DeleteResponse, Empty, StateRequest, StateResponse, Status},
    protobuf::EnumOrUnknown,
};

use crate::{
    output::{fifo, read_fifo, write_fifo},
    pod::Pod,
};

/// Which streams a process has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Streams {
    /// None.
    Nothing,
    /// stdout and stderr.
    Output,
    /// All.
    All,
}

/// The names of its streams.
#[derive(Default)]
pub(crate) struct Names {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// A process.
pub(crate) struct Process<'a> {
    pod: &'a Pod,
    /// Empty for the first one.
    pub(crate) id: String,
    pub(crate) names: Names,
    stdout: Option<Reader>,
    stderr: Option<Reader>,
}

impl<'a> Process<'a> {
    /// Makes the FIFOs of a process in this directory.
    pub(crate) fn new(pod: &'a Pod, id: &str, streams: Streams, dir: &Path) -> Process<'a> {
        let path = |stream: &str| dir.join(format!("{id}-{stream}"));
        let name = |path: &PathBuf| path.to_str().unwrap().to_owned();
        let mut process = Process {
            pod,
            id: id.into(),
            names: Names::default(),
            stdout: None,
            stderr: None,
        };
        if streams == Streams::All {
            let path = path("stdin");
            fifo(&path);
            process.names.stdin = name(&path);
        }
        if streams != Streams::Nothing {
            let (stdout, stderr) = (path("stdout"), path("stderr"));
            process.names.stdout = name(&stdout);
            process.names.stderr = name(&stderr);
            process.stdout = Some(read_fifo(&stdout));
            process.stderr = Some(read_fifo(&stderr));
        }
        process
    }

    /// Lets it run.
    pub(crate) fn start(&self) -> ttrpc::Result<()> {
        self.pod.task.start(&self.id).map(drop)
    }

    /// Waits for its end; answers the exit code.
    pub(crate) fn wait(&self) -> u32 {
        self.pod.task.wait(&self.id).unwrap().exit_status
    }

    /// Sends it SIGKILL.
    pub(crate) fn kill(&self) {
        self.pod.task.kill(&self.id, false).unwrap();
    }

    /// Deletes it.
    pub(crate) fn delete(&self) -> ttrpc::Result<DeleteResponse> {
        self.pod.task.delete(&self.id)
    }

    /// Its state.
    pub(crate) fn state(&self) -> EnumOrUnknown<Status> {
        self.told().status
    }

    /// Its pid.
    pub(crate) fn pid(&self) -> u32 {
        self.told().pid
    }

    fn told(&self) -> StateResponse {
        let request = StateRequest {
            id: self.pod.task.id.clone(),
            exec_id: self.id.clone(),
            ..StateRequest::default()
        };
        let answer = self.pod.task.call::<StateResponse>("State", &request);
        answer.unwrap()
    }

    /// Opens the FIFO of its standard input.
    pub(crate) fn stdin(&self) -> File {
        write_fifo(Path::new(&self.names.stdin))
    }

    /// Says that nothing more comes on its standard input.
    pub(crate) fn close_stdin(&self) {
        let request = CloseIORequest {
            id: self.pod.task.id.clone(),
            exec_id: self.id.clone(),
            stdin: true,
            ..CloseIORequest::default()
        };
        self.pod.task.call::<Empty>("CloseIO", &request).unwrap();
    }

    /// What comes on its standard output.
    pub(crate) fn stdout(&self) -> &Reader {
        self.stdout.as_ref().expect("it has one")
    }

    /// Waits until this text has come on its standard output.
    #[track_caller]
    pub(crate) fn says(&self, text: &str, end: Instant) {
        let said = self.stdout().wait_for(text, end);
        assert!(said, "{}", self.words());
    }

    /// Waits for the end of its standard output; answers all of it.
    #[track_caller]
    pub(crate) fn output(&self, end: Instant) -> Vec<u8> {
        let Some(output) = self.stdout().end(end) else {
            panic!("its output does not end: {} bytes", self.stdout().len());
        };
        output
    }

    /// What it said, for a message.
    pub(crate) fn words(&self) -> String {
        let text = |stream: &Option<Reader>| stream.as_ref().map(Reader::text);
        format!("{:?} {:?}", text(&self.stdout), text(&self.stderr))
    }
}
