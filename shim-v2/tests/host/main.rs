//! The shim's binary as containerd calls it, on a host without a guest.
//!
//! Needs root. Each test runs in a mount namespace of its own with an empty
//! `/run`, so that it finds and leaves nothing.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod leftovers;
mod options;
mod support;

use std::{
    fs,
    io::Write,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use containerd_shim_protos::{
    api::{
        ConnectRequest, CreateTaskRequest, DeleteRequest, DeleteResponse, KillRequest,
        StateRequest, StatsRequest,
    },
    bootstrap_api::{BootstrapParams, BootstrapResult},
    protobuf::Message,
    shim_async::{Client, TaskClient},
    types::introspection::RuntimeInfo,
};
use serde_json::json;
use ttrpc::Code;

use self::support::*;

#[test]
fn start_connect_shutdown_leave_nothing_lc_28() {
    Host::with(async |host: &Host| {
        let bundle = host.bundle("c1");
        let address = host.start(&bundle, "c1");
        assert!(
            address.starts_with("unix:///run/containerd/s/"),
            "{address}"
        );
        assert_eq!(fs::read_to_string(bundle.join("address")).unwrap(), address);
        // The second start finds the same shim.
        assert_eq!(host.start(&bundle, "c1"), address);
        let task = connect(&address).await;
        let request = ConnectRequest {
            id: "c1".into(),
            ..ConnectRequest::default()
        };
        let response = task.connect(context(), &request).await.unwrap();
        assert!(Path::new(&format!("/proc/{}", response.shim_pid)).exists());
        assert_eq!(response.task_pid, 0);
        let socket = PathBuf::from(address.trim_start_matches("unix://"));
        shutdown(&task, "c1").await;
        assert!(!socket.exists(), "the socket is gone before the answer");
        assert!(!Path::new("/run/bulkhead/default/c1").exists());
    });
}

#[test]
fn the_daemon_inherits_nothing_lc_22() {
    Host::with(async |host: &Host| {
        let bundle = host.bundle("c1");
        // Held by whoever starts the shim, and not marked as its own.
        let flags = rustix::fs::OFlags::RDONLY;
        let spec = bundle.join("config.json");
        let stray = rustix::fs::open(&spec, flags, rustix::fs::Mode::empty()).unwrap();
        let address = host.start(&bundle, "c1");
        drop(stray);
        let task = connect(&address).await;
        let request = ConnectRequest::default();
        let pid = task.connect(context(), &request).await.unwrap().shim_pid;
        let environ = fs::read(format!("/proc/{pid}/environ")).unwrap();
        let environ = String::from_utf8_lossy(&environ).into_owned();
        assert!(!environ.contains("hostile"), "{environ}");
        for fd in 0..=2 {
            let link = fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap();
            assert_eq!(link, Path::new("/dev/null"), "fd {fd}");
        }
        // The last is the mount namespace in which it starts programs for callers.
        let own = ["socket:", "anon_inode:", "/dev/null", "mnt:"];
        for entry in entries(&PathBuf::from(format!("/proc/{pid}/fd"))) {
            let link = fs::read_link(&entry).unwrap().display().to_string();
            assert!(own.iter().any(|own| link.starts_with(own)), "{link}");
        }
        // A session of its own, away from whoever started it.
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let session = stat
            .rsplit_once(')')
            .unwrap()
            .1
            .split_whitespace()
            .nth(3)
            .unwrap();
        assert_eq!(session, pid.to_string());
        // Its mounts are its own.
        let own = fs::read_link("/proc/thread-self/ns/mnt").unwrap();
        assert_ne!(fs::read_link(format!("/proc/{pid}/ns/mnt")).unwrap(), own);
        shutdown(&task, "c1").await;
    });
}

#[test]
fn bootstrap_parameters_get_a_bootstrap_result_lc_24() {
    Host::with(async |host: &Host| {
        let bundle = host.bundle("c1");
        let params = BootstrapParams {
            instance_id: "c1".into(),
            namespace: "default".into(),
            socket_dir: Some("/run/other".into()),
            ..BootstrapParams::default()
        };
        let mut child = host
            .command(&bundle, "c1", "start")
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        child
            .stdin
            .take()
            .unwrap()
            .write_all(&params.write_to_bytes().unwrap())
            .unwrap();
        let output = child.wait_with_output().unwrap();
        let result = BootstrapResult::parse_from_bytes(&output.stdout).unwrap();
        assert_eq!((result.version, result.protocol.as_str()), (3, "ttrpc"));
        assert!(
            result.address.starts_with("unix:///run/other/"),
            "{}",
            result.address
        );
        let task = connect(&result.address).await;
        // delete finds the socket by the state alone.
        host.run(&bundle, "c1", "delete");
        assert!(entries(Path::new("/run/other")).is_empty());
        drop(task);
    });
}

#[test]
fn delete_after_the_death_of_the_shim_leaves_nothing_f1() {
    Host::with(async |host: &Host| {
        let bundle = host.bundle("c1");
        let address = host.start(&bundle, "c1");
        let task = connect(&address).await;
        let pid = task
            .connect(context(), &ConnectRequest::default())
            .await
            .unwrap()
            .shim_pid;
        let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        for _ in 0..2 {
            let begun = Instant::now();
            let output = host.run(&bundle, "c1", "delete");
            assert!(begun.elapsed() < Duration::from_secs(2));
            assert!(
                output.status.success() && output.stderr.is_empty(),
                "{output:?}"
            );
            let response = DeleteResponse::parse_from_bytes(&output.stdout).unwrap();
            assert_eq!(response.exit_status, 137);
            assert!(response.exited_at.seconds > 0);
        }
        assert!(UnixStream::connect(address.trim_start_matches("unix://")).is_err());
    });
}

#[test]
fn delete_ends_a_shim_that_lives_lc_49() {
    Host::with(async |host: &Host| {
        let bundle = host.bundle("c1");
        host.start(&bundle, "c1");
        let begun = Instant::now();
        let output = host.run(&bundle, "c1", "delete");
        assert!(output.status.success(), "{output:?}");
        assert!(begun.elapsed() < Duration::from_secs(2));
    });
}

#[test]
fn delete_of_what_never_was_succeeds_lc_49() {
    Host::with(async |host: &Host| {
        let output = host.run(host.dir.path(), "never", "delete");
        assert!(
            output.status.success() && output.stderr.is_empty(),
            "{output:?}"
        );
    });
}

#[test]
fn a_stale_socket_is_replaced_at_the_next_start_f3() {
    Host::with(async |host: &Host| {
        let bundle = host.bundle("c1");
        let address = host.start(&bundle, "c1");
        murder(&connect(&address).await).await;
        assert_eq!(host.start(&bundle, "c1"), address);
        let task = connect(&address).await;
        shutdown(&task, "c1").await;
    });
}

#[test]
fn two_starts_at_once_make_one_shim_lc_32() {
    Host::with(async |host: &Host| {
        let bundle = host.bundle("c1");
        let children: Vec<_> = (0..4)
            .map(|_| host.command(&bundle, "c1", "start").spawn().unwrap())
            .collect();
        let mut addresses = Vec::new();
        for child in children {
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success(), "{output:?}");
            addresses.push(String::from_utf8(output.stdout).unwrap());
        }
        addresses.dedup();
        assert_eq!(addresses.len(), 1);
        let task = connect(&addresses[0]).await;
        shutdown(&task, "c1").await;
    });
}

