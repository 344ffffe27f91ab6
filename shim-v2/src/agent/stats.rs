//! What a guest says that a container has used, as containerd's message for cgroup v2.
//!
//! Fields of that message are called like the keys in the kernel's files, so numbers
//! find their places by name and what has no place is dropped. Lists are cut, names
//! escaped, and percents are percents. Every sub-message is there, for readers
//! dereference them.

use std::collections::HashMap;

use bulkhead_agent_api::agent::{Pressure, Stall, StatsResponse};
use containerd_shim_protos::{
    cgroups_v2::metrics::{
        CPUStat, HugeTlbStat, IOEntry, MemoryEvents, MemoryStat, Metrics, NetworkStat, PSIData,
        PSIStats,
    },
    protobuf::{
        MessageDyn, MessageField, MessageFull,
        reflect::{ReflectValueBox, RuntimeFieldType, RuntimeType},
    },
};

use super::escape;

/// Most devices, sizes of pages and interfaces that are taken from the guest.
const LIST: usize = 64;
/// Longest name that is taken from the guest, in characters.
const NAME: usize = 32;

/// What nothing has used: every sub-message, with zeros.
#[must_use]
pub fn none() -> Metrics {
    filled()
}

/// A message with every sub-message in it.
pub(crate) fn filled<M: MessageFull>() -> M {
    let mut message = M::new();
    fill(&mut message);
    message
}

fn fill(message: &mut dyn MessageDyn) {
    for field in message.descriptor_dyn().fields() {
        if let RuntimeFieldType::Singular(RuntimeType::Message(_)) = field.runtime_field_type() {
            fill(field.mut_message(message));
        }
    }
}

/// What has been used later counts on from what was used before: a counter of
/// processor time never goes back.
#[must_use]
pub fn after(before: &Metrics, mut now: Metrics) -> Metrics {
    let (before, cpu) = (&before.cpu, now.cpu.mut_or_insert_default());
    cpu.usage_usec = cpu.usage_usec.max(before.usage_usec);
    cpu.user_usec = cpu.user_usec.max(before.user_usec);
    cpu.system_usec = cpu.system_usec.max(before.system_usec);
    now
}

/// Takes what the guest says.
pub(super) fn of(said: &StatsResponse) -> Metrics {
    let mut metrics = none();
    let cpu: CPUStat = place(&said.cpu);
    metrics.cpu = MessageField::some(CPUStat {
        psi: pressure(&said.cpu_pressure),
        ..cpu
    });
    metrics.memory = MessageField::some(memory(said));
    let events: MemoryEvents = place(&said.memory_events);
    metrics.memory_events = MessageField::some(events);
    let pids = metrics.pids.mut_or_insert_default();
    (pids.current, pids.limit) = (said.pids.current, said.pids.limit);
    let io = metrics.io.mut_or_insert_default();
    io.psi = pressure(&said.io_pressure);
    for device in said.devices.iter().take(LIST) {
        let entry: IOEntry = place(&device.counters);
        io.usage.push(IOEntry {
            major: device.major.into(),
            minor: device.minor.into(),
            ..entry
        });
    }
    for pages in said.huge_pages.iter().take(LIST) {
        metrics.hugetlb.push(HugeTlbStat {
            current: pages.amount.current,
            max: pages.amount.limit,
            pagesize: name(&pages.size),
            failcnt: pages.refused,
            ..HugeTlbStat::default()
        });
    }
    for interface in said.interfaces.iter().take(LIST) {
        metrics.network.push(NetworkStat {
            name: name(&interface.name),
            rx_bytes: interface.rx_bytes,
            rx_packets: interface.rx_packets,
            rx_errors: interface.rx_errors,
            rx_dropped: interface.rx_dropped,
            tx_bytes: interface.tx_bytes,
            tx_packets: interface.tx_packets,
            tx_errors: interface.tx_errors,
            tx_dropped: interface.tx_dropped,
            ..NetworkStat::default()
        });
    }
    metrics
}

fn memory(said: &StatsResponse) -> MemoryStat {
    let memory: MemoryStat = place(&said.memory);
    let (used, swap) = (&said.memory_use, &said.swap_use);
    // The kernel counts these apart for programs' memory and for files by now.
    let both = |key: &str| {
        let part = |of: &str| said.memory.get(&format!("{key}_{of}")).copied();
        part("anon")
            .unwrap_or(0)
            .saturating_add(part("file").unwrap_or(0))
    };
    MemoryStat {
        workingset_refault: memory.workingset_refault.max(both("workingset_refault")),
        workingset_activate: memory.workingset_activate.max(both("workingset_activate")),
        usage: used.current,
        usage_limit: used.limit,
        max_usage: used.peak,
        swap_usage: swap.current,
        swap_limit: swap.limit,
        swap_max_usage: swap.peak,
        psi: pressure(&said.memory_pressure),
        ..memory
    }
}

