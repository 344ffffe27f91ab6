//! `linux.resources` as files of cgroup v2 and device rules.
//!
//! Owns the conversion from the specification's cgroup v1 terms. Limits whose
//! object is on the host (block devices by number, RDMA, v1 network classes)
//! are refused, not dropped.

use super::{
    SpecError, oci,
    plan::{Absent, DeviceKind, DeviceRule, Resources, Setting},
};

/// Checks `linux.resources`.
pub(super) fn resources(from: oci::Resources) -> Result<Resources, SpecError> {
    refuse_what_is_on_the_host(&from)?;
    let mut settings = Settings::default();
    memory(&mut settings, &from.memory)?;
    cpu(&mut settings, from.cpu)?;
    pids(&mut settings, from.pids);
    block_io(&mut settings, &from.block_io)?;
    for (n, limit) in from.hugepage_limits.into_iter().enumerate() {
        hugepages(&mut settings, n, &limit)?;
    }
    for (file, value) in from.unified {
        unified(&mut settings, file, value)?;
    }
    let devices = from
        .devices
        .into_iter()
        .enumerate()
        .map(|(n, rule)| device_rule(n, &rule))
        .collect::<Result<_, _>>()?;
    Ok(Resources {
        settings: settings.0,
        devices,
    })
}

#[derive(Default)]
struct Settings(Vec<Setting>);

impl Settings {
    #[expect(
        clippy::needless_pass_by_value,
        reason = "numbers and texts that were just made"
    )]
    fn add(&mut self, file: &str, value: impl ToString) {
        self.push(file.to_owned(), value.to_string(), Absent::Refused);
    }

    fn push(&mut self, file: String, value: String, absent: Absent) {
        self.0.push(Setting {
            file,
            value,
            absent,
        });
    }
}

fn refuse_what_is_on_the_host(from: &oci::Resources) -> Result<(), SpecError> {
    let io = &from.block_io;
    let lists = [
        ("blockIO.weightDevice", io.weight_device.len()),
        (
            "blockIO.throttleReadBpsDevice",
            io.throttle_read_bps_device.len(),
        ),
        (
            "blockIO.throttleWriteBpsDevice",
            io.throttle_write_bps_device.len(),
        ),
        (
            "blockIO.throttleReadIOPSDevice",
            io.throttle_read_iops_device.len(),
        ),
        (
            "blockIO.throttleWriteIOPSDevice",
            io.throttle_write_iops_device.len(),
        ),
        ("rdma", from.rdma.len()),
        ("network.priorities", from.network.priorities.len()),
        (
            "network.classID",
            usize::from(from.network.class_id.is_some_and(|id| id != 0)),
        ),
    ];
    for (name, entries) in lists {
        if entries > 0 {
            return Err(SpecError::value(
                format!("linux.resources.{name}"),
                format!("{entries} entries"),
                "it limits something of the host that a virtual machine does not see",
            ));
        }
    }
    Ok(())
}

/// A limit in bytes as v2 writes it; 0 is "not set", negative "no limit".
fn bytes(limit: i64) -> String {
    if limit < 0 {
        "max".to_owned()
    } else {
        limit.to_string()
    }
}

fn memory(to: &mut Settings, from: &oci::Memory) -> Result<(), SpecError> {
    if from.disable_oom_killer == Some(true) {
        return Err(SpecError::value(
            "linux.resources.memory.disableOOMKiller",
            true,
            "cgroup v2 cannot do without the OOM killer",
        ));
    }
    let limit = from.limit.unwrap_or(0);
    let swap = from.swap.unwrap_or(0);
    if limit != 0 {
        to.add("memory.max", bytes(limit));
    }
    if swap != 0 {
        // v1 counts memory and swap together, v2 swap alone.
        let value = match (swap, limit) {
            (..0, _) | (_, ..0) => "max".to_owned(),
            (_, 0) => return Err(swap_value(swap, "it needs memory.limit")),
            _ if swap < limit => return Err(swap_value(swap, "it is below memory.limit")),
            _ => (swap - limit).to_string(),
        };
        to.push("memory.swap.max".into(), value, Absent::Kept);
    }
    if let Some(reservation) = from.reservation.filter(|&value| value != 0) {
        to.add("memory.low", bytes(reservation));
    }
    Ok(())
}

fn swap_value(swap: i64, reason: &'static str) -> SpecError {
    SpecError::value("linux.resources.memory.swap", swap, reason)
}

