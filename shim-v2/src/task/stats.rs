//! Statistics in the form of the host's cgroup version, whatever the guest has.
//!
//! Readers expect that form and dereference every sub-message, so each one is present,
//! with zeros where nothing is counted.

use containerd_shim_protos::{
    cgroups::metrics as v1,
    cgroups_v2::metrics::Metrics,
    protobuf::{MessageField, MessageFull, well_known_types::any::Any},
};

use crate::agent::stats::filled;

/// "No limit" in cgroup v1: the greatest number of whole pages.
const UNLIMITED: u64 = 0x7fff_ffff_ffff_f000;

/// What a container has used, as this host's readers expect it.
pub(super) fn message(metrics: &Metrics) -> Any {
    let unified = rustix::fs::statfs("/sys/fs/cgroup")
        .is_ok_and(|stat| stat.f_type == rustix::fs::FsWord::from(libc::CGROUP2_SUPER_MAGIC));
    if unified {
        any(metrics)
    } else {
        any(&legacy(metrics))
    }
}

fn any<M: MessageFull>(message: &M) -> Any {
    Any {
        type_url: M::descriptor().full_name().to_owned(),
        value: message.write_to_bytes().unwrap_or_default(),
        ..Any::default()
    }
}

/// The same in the terms of cgroup v1.
fn legacy(from: &Metrics) -> v1::Metrics {
    const NS_IN_US: u64 = 1_000;
    let mut to: v1::Metrics = filled();
    let pids = to.pids.mut_or_insert_default();
    pids.current = from.pids.current;
    // There it is zero that is no limit.
    pids.limit = Some(from.pids.limit)
        .filter(|limit| *limit != u64::MAX)
        .unwrap_or(0);
    let cpu = to.cpu.mut_or_insert_default();
    let usage = cpu.usage.mut_or_insert_default();
    usage.total = from.cpu.usage_usec.saturating_mul(NS_IN_US);
    usage.user = from.cpu.user_usec.saturating_mul(NS_IN_US);
    usage.kernel = from.cpu.system_usec.saturating_mul(NS_IN_US);
    let throttling = cpu.throttling.mut_or_insert_default();
    throttling.periods = from.cpu.nr_periods;
    throttling.throttled_periods = from.cpu.nr_throttled;
    throttling.throttled_time = from.cpu.throttled_usec.saturating_mul(NS_IN_US);
    to.memory = MessageField::some(memory(from));
    let oom = to.memory_oom_control.mut_or_insert_default();
    oom.oom_kill = from.memory_events.oom_kill;
    let blkio = to.blkio.mut_or_insert_default();
    for device in &from.io.usage {
        let entry = |op: &str, value| v1::BlkIOEntry {
            op: op.to_owned(),
            major: device.major,
            minor: device.minor,
            value,
            ..v1::BlkIOEntry::default()
        };
        let bytes = [entry("Read", device.rbytes), entry("Write", device.wbytes)];
        blkio.io_service_bytes_recursive.extend(bytes);
        let requests = [entry("Read", device.rios), entry("Write", device.wios)];
        blkio.io_serviced_recursive.extend(requests);
    }
    for pages in &from.hugetlb {
        to.hugetlb.push(v1::HugetlbStat {
            usage: pages.current,
            max: pages.max,
            failcnt: pages.failcnt,
            pagesize: pages.pagesize.clone(),
            ..v1::HugetlbStat::default()
        });
    }
    for interface in &from.network {
        to.network.push(v1::NetworkStat {
            name: interface.name.clone(),
            rx_bytes: interface.rx_bytes,
            rx_packets: interface.rx_packets,
            rx_errors: interface.rx_errors,
            rx_dropped: interface.rx_dropped,
            tx_bytes: interface.tx_bytes,
            tx_packets: interface.tx_packets,
            tx_errors: interface.tx_errors,
            tx_dropped: interface.tx_dropped,
            ..v1::NetworkStat::default()
        });
    }
    to
}

