//! Metrics in the form of the host's cgroup version.
//!
//! Readers dereference every sub-message, so each one is present, with zeros.

use containerd_shim_protos::{
    cgroups, cgroups_v2,
    protobuf::{
        MessageDyn, MessageFull,
        reflect::{RuntimeFieldType, RuntimeType},
        well_known_types::any::Any,
    },
};

/// Metrics of a container about which nothing is known.
pub(super) fn zeros() -> Any {
    let unified = rustix::fs::statfs("/sys/fs/cgroup")
        .is_ok_and(|stat| stat.f_type == rustix::fs::FsWord::from(libc::CGROUP2_SUPER_MAGIC));
    if unified {
        filled::<cgroups_v2::metrics::Metrics>()
    } else {
        filled::<cgroups::metrics::Metrics>()
    }
}

fn filled<M: MessageFull>() -> Any {
    let mut metrics = M::new();
    fill(&mut metrics);
    Any {
        type_url: M::descriptor().full_name().to_owned(),
        value: metrics.write_to_bytes().unwrap_or_default(),
        ..Any::default()
    }
}

fn fill(message: &mut dyn MessageDyn) {
    for field in message.descriptor_dyn().fields() {
        if let RuntimeFieldType::Singular(RuntimeType::Message(_)) = field.runtime_field_type() {
            fill(field.mut_message(message));
        }
    }
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::protobuf::Message;

    use super::*;

    #[test]
    fn every_sub_message_is_present_ta_58() {
        let any = filled::<cgroups::metrics::Metrics>();
        assert_eq!(any.type_url, "io.containerd.cgroups.v1.Metrics");
        let metrics = cgroups::metrics::Metrics::parse_from_bytes(&any.value).unwrap();
        assert!(metrics.cpu.usage.is_some() && metrics.cpu.throttling.is_some());
        let memory = metrics.memory.unwrap();
        assert!(memory.usage.is_some() && memory.swap.is_some() && memory.kernel_tcp.is_some());
        assert!(metrics.pids.is_some());
        let any = filled::<cgroups_v2::metrics::Metrics>();
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let metrics = cgroups_v2::metrics::Metrics::parse_from_bytes(&any.value).unwrap();
        assert!(metrics.memory_events.is_some() && metrics.io.is_some());
    }
}
