//! QEMU's monitor, as far as saving a machine needs it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// How long QEMU may take for one answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// How often a running save is asked for its state.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// A connection that may give commands.
#[derive(Debug)]
pub(crate) struct Monitor {
    stream: BufReader<UnixStream>,
}

impl Monitor {
    /// Takes over the connection to QEMU.
    pub(crate) fn new(stream: UnixStream) -> Result<Monitor> {
        stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        let mut monitor = Monitor {
            stream: BufReader::new(stream),
        };
        monitor.line()?;
        monitor.execute("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    /// Saves the machine's state in the file `name` of QEMU's directory. The
    /// machine goes on up to the last moment, so that it does so when restored.
    pub(crate) fn save(&mut self, name: &str) -> Result<()> {
        self.execute(
            "migrate-set-parameters",
            &json!({ "max-bandwidth": 4_u64 << 30 }),
        )?;
        self.execute("migrate", &json!({ "uri": format!("exec:cat > {name}") }))?;
        loop {
            let state = self.execute("query-migrate", &json!({}))?;
            match state["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => bail!("QEMU cannot save the machine: {state}"),
                _ => std::thread::sleep(POLL_INTERVAL),
            }
        }
    }

    /// Ends QEMU, with everything written to its disks.
    pub(crate) fn quit(&mut self) -> Result<()> {
        self.execute("quit", &json!({})).map(drop)
    }

    fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.stream.get_mut(), "{request}").context("QEMU does not listen")?;
        loop {
            let mut answer = self.line()?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU refuses {command}: {error}");
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            // Everything else is an event.
        }
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        let n = self
            .stream
            .read_line(&mut line)
            .context("QEMU does not answer")?;
        if n == 0 {
            bail!("QEMU ended");
        }
        Ok(serde_json::from_str(&line)?)
    }
}
