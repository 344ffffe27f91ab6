//! `linux.resources` as files of cgroup v2 and device rules.
//!
//! Owns the conversion from the specification's cgroup v1 terms. Limits whose
//! object is on the host (block devices by number, RDMA, v1 network classes) are
//! left out with a note.

use crate::spec::{
    Error, Note, oci,
    plan::{Absent, DeviceKind, DeviceRule, Resources, Setting},
};

/// Smallest memory limit that lets any program start, in bytes.
const MEMORY_MIN: i64 = 1 << 20;
/// Shortest quota and period, in microseconds.
const CPU_TIME_MIN: u64 = 1_000;
/// Longest period, in microseconds.
const PERIOD_MAX: u64 = 1_000_000;
/// Period unless one is given, in microseconds.
const PERIOD: u64 = 100_000;
/// Most device rules.
const RULES_MAX: usize = 1_024;
/// Most files of cgroup v2.
const UNIFIED_MAX: usize = 256;

/// Checks `linux.resources`.
pub(crate) fn resources(from: oci::Resources, notes: &mut Vec<Note>) -> Result<Resources, Error> {
    leave_out(&from, notes);
    let mut settings = Settings::default();
    memory(&mut settings, &from.memory)?;
    cpu(&mut settings, &from.cpu)?;
    pids(&mut settings, &from.pids);
    block_io(&mut settings, &from.block_io)?;
    for (n, limit) in from.hugepage_limits.iter().enumerate() {
        hugepages(&mut settings, n, limit)?;
    }
    if from.unified.len() > UNIFIED_MAX {
        let field = "linux.resources.unified";
        return Err(Error::too_many(field, from.unified.len(), UNIFIED_MAX));
    }
    for (file, value) in from.unified {
        unified(&mut settings, &file, &value, notes)?;
    }
    if from.devices.len() > RULES_MAX {
        let field = "linux.resources.devices";
        return Err(Error::too_many(field, from.devices.len(), RULES_MAX));
    }
    let devices = from
        .devices
        .iter()
        .enumerate()
        .map(|(n, rule)| device_rule(n, rule))
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
        self.push(file, value.to_string(), Absent::Refused);
    }

    fn push(&mut self, file: &str, value: String, absent: Absent) {
        self.0.push(Setting {
            file: file.to_owned(),
            value,
            absent,
        });
    }
}

fn leave_out(from: &oci::Resources, notes: &mut Vec<Note>) {
    let (io, cpu) = (&from.block_io, &from.cpu);
    let the_host = "it belongs to the host";
    let other_devices = "the guest has other devices";
    let own_numbers = "the guest numbers its own";
    let not_in_v2 = "cgroup v2 has no such thing";
    let fields = [
        ("rdma", !from.rdma.is_empty(), the_host),
        ("network.classID", from.network.class_id != 0, the_host),
        (
            "network.priorities",
            !from.network.priorities.is_empty(),
            the_host,
        ),
        ("cpu.cpus", !cpu.cpus.is_empty(), own_numbers),
        ("cpu.mems", !cpu.mems.is_empty(), own_numbers),
        ("cpu.realtimeRuntime", cpu.realtime_runtime != 0, not_in_v2),
        ("cpu.realtimePeriod", cpu.realtime_period != 0, not_in_v2),
        (
            "memory.disableOOMKiller",
            from.memory.disable_oom_killer,
            not_in_v2,
        ),
        (
            "blockIO.weightDevice",
            !io.weight_device.is_empty(),
            other_devices,
        ),
        (
            "blockIO.throttleReadBpsDevice",
            !io.throttle_read_bps_device.is_empty(),
            other_devices,
        ),
        (
            "blockIO.throttleWriteBpsDevice",
            !io.throttle_write_bps_device.is_empty(),
            other_devices,
        ),
        (
            "blockIO.throttleReadIOPSDevice",
            !io.throttle_read_iops_device.is_empty(),
            other_devices,
        ),
        (
            "blockIO.throttleWriteIOPSDevice",
            !io.throttle_write_iops_device.is_empty(),
            other_devices,
        ),
    ];
    for (name, set, why) in fields {
        if set {
            let field = format!("linux.resources.{name}");
            notes.push(match why == own_numbers {
                true => Note::ignored(field, why),
                false => Note::missing(field, why),
            });
        }
    }
}

/// A limit in bytes as v2 writes it: −1 is "no limit".
fn bytes(limit: i64) -> String {
    if limit < 0 {
        "max".to_owned()
    } else {
        limit.to_string()
    }
}