/// A message whose numbers are found by the names of its fields.
fn place<M: MessageFull>(numbers: &HashMap<String, u64>) -> M {
    let mut message = M::new();
    for field in message.descriptor_dyn().fields() {
        if let RuntimeFieldType::Singular(RuntimeType::U64) = field.runtime_field_type()
            && let Some(number) = numbers.get(field.name())
        {
            field.set_singular_field(&mut message, ReflectValueBox::U64(*number));
        }
    }
    message
}

fn pressure(said: &Pressure) -> MessageField<PSIStats> {
    let stall = |said: &Stall| {
        let percent = |value: f64| match value.is_nan() {
            true => 0.0,
            false => value.clamp(0.0, 100.0),
        };
        MessageField::some(PSIData {
            avg10: percent(said.avg10),
            avg60: percent(said.avg60),
            avg300: percent(said.avg300),
            total: said.total,
            ..PSIData::default()
        })
    };
    MessageField::some(PSIStats {
        some: stall(&said.some),
        full: stall(&said.full),
        ..PSIStats::default()
    })
}

fn name(text: &str) -> String {
    escape(text).chars().take(NAME).collect()
}

#[cfg(test)]
mod tests {
    use bulkhead_agent_api::agent::{Amount, Device, Interface};
    use containerd_shim_protos::protobuf::Message;

    use super::*;

    fn numbers<const N: usize>(numbers: [(&str, u64); N]) -> HashMap<String, u64> {
        numbers.map(|(key, number)| (key.to_owned(), number)).into()
    }

    #[test]
    fn numbers_find_their_places_by_the_kernels_names_ta_60() {
        let metrics = of(&StatsResponse {
            cpu: numbers([("usage_usec", 9), ("system_usec", 4), ("nr_throttled", 2)]),
            memory: numbers([
                ("anon", 5),
                ("inactive_file", 6),
                ("workingset_refault_anon", 1),
                ("workingset_refault_file", 2),
                ("usage", 99),
            ]),
            memory_events: numbers([("oom_kill", 3)]),
            memory_use: MessageField::some(Amount {
                current: 7,
                limit: u64::MAX,
                peak: 8,
                ..Amount::default()
            }),
            devices: vec![Device {
                major: 254,
                counters: numbers([("wbytes", 10), ("major", 1)]),
                ..Device::default()
            }],
            ..StatsResponse::default()
        });
        assert_eq!((metrics.cpu.usage_usec, metrics.cpu.nr_throttled), (9, 2));
        let memory = &metrics.memory;
        assert_eq!((memory.anon, memory.inactive_file), (5, 6));
        assert_eq!((memory.usage, memory.usage_limit), (7, u64::MAX));
        assert_eq!((memory.max_usage, memory.workingset_refault), (8, 3));
        assert_eq!(metrics.memory_events.oom_kill, 3);
        assert_eq!(
            (metrics.io.usage[0].major, metrics.io.usage[0].wbytes),
            (254, 10)
        );
    }

    #[test]
    fn a_guest_cannot_say_what_no_kernel_says_b74() {
        let mut said = StatsResponse::default();
        for number in 0..100_000_u64 {
            said.memory.insert(number.to_string(), number);
        }
        said.cpu_pressure = MessageField::some(Pressure {
            some: MessageField::some(Stall {
                avg10: f64::NAN,
                avg60: f64::INFINITY,
                avg300: -1.0,
                ..Stall::default()
            }),
            ..Pressure::default()
        });
        said.interfaces = vec![
            Interface {
                name: "\u{1b}[2J".repeat(100),
                ..Interface::default()
            };
            1_000
        ];
        let metrics = of(&said);
        let stall = &metrics.cpu.psi.some;
        assert_eq!((stall.avg10, stall.avg60, stall.avg300), (0.0, 100.0, 0.0));
        assert_eq!(metrics.network.len(), LIST);
        let name = &metrics.network[0].name;
        assert!(name.len() <= NAME && !name.contains('\u{1b}'), "{name}");
        assert!(metrics.write_to_bytes().unwrap().len() < 8 << 10);
    }

    #[test]
    fn processor_time_never_goes_back_ta_62() {
        let at = |usage| {
            of(&StatsResponse {
                cpu: numbers([("usage_usec", usage), ("user_usec", usage)]),
                ..StatsResponse::default()
            })
        };
        assert_eq!(after(&at(5), at(7)).cpu.usage_usec, 7);
        let back = after(&at(7), at(5));
        assert_eq!((back.cpu.usage_usec, back.cpu.user_usec), (7, 7));
    }
}
