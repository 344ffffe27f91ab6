//! Hooks.

use serde_json::json;

use super::*;

const KINDS: [&str; 6] = [
    "prestart",
    "createRuntime",
    "createContainer",
    "startContainer",
    "poststart",
    "poststop",
];

#[test]
fn hooks_of_every_kind_are_taken_in_their_order_oc_07_b10() {
    let hook =
        |path: &str| json!({"path": path, "args": ["name", "-x"], "env": ["A=b=c"], "timeout": 3});
    for kind in KINDS {
        let spec = with("hooks", json!({kind: [hook("/one"), hook("/two")]}));
        let hooks = check(&spec).unwrap().plan.hooks;
        let lists = [
            hooks.prestart,
            hooks.create_runtime,
            hooks.create_container,
            hooks.start_container,
            hooks.poststart,
            hooks.poststop,
        ];
        for (other, list) in KINDS.into_iter().zip(lists) {
            let paths: Vec<_> = list
                .iter()
                .map(|hook| hook.path.to_str().unwrap())
                .collect();
            let expected: &[&str] = if other == kind {
                &["/one", "/two"]
            } else {
                &[]
            };
            assert_eq!(paths, expected, "{kind} {other}");
            if let Some(hook) = list.first() {
                assert_eq!((hook.args.len(), hook.timeout_s), (2, Some(3)));
                assert_eq!(hook.env, ["A=b=c"]);
            }
        }
        accepted("hooks", json!({kind: []}));
    }
    let bare = check(&with("hooks", json!({"prestart": [{"path": "/bin/x"}]})));
    let bare = bare.unwrap().plan.hooks.prestart.remove(0);
    assert_eq!(
        (bare.args, bare.timeout_s),
        (vec!["/bin/x".to_owned()], None)
    );
}

#[test]
fn a_hook_that_cannot_be_run_as_it_says_is_refused_oc_04_b10() {
    for kind in KINDS {
        for (hook, field) in [
            (json!({}), "path"),
            (json!({"path": "relative"}), "path"),
            (json!({"path": "/a\0b"}), "path"),
            (json!({"path": "/a", "args": ["x", "\0"]}), "args[1]"),
            (json!({"path": "/a", "env": ["A=1", "\0=1"]}), "env[1]"),
            (json!({"path": "/a", "env": ["A"]}), "env[0]"),
            (json!({"path": "/a", "env": ["=A"]}), "env[0]"),
            (json!({"path": "/a", "timeout": 0}), "timeout"),
            (json!({"path": "/a", "timeout": -1}), "timeout"),
            (json!({"path": "/a", "timeout": 1_u64 << 40}), "timeout"),
            (json!({"path": "/a", "timeout": "1"}), "timeout"),
        ] {
            refused(
                "hooks",
                json!({kind: [{"path": "/ok"}, hook]}),
                &format!("hooks.{kind}[1].{field}"),
            );
        }
        let many = json!({kind: vec![json!({"path": "/a"}); 65]});
        refused("hooks", many, &format!("hooks.{kind} = 65 entries"));
    }
}

#[test]
fn the_guest_gets_the_hooks_that_are_its_own_and_no_annotations() {
    let mut spec = minimal();
    for kind in KINDS {
        spec["hooks"][kind] = json!([{"path": format!("/{kind}")}]);
    }
    spec["annotations"] = json!({"a": "b"});
    let typed: oci::Spec = json::from_value("", spec).unwrap();
    assert_eq!(typed.annotations["a"], "b");
    let wire = serde_json::to_value(&typed).unwrap();
    let sent: Vec<_> = wire["hooks"].as_object().unwrap().keys().collect();
    assert_eq!(sent, ["startContainer"]);
    assert_eq!(wire.get("annotations"), None);
}