#[test]
fn a_member_without_its_sandbox_is_refused_lc_37() {
    Host::with(async |host: &Host| {
        let bundle = host.bundle("c1");
        let mut spec = spec();
        spec["annotations"] = json!({
            "io.kubernetes.cri.sandbox-id": "pod",
            "io.kubernetes.cri.container-type": "container",
        });
        host.write_spec(&bundle, &spec);
        let output = host.run(&bundle, "c1", "start");
        assert!(!output.status.success() && output.stdout.is_empty());
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(
            text.contains("\"pod\"") && text.lines().count() == 1,
            "{text}"
        );
    });
}

#[test]
fn bad_ids_are_refused_at_start_b18_lc_23() {
    Host::with(async |host: &Host| {
        for id in ["../../x", "a b", &"x".repeat(5000)] {
            let output = host.run(host.dir.path(), id, "start");
            assert!(!output.status.success() && output.stdout.is_empty(), "{id}");
            assert_eq!(String::from_utf8(output.stderr).unwrap().lines().count(), 1);
        }
    });
}

#[test]
fn a_missing_kernel_fails_create_and_leaves_nothing_f32() {
    Host::with(async |host: &Host| {
        let bundle = host.bundle("c1");
        let address = host.start(&bundle, "c1");
        let task = connect(&address).await;
        // The id is free again each time, and it is quick for whoever has a processor.
        let mut fastest = Duration::MAX;
        for _ in 0..10 {
            let begun = Instant::now();
            let (status, text) = create(&task, "c1", &bundle).await;
            fastest = fastest.min(begun.elapsed());
            assert_eq!(status, Code::FAILED_PRECONDITION, "{text}");
            assert!(text.contains("/usr/share/bulkhead/manifest.json"), "{text}");
        }
        assert!(fastest < Duration::from_millis(200), "{fastest:?}");
        // Nobody knows of it any more.
        let request = DeleteRequest {
            id: "c1".into(),
            ..DeleteRequest::default()
        };
        let error = task.delete(context(), &request).await.unwrap_err();
        assert_eq!(code(&error).0, Code::NOT_FOUND);
        shutdown(&task, "c1").await;
    });
}

#[test]
fn without_kvm_create_says_so_f29() {
    Host::with(async |host: &Host| {
        host.cover("/dev");
        fs::write("/dev/null", "").unwrap();
        let bundle = host.bundle("c1");
        // /dev/null of the covered /dev is a file: give the shim a real one.
        fs::remove_file("/dev/null").unwrap();
        let mode = rustix::fs::Mode::from_raw_mode(0o666);
        let device = rustix::fs::makedev(1, 3);
        let kind = rustix::fs::FileType::CharacterDevice;
        rustix::fs::mknodat(rustix::fs::CWD, "/dev/null", kind, mode, device).unwrap();
        let address = host.start(&bundle, "c1");
        let task = connect(&address).await;
        let (status, text) = create(&task, "c1", &bundle).await;
        assert_eq!(status, Code::FAILED_PRECONDITION);
        assert!(
            text.contains("/dev/kvm") && text.contains("No such file"),
            "{text}"
        );
        shutdown(&task, "c1").await;
    });
}

