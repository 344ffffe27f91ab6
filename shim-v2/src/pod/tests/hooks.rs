//! Hooks in the life of a container, and what is told of its specification.

use std::{fs, path::Path};

use serde_json::{Value, json};

use super::{
    super::*,
    harness::{Bench, run, run_with},
};
use crate::{config::Config, explain::Explanation, statedir::kept};

const KINDS: [&str; 5] = [
    "prestart",
    "createRuntime",
    "createContainer",
    "poststart",
    "poststop",
];

/// Hooks of every kind that write down their kind in the file `order`; `bad` fails then.
fn hooks(order: &Path, bad: &str) -> Value {
    let hook = |kind: &str| {
        let end = if kind == bad { "exit 1" } else { "true" };
        let script = format!("echo {kind} >> {}; {end}", order.display());
        json!([{"path": "/bin/sh", "args": ["sh", "-c", script], "timeout": 60}])
    };
    KINDS
        .map(|kind| (kind.to_owned(), hook(kind)))
        .into_iter()
        .collect::<serde_json::Map<_, _>>()
        .into()
}

async fn create(bench: &Bench, id: &str, bad: &str) -> Result<u32> {
    let hooks = hooks(&bench.place.join(format!("{id}.order")), bad);
    let request = bench.request_with(id, |spec| spec["hooks"] = hooks);
    bench.pod.create(request).await
}

fn order(bench: &Bench, id: &str) -> Vec<String> {
    let text = fs::read_to_string(bench.place.join(format!("{id}.order"))).unwrap();
    text.lines().map(str::to_owned).collect()
}

#[test]
fn hooks_run_at_their_moments_and_in_their_order_oc_07() {
    run(async |bench| {
        create(bench, "c", "").await.unwrap();
        assert_eq!(order(bench, "c"), KINDS[..3]);
        bench.start("c").await.unwrap();
        assert_eq!(order(bench, "c"), KINDS[..4]);
        bench.agent.exits("c", "", 7);
        assert_eq!(bench.wait("c").await, 7);
        assert_eq!(order(bench, "c"), KINDS[..4]);
        assert_eq!(bench.delete("c").await.unwrap(), 7);
        assert_eq!(order(bench, "c"), KINDS);
    });
}

#[test]
fn a_hook_that_fails_in_create_leaves_nothing_and_those_of_the_end_run_oc_06_ta_17() {
    run(async |bench| {
        for (number, bad) in KINDS[..3].iter().enumerate() {
            let error = create(bench, "c", bad).await.unwrap_err();
            assert_eq!(error.code(), Code::FAILED_PRECONDITION);
            assert!(
                error
                    .text()
                    .contains(&format!("Hook {bad}[0] /bin/sh failed")),
                "{}",
                error.text()
            );
            let mut expected = KINDS[..=number].to_vec();
            expected.push("poststop");
            assert_eq!(order(bench, "c"), expected);
            assert!(!bench.agent.has("c", ""));
            assert_eq!(bench.shared(), 0);
            assert!(!told(bench, "c").exists());
            fs::remove_file(bench.place.join("c.order")).unwrap();
        }
        // What fails in the guest after them ends with them too.
        let missing = bulkhead_agent_api::agent::cause::Kind::PROGRAM_NOT_FOUND;
        bench
            .agent
            .refuse("Create", Code::INVALID_ARGUMENT, missing);
        create(bench, "c", "").await.unwrap_err();
        assert_eq!(order(bench, "c"), [&KINDS[..3], &KINDS[4..]].concat());
        // What is refused before there is anything has none.
        let request = bench.request_with("d", |spec| {
            spec["hooks"] = hooks(&bench.place.join("d.order"), "");
            spec["process"]["cwd"] = json!("relative");
        });
        bench.pod.create(request).await.unwrap_err();
        assert!(!bench.place.join("d.order").exists());
    });
}

#[test]
fn a_program_whose_hooks_fail_is_killed_and_its_start_was_none_oc_06() {
    run(async |bench| {
        create(bench, "c", "poststart").await.unwrap();
        let error = bench.start("c").await.unwrap_err();
        assert!(
            error.text().contains("Hook poststart[0]"),
            "{}",
            error.text()
        );
        assert_eq!(bench.wait("c").await, 137);
        assert!(bench.told_of("/tasks/start").is_empty());
        assert_eq!(bench.told_of("/tasks/exit"), ["/tasks/exit c 137"]);
        assert_eq!(bench.delete("c").await.unwrap(), 137);
        assert_eq!(order(bench, "c"), KINDS);
        // At the end a failure changes nothing any more.
        create(bench, "d", "poststop").await.unwrap();
        assert_eq!(bench.delete("d").await.unwrap(), 137);
        assert_eq!(order(bench, "d"), [&KINDS[..3], &KINDS[4..]].concat());
    });
}

