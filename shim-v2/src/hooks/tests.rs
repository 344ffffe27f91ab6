use std::{fs, os::unix::fs::PermissionsExt};

use bulkhead_agent_api::spec::plan::Hook;

use super::*;
use crate::share::enter_private_namespace;

/// A hook that is a script, with its own name as the only argument.
fn script(dir: &Path, name: &str, lines: &str) -> Hook {
    let path = dir.join(name);
    fs::write(&path, format!("#!/bin/sh\n{lines}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    Hook {
        path,
        args: vec![name.to_owned()],
        env: Vec::new(),
        timeout_s: Some(60),
    }
}

fn hooks(dir: &Path, lists: plan::Hooks) -> Hooks {
    Hooks {
        host: Arc::new(Host::here().unwrap()),
        id: ContainerId::new("c1").unwrap(),
        bundle: dir.to_owned(),
        annotations: BTreeMap::from([("key".to_owned(), "value".to_owned())]),
        lists,
    }
}

/// Runs a test on a thread that is away from the host's mounts, as the shim is; root only.
fn run(test: impl AsyncFnOnce(&Path) + Send) {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: needs root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(test(dir.path()));
        });
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

async fn failure(hook: Hook, dir: &Path) -> String {
    let lists = plan::Hooks {
        prestart: vec![hook],
        ..plan::Hooks::default()
    };
    let error = hooks(dir, lists)
        .run(Moment::Prestart, 1)
        .await
        .unwrap_err();
    assert_eq!(error.code(), ttrpc::Code::FAILED_PRECONDITION);
    error.text()
}

#[test]
fn a_hook_hears_the_state_at_its_moment_and_then_its_end_oc_05_oc_10() {
    run(async |dir| {
        let hook = |name: &str| {
            script(
                dir,
                name,
                &format!("cat > {name}.json; echo x >> {name}.json"),
            )
        };
        let lists = plan::Hooks {
            prestart: vec![hook("prestart")],
            create_runtime: vec![hook("createRuntime")],
            create_container: vec![hook("createContainer")],
            start_container: Vec::new(),
            poststart: vec![hook("poststart")],
            poststop: vec![hook("poststop")],
        };
        let hooks = hooks(dir, lists);
        let own = std::process::id();
        for (moment, status, pid) in [
            (Moment::Prestart, "creating", own),
            (Moment::CreateRuntime, "creating", own),
            (Moment::CreateContainer, "creating", own),
            (Moment::Poststart, "running", own),
            (Moment::Poststop, "stopped", 0),
        ] {
            hooks.run(moment, own).await.unwrap();
            let text = fs::read_to_string(dir.join(format!("{}.json", moment.name()))).unwrap();
            let state: serde_json::Value =
                serde_json::from_str(text.strip_suffix("x\n").unwrap()).unwrap();
            let expected = serde_json::json!({
                "ociVersion": OCI_VERSION, "id": "c1", "status": status, "pid": pid,
                "bundle": dir, "annotations": {"key": "value"},
            });
            assert_eq!(state, expected);
        }
    });
}

#[test]
fn a_hook_has_its_own_arguments_and_variables_and_nothing_of_the_shim_oc_04() {
    run(async |dir| {
        let mut hook = script(
            dir,
            "seen",
            "exec > $2; env | grep -v -e ^PWD= -e ^_= -e ^SHLVL= -e ^OLDPWD=; pwd; echo $1; (ls /proc/$$/fd | sort -n | tr '\\n' ' '); echo; \
             readlink /proc/$$/ns/mnt; read -r _ _ _ _ _ session _ < /proc/$$/stat; \
             test $session = $$ && echo session",
        );
        hook.args = ["name", "one", "two"].map(str::to_owned).to_vec();
        hook.env = vec!["A=b=c".to_owned()];
        let lists = plan::Hooks {
            prestart: vec![hook],
            ..plan::Hooks::default()
        };
        let hooks = hooks(dir, lists);
        let outside = fs::read_link("/proc/thread-self/ns/mnt").unwrap();
        // What the shim has open and does not mean to show.
        let leak = fs::File::open("/dev/null").unwrap();
        rustix::io::fcntl_setfd(&leak, rustix::io::FdFlags::empty()).unwrap();
        // From a thread in another namespace.
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                enter_private_namespace().unwrap();
                assert_ne!(fs::read_link("/proc/thread-self/ns/mnt").unwrap(), outside);
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .build()
                    .unwrap();
                runtime.block_on(hooks.run(Moment::Prestart, 1)).unwrap();
            });
            thread.join().unwrap();
        });
        let text = fs::read_to_string(dir.join("two")).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        let place = dir.to_str().unwrap();
        // A shell has its script open, under a number of its own choice.
        let (fds, lines): (Vec<_>, Vec<_>) = lines
            .into_iter()
            .partition(|line| line.starts_with("0 1 2"));
        assert_eq!(
            lines,
            ["A=b=c", place, "one", outside.to_str().unwrap(), "session"]
        );
        assert!(
            fds == ["0 1 2 10 "] || fds == ["0 1 2 255 "] || fds == ["0 1 2 3 "],
            "{fds:?}"
        );
    });
}