fn cpu(to: &mut Settings, from: oci::Cpu) -> Result<(), SpecError> {
    if from.realtime_runtime.unwrap_or(0) != 0 || from.realtime_period.unwrap_or(0) != 0 {
        return Err(SpecError::value(
            "linux.resources.cpu.realtimeRuntime",
            from.realtime_runtime.unwrap_or(0),
            "cgroup v2 has no limit for real-time tasks",
        ));
    }
    if let Some(shares) = from.shares.filter(|&value| value != 0) {
        to.add("cpu.weight", weight(shares));
    }
    if let Some(idle) = from.idle {
        to.add("cpu.idle", idle);
    }
    // The burst has to fit in the quota that is in force when it is written.
    if from.quota.unwrap_or(0) != 0 || from.period.unwrap_or(0) != 0 {
        let quota = match from.quota {
            Some(quota @ 1..) => quota.to_string(),
            _ => "max".to_owned(),
        };
        let period_us = from.period.filter(|&value| value != 0).unwrap_or(100_000);
        to.add("cpu.max", format!("{quota} {period_us}"));
    }
    if let Some(burst) = from.burst {
        to.add("cpu.max.burst", burst);
    }
    for (file, value) in [("cpuset.cpus", from.cpus), ("cpuset.mems", from.mems)] {
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            to.add(file, value);
        }
    }
    Ok(())
}

/// v1 shares 2…262144 as v2 weight 1…10000, on a straight line.
fn weight(shares: u64) -> u64 {
    let shares = shares.clamp(2, 262_144);
    1 + ((shares - 2) * 9_999) / 262_142
}

fn pids(to: &mut Settings, from: Option<oci::Pids>) {
    match from.and_then(|pids| pids.limit) {
        None | Some(0) => {}
        Some(limit) => to.add("pids.max", bytes(limit)),
    }
}

fn block_io(to: &mut Settings, from: &oci::BlockIo) -> Result<(), SpecError> {
    match from.weight {
        None | Some(0) => Ok(()),
        Some(weight @ 10..=1_000) => {
            // v1's 10…1000 as v2's 1…10000.
            let weight = 1 + (u32::from(weight) - 10) * 9_999 / 990;
            to.add("io.weight", format!("default {weight}"));
            Ok(())
        }
        Some(weight) => Err(SpecError::value(
            "linux.resources.blockIO.weight",
            weight,
            "it must be between 10 and 1000",
        )),
    }
}

fn hugepages(to: &mut Settings, n: usize, from: &oci::HugepageLimit) -> Result<(), SpecError> {
    let digits = from
        .page_size
        .trim_end_matches("B")
        .trim_end_matches(['K', 'M', 'G']);
    let well_formed = from.page_size.ends_with("B")
        && !digits.is_empty()
        && digits.bytes().all(|byte| byte.is_ascii_digit());
    if !well_formed {
        return Err(SpecError::value(
            format!("linux.resources.hugepageLimits[{n}].pageSize"),
            &from.page_size,
            "it must be a size as 2MB",
        ));
    }
    let file = format!("hugetlb.{}.max", from.page_size);
    to.push(file, from.limit.to_string(), Absent::Kept);
    Ok(())
}

fn unified(to: &mut Settings, file: String, value: String) -> Result<(), SpecError> {
    let field = || format!("linux.resources.unified.{file}");
    let plain = file.contains('.')
        && file
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
    if !plain {
        return Err(SpecError::value(
            field(),
            value,
            "the name is not one of a cgroup file",
        ));
    }
    if file.starts_with("cgroup.") {
        return Err(SpecError::value(
            field(),
            value,
            "the agent alone writes cgroup.* files",
        ));
    }
    to.push(file, value, Absent::Refused);
    Ok(())
}

fn device_rule(n: usize, from: &oci::DeviceRule) -> Result<DeviceRule, SpecError> {
    let field = |name| format!("linux.resources.devices[{n}].{name}");
    let kind = match from.kind.as_deref() {
        None | Some("" | "a") => None,
        Some("b") => Some(DeviceKind::Block),
        Some("c" | "u") => Some(DeviceKind::Char),
        Some(other) => {
            return Err(SpecError::value(
                field("type"),
                other,
                "it must be a, b or c",
            ));
        }
    };
    let number = |name, value: Option<i64>| match value {
        None | Some(-1) => Ok(None),
        Some(value) => u32::try_from(value)
            .map(Some)
            .map_err(|_| SpecError::value(field(name), value, "it is not a device number")),
    };
    let mut access = 0;
    for letter in from
        .access
        .as_deref()
        .filter(|text| !text.is_empty())
        .unwrap_or("rwm")
        .chars()
    {
        access |= match letter {
            'r' => DeviceRule::READ,
            'w' => DeviceRule::WRITE,
            'm' => DeviceRule::MKNOD,
            _ => {
                return Err(SpecError::value(
                    field("access"),
                    letter,
                    "it must be r, w or m",
                ));
            }
        };
    }
    Ok(DeviceRule {
        allow: from.allow,
        kind,
        major: number("major", from.major)?,
        minor: number("minor", from.minor)?,
        access,
    })
}