fn memory(to: &mut Settings, from: &oci::Memory) -> Result<(), Error> {
    let field = |name: &str| format!("linux.resources.memory.{name}");
    for (name, value) in [
        ("limit", from.limit),
        ("reservation", from.reservation),
        ("swap", from.swap),
    ] {
        if value < -1 {
            let reason = "it must be a number of bytes, or -1 for no limit";
            return Err(Error::new(field(name), value, reason));
        }
    }
    if (1..MEMORY_MIN).contains(&from.limit) {
        let reason = "less than 1 MiB cannot hold a program";
        return Err(Error::new(field("limit"), from.limit, reason));
    }
    if from.limit != 0 {
        to.add("memory.max", bytes(from.limit));
    }
    // v1 counts memory and swap together, v2 swap alone.
    let swap = match (from.swap, from.limit) {
        (0, -1) | (-1, _) => Some("max".to_owned()),
        (0, _) => None,
        (swap, 0 | -1) => {
            let reason = "it needs a memory.limit";
            return Err(Error::new(field("swap"), swap, reason));
        }
        (swap, limit) if swap < limit => {
            let reason = "it counts memory too, and is below memory.limit";
            return Err(Error::new(field("swap"), swap, reason));
        }
        (swap, limit) => Some((swap - limit).to_string()),
    };
    if let Some(swap) = swap {
        to.push("memory.swap.max", swap, Absent::Kept);
    }
    if from.reservation != 0 {
        to.add("memory.low", bytes(from.reservation));
    }
    Ok(())
}

fn cpu(to: &mut Settings, from: &oci::Cpu) -> Result<(), Error> {
    let field = |name: &str| format!("linux.resources.cpu.{name}");
    if from.shares != 0 {
        to.add("cpu.weight", weight(from.shares));
    }
    match from.idle {
        None => {}
        Some(idle @ (0 | 1)) => to.add("cpu.idle", idle),
        Some(idle) => return Err(Error::new(field("idle"), idle, "it must be 0 or 1")),
    }
    let period = match from.period {
        0 => PERIOD,
        CPU_TIME_MIN..=PERIOD_MAX => from.period,
        period => {
            let reason = "it must lie between 1000 and 1000000 µs";
            return Err(Error::new(field("period"), period, reason));
        }
    };
    let quota = u64::try_from(from.quota).ok().filter(|quota| *quota != 0);
    if let Some(quota @ ..CPU_TIME_MIN) = quota {
        return Err(Error::new(
            field("quota"),
            quota,
            "it is shorter than 1000 µs",
        ));
    }
    // The burst has to fit in the quota that is in force when it is written.
    if from.quota != 0 || from.period != 0 {
        let quota = quota.map_or_else(|| "max".to_owned(), |quota| quota.to_string());
        to.add("cpu.max", format!("{quota} {period}"));
    }
    if let Some(burst) = from.burst {
        if quota.is_some_and(|quota| burst > quota) {
            return Err(Error::new(field("burst"), burst, "it exceeds the quota"));
        }
        to.add("cpu.max.burst", burst);
    }
    Ok(())
}

/// v1 shares 2…262144 as v2 weight 1…10000. A curve through the least, the default
/// (1024 is 100) and the greatest value, as other runtimes have it by now.
fn weight(shares: u64) -> u64 {
    const LEAST: u64 = 2;
    const GREATEST: u64 = 262_144;
    // Below the rounding error of the exponent; no weight is that near to the next.
    const ERROR: f64 = 1e-9;
    if shares <= LEAST {
        return 1;
    }
    if shares >= GREATEST {
        return 10_000;
    }
    #[expect(clippy::cast_precision_loss, reason = "at most 18 bits")]
    let log = (shares as f64).log2();
    let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 1 and 10000"
    )]
    let weight = (10_f64.powf(exponent) - ERROR).ceil() as u64;
    weight.clamp(1, 10_000)
}

fn pids(to: &mut Settings, from: &oci::Pids) {
    match from.limit {
        None => {}
        Some(..0) => to.add("pids.max", "max"),
        // The container's first process is there already: both mean "no further".
        Some(0) => to.add("pids.max", 1),
        Some(limit) => to.add("pids.max", limit),
    }
}

fn block_io(to: &mut Settings, from: &oci::BlockIo) -> Result<(), Error> {
    match from.weight {
        0 => Ok(()),
        weight @ 10..=1_000 => {
            // v1's 10…1000 as v2's 1…10000.
            let weight = 1 + (u32::from(weight) - 10) * 9_999 / 990;
            to.add("io.weight", format!("default {weight}"));
            Ok(())
        }
        weight => Err(Error::new(
            "linux.resources.blockIO.weight",
            weight,
            "it must lie between 10 and 1000",
        )),
    }
}

