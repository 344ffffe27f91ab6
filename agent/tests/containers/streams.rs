//! Standard streams, from end to end.

use std::time::Instant;

use bulkhead_agent_api::agent::Stdio;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{Host, block_on, busybox_spec, output};

#[test]
fn sixty_four_mebibytes_pass_both_ways_unharmed() {
    const LENGTH: usize = 64 << 20;
    block_on(async |host: &mut Host| {
        let mut data = vec![0; LENGTH];
        let mut state = 1u64;
        for byte in data.chunks_mut(8) {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            byte.copy_from_slice(&state.to_le_bytes());
        }
        let (stdio, [mut stdin, mut stdout, _stderr]) = host.pipes().await;
        let id = host.create(busybox_spec(["cat"]), stdio).await.unwrap();
        host.start_container(&id).await.unwrap();
        let begin = Instant::now();
        let send = async {
            stdin.write_all(&data).await.unwrap();
            stdin.shutdown().await.unwrap();
        };
        let mut back = Vec::with_capacity(LENGTH);
        let (exit, (), read) =
            tokio::join!(host.wait(&id, ""), send, stdout.read_to_end(&mut back));
        read.unwrap();
        eprintln!("64 MiB in and out: {:?}", begin.elapsed());
        assert_eq!(exit.unwrap().exit_status, 0);
        assert!(back == data);
        host.delete(&id, "").await.unwrap();
    });
}

#[test]
fn a_background_child_does_not_hold_up_the_wait_b73() {
    block_on(async |host: &mut Host| {
        let id = host
            .create(busybox_spec(["sleep", "100"]), Stdio::default())
            .await
            .unwrap();
        host.start_container(&id).await.unwrap();
        let process = busybox_spec(["sh", "-c", "sleep 50 & echo done"])["process"].clone();
        let (stdio, [_stdin, mut stdout, _stderr]) = host.pipes().await;
        host.exec(&id, "e", &process, stdio).await.unwrap();
        let begin = Instant::now();
        assert_eq!(host.wait(&id, "e").await.unwrap().exit_status, 0);
        let waited = begin.elapsed().as_millis();
        assert!((1_500..3_500).contains(&waited), "{waited} ms");
        let mut said = [0; 5];
        stdout.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"done\n");
        host.kill_all(&id, 9).await.unwrap();
        host.wait(&id, "").await.unwrap();
        host.delete(&id, "").await.unwrap();
    });
}

#[test]
fn a_reader_that_goes_away_does_not_end_the_process_f60() {
    block_on(async |host: &mut Host| {
        let (stdio, [stdin, mut stdout, _stderr]) = host.pipes().await;
        let script = "seq 1000000; cat >/dev/null; exit 7";
        let id = host
            .create(busybox_spec(["sh", "-c", script]), stdio)
            .await
            .unwrap();
        host.start_container(&id).await.unwrap();
        stdout.read_exact(&mut [0; 10]).await.unwrap();
        drop(stdout);
        drop(stdin);
        assert_eq!(host.wait(&id, "").await.unwrap().exit_status, 7);
        host.delete(&id, "").await.unwrap();
    });
}

#[test]
fn a_writer_finds_its_pipe_closed_if_that_is_wanted_io_20() {
    block_on(async |host: &mut Host| {
        let (mut stdio, [_stdin, mut stdout, _stderr]) = host.pipes().await;
        stdio.breaks = true;
        let id = host.create(busybox_spec(["yes"]), stdio).await.unwrap();
        host.start_container(&id).await.unwrap();
        stdout.read_exact(&mut [0; 10]).await.unwrap();
        drop(stdout);
        let exit = host.wait(&id, "").await.unwrap().exit_status;
        // SIGPIPE, or what busybox makes of it for the first process of a container.
        assert!(exit == 128 + 13 || exit == 1, "{exit}");
        host.delete(&id, "").await.unwrap();
    });
}

#[test]
fn closing_the_input_ends_it_io_17() {
    block_on(async |host: &mut Host| {
        let (stdio, [mut stdin, mut stdout, _stderr]) = host.pipes().await;
        let id = host.create(busybox_spec(["cat"]), stdio).await.unwrap();
        host.start_container(&id).await.unwrap();
        stdin.write_all(b"last words").await.unwrap();
        host.close_stdin(&id).await;
        let mut out = String::new();
        stdout.read_to_string(&mut out).await.unwrap();
        assert_eq!(out, "last words");
        assert_eq!(host.wait(&id, "").await.unwrap().exit_status, 0);
        host.delete(&id, "").await.unwrap();
    });
}

#[test]
fn a_terminal_is_the_console_and_can_be_resized_ta_54() {
    block_on(async |host: &mut Host| {
        let script = "tty; stty size; ls -l /dev/console | tr -s ' ' | grep -c '136,'; \
            read line; stty size; echo got $line";
        let (stdio, [mut stdin, mut stdout]) = host.terminal(91, 33).await;
        let id = host
            .create(busybox_spec(["sh", "-c", script]), stdio)
            .await
            .unwrap();
        host.start_container(&id).await.unwrap();
        let mut seen = String::new();
        while !seen.contains("\r\n1\r\n") {
            let mut bytes = [0; 256];
            let length = stdout.read(&mut bytes).await.unwrap();
            seen.push_str(std::str::from_utf8(&bytes[..length]).unwrap());
        }
        host.resize(&id, 120, 50).await.unwrap();
        stdin.write_all(b"it\n").await.unwrap();
        stdout.read_to_string(&mut seen).await.unwrap();
        let expected = "/dev/pts/0\r\n33 91\r\n1\r\nit\r\n50 120\r\ngot it\r\n";
        assert_eq!(seen, expected);
        assert_eq!(host.wait(&id, "").await.unwrap().exit_status, 0);
        host.delete(&id, "").await.unwrap();

        // A further process gets a terminal of its own.
        let id = host
            .create(busybox_spec(["sleep", "100"]), Stdio::default())
            .await
            .unwrap();
        host.start_container(&id).await.unwrap();
        let (stdio, [_stdin, mut stdout]) = host.terminal(0, 0).await;
        host.exec(&id, "e", &busybox_spec(["tty"])["process"], stdio)
            .await
            .unwrap();
        let mut seen = String::new();
        stdout.read_to_string(&mut seen).await.unwrap();
        assert_eq!(seen, "/dev/pts/0\r\n");
        host.kill(&id, "", 9).await.unwrap();
        host.wait(&id, "").await.unwrap();
        host.delete(&id, "").await.unwrap();
    });
}

#[test]
fn a_program_can_open_its_streams_by_name() {
    block_on(async |host: &mut Host| {
        let script = "echo a > /dev/stdout; echo b > /proc/self/fd/1";
        let seen = output(host, script, |spec| {
            spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        })
        .await;
        assert_eq!(seen, "a\nb\n");
    });
}