#[test]
fn requests_that_make_no_sense_get_their_codes_ta_16() {
    Host::with(async |host: &Host| {
        let bundle = host.bundle("c1");
        let address = host.start(&bundle, "c1");
        let task = connect(&address).await;
        let state = |id: &str| StateRequest {
            id: id.into(),
            ..StateRequest::default()
        };
        let error = task.state(context(), &state("c1")).await.unwrap_err();
        assert_eq!(code(&error).0, Code::NOT_FOUND);
        let error = task.state(context(), &state("../x")).await.unwrap_err();
        assert_eq!(code(&error).0, Code::INVALID_ARGUMENT);
        let kill = KillRequest {
            id: "c1".into(),
            signal: 9,
            ..KillRequest::default()
        };
        assert_eq!(
            code(&task.kill(context(), &kill).await.unwrap_err()).0,
            Code::NOT_FOUND
        );
        let stats = StatsRequest {
            id: "c1".into(),
            ..StatsRequest::default()
        };
        assert_eq!(
            code(&task.stats(context(), &stats).await.unwrap_err()).0,
            Code::NOT_FOUND
        );
        let restore = CreateTaskRequest {
            id: "c1".into(),
            checkpoint: "/x".into(),
            ..CreateTaskRequest::default()
        };
        let error = task.create(context(), &restore).await.unwrap_err();
        assert_eq!(code(&error).0, Code::UNIMPLEMENTED, "B23");
        for (field, value) in [
            ("ociVersion", json!("99.0.0")),
            ("hooks", json!({"prestart": [{"path": "bin/x"}]})),
            ("root", json!({"path": 5})),
        ] {
            let mut spec = spec();
            spec[field] = value;
            host.write_spec(&bundle, &spec);
            let (status, text) = create(&task, "c1", &bundle).await;
            assert_eq!(status, Code::INVALID_ARGUMENT, "{text}");
            assert!(text.contains(field), "{text}");
        }
        fs::write(bundle.join("config.json"), "[".repeat(1 << 20)).unwrap();
        let (status, text) = create(&task, "c1", &bundle).await;
        assert_eq!(status, Code::INVALID_ARGUMENT, "B1: {text}");
        shutdown(&task, "c1").await;
    });
}

#[test]
fn both_names_of_the_service_are_served_and_no_other_tt_07_ta_01() {
    Host::with(async |host: &Host| {
        let bundle = host.bundle("c1");
        let address = host.start(&bundle, "c1");
        let client = Client::connect(&address).await.unwrap();
        let call = async |service: &str, method: &str| {
            let request = ttrpc::Request {
                service: service.into(),
                method: method.into(),
                timeout_nano: 5_000_000_000,
                ..ttrpc::Request::default()
            };
            client
                .request(request)
                .await
                .map(|_| ())
                .map_err(|error| code(&error).0)
        };
        assert_eq!(call("containerd.task.v2.Task", "Connect").await, Ok(()));
        assert_eq!(call("containerd.task.v3.Task", "Connect").await, Ok(()));
        assert_eq!(
            call("containerd.task.v2.Task", "Fly").await,
            Err(Code::UNIMPLEMENTED)
        );
        let sandbox = call("containerd.runtime.sandbox.v1.Sandbox", "CreateSandbox");
        assert_eq!(sandbox.await, Err(Code::UNIMPLEMENTED));
        shutdown(&TaskClient::new(client), "c1").await;
    });
}

#[test]
fn sigterm_ends_the_shim_in_order_lc_42() {
    Host::with(async |host: &Host| {
        let bundle = host.bundle("c1");
        let address = host.start(&bundle, "c1");
        let task = connect(&address).await;
        let pid = task
            .connect(context(), &ConnectRequest::default())
            .await
            .unwrap()
            .shim_pid;
        let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        host.assert_clean();
    });
}

#[test]
fn version_and_info_need_nothing_lc_55() {
    let run = |flag: &str| {
        Command::new(SHIM)
            .arg(flag)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    };
    let version = run("-v");
    assert!(version.status.success());
    assert!(
        String::from_utf8(version.stdout)
            .unwrap()
            .contains(env!("CARGO_PKG_VERSION"))
    );
    // It is as fast as its fastest run: others use the processor, too.
    let fastest = (0..10).map(|_| {
        let begun = Instant::now();
        run("-info");
        begun.elapsed()
    });
    assert!(fastest.min().unwrap() < Duration::from_millis(100));
    let info = run("-info");
    let info = RuntimeInfo::parse_from_bytes(&info.stdout).unwrap();
    assert_eq!(info.name, "io.containerd.bulkhead.v2");
}