fn hugepages(to: &mut Settings, n: usize, from: &oci::HugepageLimit) -> Result<(), Error> {
    let digits = ["KB", "MB", "GB"]
        .iter()
        .find_map(|unit| from.page_size.strip_suffix(unit));
    let well_formed = digits.is_some_and(|digits| {
        !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
    });
    if !well_formed {
        return Err(Error::new(
            format!("linux.resources.hugepageLimits[{n}].pageSize"),
            &from.page_size,
            "it must be a size such as 2MB",
        ));
    }
    // A guest without pages of that size gives none: that keeps a limit of 0 only.
    let absent = if from.limit == 0 {
        Absent::Kept
    } else {
        Absent::Refused
    };
    let (size, limit) = (&from.page_size, from.limit.to_string());
    to.push(&format!("hugetlb.{size}.max"), limit.clone(), absent);
    // Else pages that are only reserved would escape the limit.
    to.push(&format!("hugetlb.{size}.rsvd.max"), limit, Absent::Kept);
    Ok(())
}

/// The files of cgroup v2 that limit something, by controller. In the names of huge
/// pages' files the size stands between.
const FILES: [(&str, &[&str]); 8] = [
    (
        "cpu",
        &[
            "idle",
            "max",
            "max.burst",
            "pressure",
            "uclamp.max",
            "uclamp.min",
            "weight",
            "weight.nice",
        ],
    ),
    (
        "cpuset",
        &["cpus", "cpus.exclusive", "cpus.partition", "mems"],
    ),
    ("hugetlb", &["max", "rsvd.max"]),
    (
        "io",
        &[
            "bfq.weight",
            "latency",
            "max",
            "pressure",
            "prio.class",
            "weight",
        ],
    ),
    (
        "memory",
        &[
            "high",
            "low",
            "max",
            "min",
            "oom.group",
            "pressure",
            "reclaim",
            "swap.high",
            "swap.max",
            "zswap.max",
            "zswap.writeback",
        ],
    ),
    ("misc", &["max"]),
    ("pids", &["max"]),
    ("rdma", &["max"]),
];

fn unified(to: &mut Settings, file: &str, value: &str, notes: &mut Vec<Note>) -> Result<(), Error> {
    let refuse = |reason: &str| {
        let field = format!("linux.resources.unified.{}", file.escape_debug());
        Error::new(field, value, reason)
    };
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.');
    let parts = file
        .split_once('.')
        .filter(|(_, name)| !name.is_empty() && !name.starts_with('.') && file.bytes().all(plain));
    let Some((controller, name)) = parts else {
        return Err(refuse("the name is not one of a cgroup file"));
    };
    if controller == "cgroup" {
        return Err(refuse("the agent alone writes cgroup.* files"));
    }
    let mut leave_out = |why: &str| {
        let field = format!("linux.resources.unified.{}", file.escape_debug());
        notes.push(Note::missing(field, why));
        Ok(())
    };
    let Some((_, names)) = FILES.iter().find(|(known, _)| *known == controller) else {
        return leave_out("cgroup v2 has no such controller");
    };
    let name = match (controller, name.split_once('.')) {
        ("hugetlb", Some((size, name))) if size.bytes().all(|b| b.is_ascii_alphanumeric()) => name,
        _ => name,
    };
    if !names.contains(&name) {
        return leave_out("the controller has no such file");
    }
    // The kernel takes one line at a time.
    for line in value.lines() {
        to.push(file, line.to_owned(), Absent::Refused);
    }
    Ok(())
}

/// Whether the rules of the device controller allow everything: that is how engines
/// write a privileged container. The last rule on all devices decides.
pub(crate) fn allows_every_device(rules: &[oci::DeviceRule]) -> bool {
    let any = |number: Option<i64>| matches!(number, None | Some(-1));
    let on_all = |rule: &&oci::DeviceRule| {
        let access = rule.access.as_str();
        matches!(rule.kind.as_str(), "" | "a")
            && any(rule.major)
            && any(rule.minor)
            && (access.is_empty() || "rwm".chars().all(|letter| access.contains(letter)))
    };
    rules
        .iter()
        .rev()
        .find(on_all)
        .is_some_and(|rule| rule.allow)
}

fn device_rule(n: usize, from: &oci::DeviceRule) -> Result<DeviceRule, Error> {
    let field = |name| format!("linux.resources.devices[{n}].{name}");
    let kind = match from.kind.as_str() {
        "" | "a" => None,
        "b" => Some(DeviceKind::Block),
        "c" | "u" => Some(DeviceKind::Char),
        other => return Err(Error::new(field("type"), other, "it must be a, b or c")),
    };
    let number = |name, value: Option<i64>| match value {
        None | Some(-1) => Ok(None),
        Some(value) => u32::try_from(value)
            .map(Some)
            .map_err(|_| Error::new(field(name), value, "it is not a device number")),
    };
    let letters = Some(from.access.as_str()).filter(|text| !text.is_empty());
    let mut access = 0;
    for letter in letters.unwrap_or("rwm").chars() {
        access |= match letter {
            'r' => DeviceRule::READ,
            'w' => DeviceRule::WRITE,
            'm' => DeviceRule::MKNOD,
            _ => {
                let reason = "its letters must be r, w or m";
                return Err(Error::new(field("access"), &from.access, reason));
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
