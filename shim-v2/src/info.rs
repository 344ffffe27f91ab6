//! `-info`: what the runtime can do, as containerd asks for it.
//!
//! Needs no KVM, no configuration and no writable disk. Tells only what the guest
//! really does.

use std::io;

use containerd_shim_protos::{
    protobuf::{Message, MessageField, well_known_types::any::Any},
    types::introspection::{RuntimeInfo, RuntimeVersion},
};
use serde_json::{Value, json};

use crate::error::{Result, host};

/// Type of the features of the OCI runtime specification.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Returns what must be printed.
pub fn run() -> Result<Vec<u8>> {
    let info = RuntimeInfo {
        name: "io.containerd.bulkhead.v2".to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..RuntimeVersion::default()
        }),
        features: MessageField::some(Any {
            type_url: FEATURES.to_owned(),
            value: features().to_string().into_bytes(),
            ..Any::default()
        }),
        ..RuntimeInfo::default()
    };
    info.write_to_bytes()
        .map_err(|error| host("encode the answer")(io::Error::other(error)))
}

fn features() -> Value {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.3.0",
        "hooks": [
            "prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop",
        ],
        "mountOptions": [
            "async", "atime", "bind", "defaults", "dev", "diratime", "dirsync", "exec", "noatime",
            "nodev", "nodiratime", "noexec", "norelatime", "nostrictatime", "nosuid", "nosymfollow",
            "private", "ratime", "rbind", "rdev", "rdiratime", "relatime", "rexec", "rnoatime",
            "rnodev", "rnodiratime", "rnoexec", "rnorelatime", "rnostrictatime", "rnosuid",
            "rnosymfollow", "ro", "rprivate", "rrelatime", "rro", "rrw", "rslave", "rstrictatime",
            "rsuid", "rsymfollow", "rw", "slave", "strictatime", "suid", "symfollow", "sync",
            "tmpcopyup",
        ],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
            "capabilities": bulkhead_agent_api::spec::CAPABILITIES.as_slice(),
            "cgroup": {"v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false},
            "seccomp": {
                "enabled": true,
                "actions": [
                    "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS",
                    "SCMP_ACT_KILL_THREAD", "SCMP_ACT_LOG", "SCMP_ACT_TRACE", "SCMP_ACT_TRAP",
                ],
                "operators": [
                    "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT",
                    "SCMP_CMP_MASKED_EQ", "SCMP_CMP_NE",
                ],
                "archs": ["SCMP_ARCH_X86", "SCMP_ARCH_X32", "SCMP_ARCH_X86_64"],
                "knownFlags": [
                    "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC",
                ],
                "supportedFlags": [
                    "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC",
                ],
            },
            "apparmor": {"enabled": false},
            "selinux": {"enabled": false},
            "intelRdt": {"enabled": false},
            // Callers take it for pods with users of their own, whose namespaces have paths.
            "mountExtensions": {"idmap": {"enabled": false}},
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_has_what_the_cri_dereferences_lc_57() {
        let info = RuntimeInfo::parse_from_bytes(&run().unwrap()).unwrap();
        assert_eq!(info.name, "io.containerd.bulkhead.v2");
        assert_eq!(info.features.type_url, FEATURES);
        let features: Value = serde_json::from_slice(&info.features.value).unwrap();
        assert!(features["linux"]["seccomp"]["enabled"].as_bool().unwrap());
        let options = features["mountOptions"].as_array().unwrap();
        // Volumes that are read-only with all below them.
        assert!(options.iter().any(|option| option == "rro"));
    }

    #[test]
    fn what_is_told_is_what_a_specification_may_say_lc_58() {
        let told = features();
        let namespaces: Vec<Value> = told["linux"]["namespaces"]
            .as_array()
            .unwrap()
            .iter()
            .map(|kind| json!({"type": kind}))
            .collect();
        let hook = json!([{"path": "/h"}]);
        let hooks: serde_json::Map<_, _> = told["hooks"]
            .as_array()
            .unwrap()
            .iter()
            .map(|kind| (kind.as_str().unwrap().to_owned(), hook.clone()))
            .collect();
        let bounding = &told["linux"]["capabilities"];
        let options = told["mountOptions"].as_array().unwrap().clone();
        let (bind, rest): (Vec<_>, Vec<_>) = options
            .into_iter()
            .partition(|option| *option == "bind" || *option == "rbind");
        let spec = json!({
            "ociVersion": told["ociVersionMax"],
            "process": {"args": ["a"], "capabilities": {"bounding": bounding}},
            "root": {"path": "/rootfs"},
            "mounts": [
                {"destination": "/a", "type": "tmpfs", "options": rest},
                {"destination": "/b", "source": "/b", "options": bind},
            ],
            "linux": {"namespaces": namespaces, "uidMappings": [{"size": 1}], "gidMappings": [{"size": 1}]},
            "hooks": hooks,
        });
        let spec = bulkhead_agent_api::spec::json::from_value("", spec).unwrap();
        let checked = bulkhead_agent_api::spec::container(spec, None).unwrap();
        let left_out = |note: &&bulkhead_agent_api::spec::Note| !note.why.contains("private");
        assert_eq!(checked.notes.iter().find(left_out), None);
        let hooks = checked.plan.hooks;
        let lists = [
            hooks.prestart,
            hooks.create_runtime,
            hooks.create_container,
            hooks.start_container,
            hooks.poststart,
            hooks.poststop,
        ];
        assert!(lists.iter().all(|list| list.len() == 1));
    }
}