#[test]
fn the_end_of_the_pod_runs_the_hooks_of_the_end() {
    run(async |bench| {
        create(bench, "c", "").await.unwrap();
        bench.start("c").await.unwrap();
        bench.pod.stop().await;
        assert_eq!(order(bench, "c"), KINDS);
    });
}

#[test]
fn hooks_are_told_the_pid_of_the_container_oc_05_oc_09_ta_09() {
    run(async |bench| {
        let (told, network) = (bench.place.join("told"), bench.place.join("network"));
        let hook = |script: String| json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}]);
        let tell = hook(format!("cat >> {0}; echo >> {0}", told.display()));
        let look = hook(format!(
            "cat >> {0}; echo >> {0}; readlink /proc/self/ns/net > {1}",
            told.display(),
            network.display()
        ));
        let request = bench.request_with("c", |spec| {
            spec["hooks"] = json!({
                "prestart": tell, "createRuntime": tell, "createContainer": look,
                "poststart": tell, "poststop": tell,
            });
        });
        let pid = bench.pod.create(request).await.unwrap();
        let held = fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
        let seen = fs::read_to_string(network).unwrap();
        assert_eq!(seen.trim_end(), held.to_str().unwrap());
        bench.start("c").await.unwrap();
        bench.agent.exits("c", "", 0);
        bench.wait("c").await;
        bench.delete("c").await.unwrap();
        let told = fs::read_to_string(told).unwrap();
        let pids: Vec<u64> = told
            .lines()
            .map(|line| {
                serde_json::from_str::<Value>(line).unwrap()["pid"]
                    .as_u64()
                    .unwrap()
            })
            .collect();
        let pid = u64::from(pid);
        assert_eq!(pids, [pid, pid, pid, pid, 0]);
    });
}

fn told(bench: &Bench, id: &str) -> PathBuf {
    kept::file(bench.state.path(), &ContainerId::new(id).unwrap())
}

#[test]
fn what_became_of_a_specification_is_told_as_long_as_there_is_the_container() {
    run(async |bench| {
        let request = bench.request_with("c", |spec| {
            spec["process"]["apparmorProfile"] = json!("docker-default");
        });
        bench.pod.create(request).await.unwrap();
        let id = ContainerId::new("c").unwrap();
        let found = Explanation::find(&id).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].namespace.as_deref(), Some("default"));
        let told_of = |name: &str| found[0].fields.iter().find(|note| note.field == name);
        assert!(told_of("process.apparmorProfile").unwrap().security);
        assert!(!told_of("process.args").unwrap().is_remark());
        bench.delete("c").await.unwrap();
        assert_eq!(Explanation::find(&id).unwrap(), []);
    });
}

#[test]
fn a_strict_administrator_hears_of_protection_that_there_is_not_b17() {
    let strict = Config {
        strict: true,
        ..Config::default()
    };
    run_with(strict, async |bench| {
        for (place, field) in [
            ("/process/apparmorProfile", "process.apparmorProfile"),
            ("/process/selinuxLabel", "process.selinuxLabel"),
            ("/linux/mountLabel", "linux.mountLabel"),
        ] {
            let request = bench.request_with("c", |spec| {
                let (parent, name) = place.rsplit_once('/').unwrap();
                spec.pointer_mut(parent).unwrap()[name] = json!("label");
            });
            let error = bench.pod.create(request).await.unwrap_err();
            assert_eq!(error.code(), Code::INVALID_ARGUMENT);
            assert!(error.text().contains(field), "{}", error.text());
        }
        assert_eq!(bench.booted(), 0);
        bench.running("c").await;
        let process = json!({"args": ["/bin/true"], "apparmorProfile": "x"});
        let exec = ExecId::new("e").unwrap();
        let id = ContainerId::new("c").unwrap();
        let stdio = crate::io::Stdio::default();
        let error = bench.pod.exec(&id, exec, process, stdio).unwrap_err();
        assert!(
            error.text().contains("process.apparmorProfile"),
            "{}",
            error.text()
        );
    });
}