#[test]
fn a_hook_that_fails_says_why_and_ends_the_row_oc_06() {
    run(async |dir| {
        let lists = plan::Hooks {
            prestart: vec![
                script(dir, "first", "echo first >> order"),
                script(dir, "second", "echo second >> order; echo no luck; exit 3"),
                script(dir, "third", "echo third >> order"),
            ],
            ..plan::Hooks::default()
        };
        let hooks = hooks(dir, lists);
        let error = hooks.run(Moment::Prestart, 1).await.unwrap_err().text();
        let path = dir.join("second");
        assert_eq!(
            error,
            format!(
                "Hook prestart[1] {} failed: it ended with exit status: 3: no luck",
                path.display()
            )
        );
        assert_eq!(
            fs::read_to_string(dir.join("order")).unwrap(),
            "first\nsecond\n"
        );
        let killed = failure(script(dir, "killed", "kill -9 $$"), dir).await;
        assert!(killed.contains("signal: 9"), "{killed}");
        let mut missing = script(dir, "missing", "");
        missing.path = dir.join("nowhere");
        let missing = failure(missing, dir).await;
        assert!(
            missing.contains("it cannot be started: No such file"),
            "{missing}"
        );
        // However much it says, and whatever.
        let loud =
            "i=0; while [ $i -lt 3000 ]; do i=$((i+1)); printf '%0100d\\033[1m' $i; done; exit 1";
        let loud = failure(script(dir, "loud", loud), dir).await;
        assert!(loud.len() < 1200 && !loud.contains('\u{1b}'), "{loud}");
    });
}

#[test]
fn a_hook_that_does_not_end_is_killed_with_what_it_started_oc_04_b10() {
    run(async |dir| {
        let mut hook = script(dir, "endless", "sleep 1000 & echo $! > child; wait");
        hook.timeout_s = Some(1);
        let begun = Instant::now();
        let error = failure(hook, dir).await;
        assert!(error.contains("it was killed after 1 s"), "{error}");
        assert!(begun.elapsed() < Duration::from_secs(30));
        assert_gone(&fs::read_to_string(dir.join("child")).unwrap());
    });
}

#[test]
fn a_hook_that_nobody_waits_for_any_more_is_killed_ta_17() {
    run(async |dir| {
        let lists = plan::Hooks {
            prestart: vec![script(
                dir,
                "endless",
                "echo $$ > begun.new; mv begun.new begun; exec sleep 1000",
            )],
            ..plan::Hooks::default()
        };
        let hooks = hooks(dir, lists);
        let begun = dir.join("begun");
        tokio::select! {
            ended = hooks.run(Moment::Prestart, 1) => panic!("{ended:?}"),
            () = async { while !begun.exists() { tokio::time::sleep(Duration::from_millis(10)).await } } => {}
        }
        assert_gone(&fs::read_to_string(&begun).unwrap());
    });
}

/// Waits until a process has ended.
#[track_caller]
fn assert_gone(pid: &str) {
    let stat = format!("/proc/{}/stat", pid.trim());
    let deadline = Instant::now() + Duration::from_secs(30);
    // Whoever adopted it may not have reaped it.
    while fs::read_to_string(&stat).is_ok_and(|text| !text.contains(") Z ")) {
        assert!(Instant::now() < deadline, "{pid} lives");
        std::thread::sleep(Duration::from_millis(10));
    }
}
