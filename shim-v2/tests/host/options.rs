//! What the caller sets for a pod, and what the shim's own process is like.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    process::{Output, Stdio},
};

use containerd_shim_protos::{
    api::CreateTaskRequest,
    bootstrap_api::{BootstrapParams, BootstrapResult, Extension, LogLevel},
    protobuf::{Message, MessageField, well_known_types::any::Any},
    shim::oci::Options as RuncOptions,
};
use ttrpc::Code;

use crate::support::*;

/// `runtimeoptions.v1.Options` with a path (field 2) or a text (field 3).
fn ours(field: u8, text: &str) -> Any {
    let mut value = vec![field << 3 | 2, u8::try_from(text.len()).unwrap()];
    value.extend(text.as_bytes());
    any("runtimeoptions.v1.Options", value)
}

fn any(kind: &str, value: Vec<u8>) -> Any {
    Any {
        type_url: kind.into(),
        value,
        ..Any::default()
    }
}

fn runc(shim_cgroup: &str) -> Any {
    let options = RuncOptions {
        shim_cgroup: shim_cgroup.into(),
        ..RuncOptions::default()
    };
    any(
        "containerd.runc.v1.Options",
        options.write_to_bytes().unwrap(),
    )
}

impl Host {
    /// Calls `start` with this on its standard input, and these flags.
    fn start_with(&self, bundle: &Path, flags: &[&str], input: &[u8]) -> Output {
        let mut command = self.flags(bundle, "c1");
        command.args(flags).arg("start").stdin(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        // Ends only when nobody holds the streams any more.
        child.wait_with_output().unwrap()
    }
}

/// A FIFO for the shim's log, and its reader.
fn log(bundle: &Path) -> File {
    let path = bundle.join("log");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mkfifoat(rustix::fs::CWD, &path, mode).unwrap();
    File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .unwrap()
}

fn lines(log: &mut File) -> String {
    let mut text = String::new();
    // Its end is that there is no more for now.
    let _ = log.read_to_string(&mut text);
    text
}

#[test]
fn start_says_its_answer_and_nothing_else_whatever_it_is_given_lc_21() {
    Host::with(async |host: &Host| {
        let bundle = host.bundle("c1");
        let mut log = log(&bundle);
        let mut addresses = Vec::new();
        for (flags, input) in [
            (&["-debug"][..], &b""[..]),
            (&["-future=yes", "--other", "value"], b""),
            (&["-debug=true"], b"\xff\xff broken"),
            (
                &[],
                &any("some.other.v1.Options", vec![1, 2, 3])
                    .write_to_bytes()
                    .unwrap(),
            ),
            (&[], &runc("").write_to_bytes().unwrap()),
        ] {
            let output = host.start_with(&bundle, flags, input);
            assert!(
                output.status.success() && output.stderr.is_empty(),
                "{output:?}"
            );
            let address = String::from_utf8(output.stdout).unwrap();
            shutdown(&connect(&address).await, "c1").await;
            host.assert_clean();
            addresses.push(address);
        }
        addresses.dedup();
        assert_eq!(addresses.len(), 1);
        let text = lines(&mut log);
        for said in [
            "flags=\"future other\"",
            "runtime options of type \\\"some.other.v1.Options\\\" are ignored",
            "runtime options of type \\\"containerd.runc.v1.Options\\\" are ignored",
        ] {
            assert_eq!(text.matches(said).count(), 1, "{said}: {text}");
        }
    });
}

#[test]
fn who_wants_to_be_told_more_says_so_by_flag_or_by_level_lc_05() {
    Host::with(async |host: &Host| {
        let bundle = host.bundle("c1");
        let mut log = log(&bundle);
        let level = |level: LogLevel| {
            let params = BootstrapParams {
                instance_id: "c1".into(),
                log_level: level.into(),
                ..BootstrapParams::default()
            };
            params.write_to_bytes().unwrap()
        };
        for (flags, input, debug) in [
            (&[][..], Vec::new(), false),
            (&["-debug"], Vec::new(), true),
            (&[], level(LogLevel::LOG_LEVEL_DEBUG), true),
            (&[], level(LogLevel::LOG_LEVEL_INFO), false),
        ] {
            let output = host.start_with(&bundle, flags, &input);
            let address = match BootstrapResult::parse_from_bytes(&output.stdout) {
                Ok(result) if !input.is_empty() => result.address,
                _ => String::from_utf8(output.stdout).unwrap(),
            };
            shutdown(&connect(&address).await, "c1").await;
            host.assert_clean();
            assert_eq!(lines(&mut log).contains("level=debug"), debug, "{flags:?}");
        }
    });
}

#[test]
fn settings_that_cannot_be_read_fail_start_and_are_named_ta_19() {
    Host::with(async |host: &Host| {
        let bundle = host.bundle("c1");
        let file = host.dir.path().join("settings.toml");
        fs::write(&file, "vcpus = 0").unwrap();
        let file = file.to_str().unwrap();
        for (options, words) in [
            (ours(2, "/nowhere/x.toml"), "/nowhere/x.toml: No such file"),
            (ours(2, file), "settings.toml: vcpus = 0 must lie between"),
            (ours(3, "vcpu = 1"), "unknown field `vcpu`"),
        ] {
            let extension = Extension {
                value: MessageField::some(options.clone()),
                ..Extension::default()
            };
            let params = BootstrapParams {
                instance_id: "c1".into(),
                extensions: vec![extension],
                ..BootstrapParams::default()
            };
            for input in [
                options.write_to_bytes().unwrap(),
                params.write_to_bytes().unwrap(),
            ] {
                let output = host.start_with(&bundle, &[], &input);
                let text = String::from_utf8(output.stderr).unwrap();
                assert!(!output.status.success() && output.stdout.is_empty());
                assert!(text.contains(words), "{text}");
                assert_eq!(text.lines().count(), 1, "{text}");
                assert!(!bundle.join("address").exists());
                host.assert_clean();
            }
        }
    });
}

#[test]
fn the_first_options_decide_whoever_brings_them_ta_19() {
    Host::with(async |host: &Host| {
        let bundle = host.bundle("c1");
        let assets = |name: &str| ours(3, &format!("assets_dir = \"/{name}\""));
        for (of_start, of_create, decides) in [
            (None, None, "/usr/share/bulkhead/"),
            (Some(assets("start")), Some(assets("create")), "/start/"),
            (Some(runc("")), Some(assets("create")), "/create/"),
            (None, Some(any("unknown", vec![1])), "/usr/share/bulkhead/"),
            (
                None,
                Some(ours(2, "/nowhere.toml")),
                "Cannot read /nowhere.toml",
            ),
        ] {
            let input = of_start.map(|options| options.write_to_bytes().unwrap());
            let output = host.start_with(&bundle, &[], &input.unwrap_or_default());
            let task = connect(&String::from_utf8(output.stdout).unwrap()).await;
            let request = CreateTaskRequest {
                id: "c1".into(),
                bundle: bundle.display().to_string(),
                options: of_create.into(),
                ..CreateTaskRequest::default()
            };
            let error = task.create(context(), &request).await.unwrap_err();
            let (status, text) = code(&error);
            // There are no assets here: where they are looked for tells the settings.
            assert_eq!(status, Code::FAILED_PRECONDITION, "{text}");
            assert!(text.contains(decides), "{text}");
            shutdown(&task, "c1").await;
            host.assert_clean();
        }
    });
}

#[test]
fn a_shim_is_one_step_easier_to_kill_than_who_started_it_lc_45() {
    Host::with(async |host: &Host| {
        let bundle = host.bundle("c1");
        let score = |pid: u32| -> i32 {
            let text = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
            text.trim().parse().unwrap()
        };
        let task = connect(&host.start(&bundle, "c1")).await;
        let (pid, _) = process(&task).await;
        let pid = pid.as_raw_nonzero().get().unsigned_abs();
        assert_eq!(score(pid), (score(std::process::id()) + 1).min(1000));
        shutdown(&task, "c1").await;
    });
}

#[test]
fn a_shim_lives_in_the_cgroup_that_options_name_ta_20() {
    Host::with(async |host: &Host| {
        let bundle = host.bundle("c1");
        let name = format!("/bulkhead-test-{}-shims", std::process::id());
        let place = Path::new("/sys/fs/cgroup").join(name.trim_start_matches('/'));
        let input = runc(&name).write_to_bytes().unwrap();
        // It is for whoever names it to make it.
        let output = host.start_with(&bundle, &[], &input);
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && text.contains(&name), "{text}");
        host.assert_clean();
        let is_v2 = Path::new("/sys/fs/cgroup/cgroup.procs").exists();
        if !is_v2 || fs::create_dir(&place).is_err() {
            println!("skipped in part: no cgroup of version 2 can be made here");
            return;
        }
        let output = host.start_with(&bundle, &[], &input);
        let task = connect(&String::from_utf8(output.stdout).unwrap()).await;
        let (pid, ended) = process(&task).await;
        let inside = fs::read_to_string(place.join("cgroup.procs")).unwrap();
        shutdown(&task, "c1").await;
        assert!(bulkhead_shim::statedir::ended(&ended, 5000));
        fs::remove_dir(&place).unwrap();
        assert_eq!(inside.trim(), pid.as_raw_nonzero().get().to_string());
    });
}

#[test]
fn what_the_runtime_can_do_is_told_whatever_options_come_with_the_question_lc_55() {
    let ask = |input: &[u8]| {
        let mut child = std::process::Command::new(SHIM)
            .args(["-debug", "-info"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // It need not read them.
        let _ = child.stdin.take().unwrap().write_all(input);
        let output = child.wait_with_output().unwrap();
        assert!(
            output.status.success() && output.stderr.is_empty(),
            "{output:?}"
        );
        output.stdout
    };
    let told = ask(b"");
    for input in [
        ours(2, "/nowhere.toml").write_to_bytes().unwrap(),
        runc("/x").write_to_bytes().unwrap(),
        b"\xff\xff broken".to_vec(),
    ] {
        assert_eq!(ask(&input), told);
    }
}
