//! Output into programs.

use std::{fs, os::unix::fs::PermissionsExt, time::Instant};

use tokio::time::sleep;

use super::*;

impl Guest {
    /// Writes a shell script; answers the name that makes it a logger.
    fn script(&self, scheme: &str, text: &str) -> String {
        let path = self.dir.path().join("logger.sh");
        fs::write(&path, format!("#!/bin/sh\n{text}")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        format!(
            "{scheme}://{}?dir={}",
            path.display(),
            self.dir.path().display()
        )
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.dir.path().join(name)).unwrap_or_default()
    }

    async fn refused(&self, name: String) -> Error {
        let stdio = Stdio {
            stdout: name,
            ..Stdio::default()
        };
        self.open(&stdio).await.unwrap_err()
    }
}

/// Both outputs into one program.
fn both(name: &str) -> Stdio {
    Stdio {
        stdout: name.to_owned(),
        stderr: name.to_owned(),
        ..Stdio::default()
    }
}

#[tokio::test]
async fn a_logging_program_gets_both_outputs_and_is_told_whose_they_are_io_18() {
    let guest = Guest::new();
    let name = guest.script(
        "binary",
        "echo $# $1 >$2/who; env | grep -v ^PWD= | sort >>$2/who
         ls /proc/self/fd | tr '\\n' ' ' >>$2/who; pwd >>$2/who
         exec 5>&-
         cat <&3 >$2/out & cat <&4 >$2/err & wait; echo done >$2/end",
    );
    let accept = async { (guest.accept().await, guest.accept().await) };
    let stdio = both(&name);
    let (opened, ((_, mut out), (_, mut err))) = tokio::join!(guest.open(&stdio), accept);
    let (streams, told, _room) = opened.unwrap();
    assert!(told.breaks);
    let flood = vec![b'x'; 1 << 20];
    let (one, two) = tokio::join!(out.write_all(&flood), err.write_all(b"message"));
    one.unwrap();
    two.unwrap();
    drop((out, err));
    streams.drained(Duration::from_secs(10)).await;
    streams.close(Patience::ORDERLY).await;
    assert_eq!(guest.read("out").len(), flood.len());
    assert_eq!(guest.read("err"), "message");
    assert_eq!(guest.read("end"), "done\n");
    let who = guest.read("who");
    let who: Vec<&str> = who.lines().collect();
    let words = ["2 dir", "CONTAINER_ID=id", "CONTAINER_NAMESPACE=space"];
    assert_eq!(who[..3], words);
    // The last descriptor is that of the directory which is listed.
    assert_eq!(who.last(), Some(&"0 1 2 3 4 5 6 /"));
}

#[tokio::test]
async fn a_logging_program_must_say_in_time_that_it_is_ready_io_18() {
    let guest = Guest::new();
    let silent = guest.script("binary-v2", "exec 5>&-; cat <&3");
    let error = guest.refused(silent).await.text();
    assert!(
        error.contains("logger.sh") && error.contains("descriptor 5"),
        "{error}"
    );
    for scheme in ["binary", "binary-v2"] {
        let stdio = Stdio {
            stdout: guest.script(scheme, "echo >&5; cat <&3 >$2/out"),
            ..Stdio::default()
        };
        let (opened, (_, mut out)) = tokio::join!(guest.open(&stdio), guest.accept());
        let (streams, ..) = opened.unwrap();
        out.write_all(b"text").await.unwrap();
        drop(out);
        streams.drained(Duration::from_secs(10)).await;
        streams.close(Patience::ORDERLY).await;
        assert_eq!(guest.read("out"), "text");
    }
}

#[tokio::test(start_paused = true)]
async fn a_logging_program_that_is_never_ready_is_ended_io_18() {
    let guest = Guest::new();
    let error = guest.refused(guest.script("binary", "echo $$ >$2/pid; exec sleep 1000"));
    let error = error.await.text();
    assert!(error.contains("within 30 s"), "{error}");
    let pid = guest.read("pid");
    // The clock runs ahead of the program if it has not come that far.
    if !pid.is_empty() {
        assert!(!Path::new("/proc").join(pid.trim()).exists());
    }
}

#[tokio::test]
async fn a_logging_program_that_cannot_be_started_is_named() {
    let guest = Guest::new();
    let error = guest
        .refused("binary:///no/such/logger".to_owned())
        .await
        .text();
    assert!(
        error.contains("/no/such/logger") && error.contains("No such file"),
        "{error}"
    );
}

#[tokio::test]
async fn a_logging_program_that_does_not_end_is_asked_and_then_killed_io_18() {
    let guest = Guest::new();
    for (script, asked) in [
        ("trap 'echo asked >$2/asked; exit' TERM", "asked\n"),
        ("trap '' TERM", ""),
    ] {
        let name = guest.script(
            "binary",
            &format!(
                "{script}; rm -f $2/asked; echo $$ >$2/pid; echo >&5; while :; do sleep 0.05; done"
            ),
        );
        let stdio = both(&name);
        let accept = async { (guest.accept().await, guest.accept().await) };
        let (opened, streams) = tokio::join!(guest.open(&stdio), accept);
        drop(streams);
        let pid = guest.read("pid");
        assert!(Path::new("/proc").join(pid.trim()).exists());
        let begun = Instant::now();
        opened.unwrap().0.close(Patience::SHORT).await;
        assert!(begun.elapsed() < Duration::from_secs(10));
        assert_eq!(guest.read("asked"), asked);
        assert!(!Path::new("/proc").join(pid.trim()).exists());
    }
}

#[tokio::test]
async fn the_guest_learns_that_its_logging_program_died_io_20() {
    let guest = Guest::new();
    let stdio = Stdio {
        stdout: guest.script("binary", "echo >&5; exit 3"),
        ..Stdio::default()
    };
    let (opened, (_, mut out)) = tokio::join!(guest.open(&stdio), guest.accept());
    let (streams, ..) = opened.unwrap();
    let written = async {
        while out.write_all(&[b'x'; 4096]).await.is_ok() {
            sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(Duration::from_secs(20), written)
        .await
        .expect("nobody tells the guest");
    streams.drained(Duration::from_secs(10)).await;
    streams.close(Patience::SHORT).await;
}