fn memory(metrics: &Metrics) -> v1::MemoryStat {
    let from = &metrics.memory;
    let limit = from.usage_limit.min(UNLIMITED);
    // v1 counts memory and swap together.
    let with_swap = |memory: u64, swap: u64| memory.saturating_add(swap).min(UNLIMITED);
    let swap_limit = with_swap(limit, from.swap_limit);
    let entry = |limit, usage, max, failcnt| {
        MessageField::some(v1::MemoryEntry {
            limit,
            usage,
            max,
            failcnt,
            ..v1::MemoryEntry::default()
        })
    };
    v1::MemoryStat {
        cache: from.file,
        rss: from.anon,
        rss_huge: from.anon_thp,
        mapped_file: from.file_mapped,
        dirty: from.file_dirty,
        writeback: from.file_writeback,
        pg_fault: from.pgfault,
        pg_maj_fault: from.pgmajfault,
        inactive_anon: from.inactive_anon,
        active_anon: from.active_anon,
        inactive_file: from.inactive_file,
        active_file: from.active_file,
        unevictable: from.unevictable,
        hierarchical_memory_limit: limit,
        hierarchical_swap_limit: swap_limit,
        // The guest's numbers are those of the whole tree.
        total_cache: from.file,
        total_rss: from.anon,
        total_rss_huge: from.anon_thp,
        total_mapped_file: from.file_mapped,
        total_dirty: from.file_dirty,
        total_writeback: from.file_writeback,
        total_pg_fault: from.pgfault,
        total_pg_maj_fault: from.pgmajfault,
        total_inactive_anon: from.inactive_anon,
        total_active_anon: from.active_anon,
        total_inactive_file: from.inactive_file,
        total_active_file: from.active_file,
        total_unevictable: from.unevictable,
        usage: entry(limit, from.usage, from.max_usage, metrics.memory_events.max),
        swap: entry(
            swap_limit,
            with_swap(from.usage, from.swap_usage),
            with_swap(from.max_usage, from.swap_max_usage),
            0,
        ),
        kernel: entry(UNLIMITED, from.kernel_stack.saturating_add(from.slab), 0, 0),
        kernel_tcp: entry(UNLIMITED, from.sock, 0, 0),
        ..v1::MemoryStat::default()
    }
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::protobuf::Message;

    use super::*;
    use crate::agent::stats;

    #[test]
    fn every_sub_message_is_present_ta_58() {
        let none = any(&legacy(&stats::none()));
        assert_eq!(none.type_url, "io.containerd.cgroups.v1.Metrics");
        let metrics = v1::Metrics::parse_from_bytes(&none.value).unwrap();
        assert!(metrics.cpu.usage.is_some() && metrics.cpu.throttling.is_some());
        assert!(metrics.pids.is_some() && metrics.memory_oom_control.is_some());
        let memory = metrics.memory.unwrap();
        assert!(memory.usage.is_some() && memory.swap.is_some());
        assert!(memory.kernel.is_some() && memory.kernel_tcp.is_some());
        let none = any(&stats::none());
        assert_eq!(none.type_url, "io.containerd.cgroups.v2.Metrics");
        let metrics = Metrics::parse_from_bytes(&none.value).unwrap();
        assert!(metrics.memory_events.is_some() && metrics.io.is_some());
        assert!(metrics.cpu.psi.some.is_some() && metrics.memory.psi.full.is_some());
    }

    #[test]
    fn an_old_hosts_readers_see_the_same_numbers_in_their_units_ta_61() {
        let mut from = stats::none();
        from.pids.mut_or_insert_default().limit = u64::MAX;
        from.cpu.mut_or_insert_default().usage_usec = 3;
        from.memory_events.mut_or_insert_default().oom_kill = 2;
        let memory = from.memory.mut_or_insert_default();
        (memory.usage, memory.usage_limit) = (100, 1_000);
        (memory.swap_usage, memory.swap_limit) = (10, u64::MAX);
        (memory.inactive_file, memory.anon) = (30, 40);
        let to = legacy(&from);
        assert_eq!((to.pids.limit, to.cpu.usage.total), (0, 3_000));
        assert_eq!(to.memory_oom_control.oom_kill, 2);
        let memory = &to.memory;
        assert_eq!((memory.usage.usage, memory.usage.limit), (100, 1_000));
        assert_eq!((memory.swap.usage, memory.swap.limit), (110, UNLIMITED));
        assert_eq!((memory.total_inactive_file, memory.rss), (30, 40));
        assert!(memory.swap.limit > 1 << 62);
    }
}
