//! `linux.resources` for a container that exists already.
//!
//! The conversion is that of a creation; this file owns what differs. What a request
//! does not name stays as it is, also where cgroup v2 has one file for two of its
//! members. And what would be more than the machine has is no limit at all, so it is
//! told apart for the caller to refuse.

use crate::spec::{Checked, Error, Note, oci, plan::Setting, resources};

/// Limits that hold now, as the files of the cgroup tell them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InForce {
    /// Bytes of memory; `None` without a limit.
    pub memory: Option<u64>,
    /// Microseconds of processor time in a period; `None` without a limit.
    pub quota: Option<u64>,
    /// The period in microseconds.
    pub period: u64,
}

/// What will be done to a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Update {
    /// Files to write in order.
    pub settings: Vec<Setting>,
    /// The most memory in bytes, if it becomes more than it was.
    pub more_memory: Option<u64>,
    /// The most processors, in thousandths, if they become more than they were.
    pub more_processors: Option<u64>,
    /// The most memory in bytes, if that shall be refused where more is in use.
    pub not_in_use: Option<u64>,
}

/// Checks `linux.resources` for a container with the limits `now`.
pub fn update(mut from: oci::Resources, now: InForce) -> Result<Checked<Update>, Error> {
    let mut notes = Vec::new();
    if !from.devices.is_empty() {
        from.devices.clear();
        notes.push(Note::ignored(
            "linux.resources.devices",
            "a container keeps the rules that it was created with",
        ));
    }
    let (memory, cpu) = (&mut from.memory, &mut from.cpu);
    let limit = u64::try_from(memory.limit).ok().filter(|limit| *limit > 0);
    if memory.swap != 0 && memory.limit == 0 {
        memory.limit = signed(now.memory);
    }
    if cpu.quota != 0 || cpu.period != 0 {
        if cpu.period == 0 {
            cpu.period = now.period;
        }
        if cpu.quota == 0 {
            cpu.quota = signed(now.quota);
        }
    }
    let quota = u64::try_from(cpu.quota).ok().filter(|quota| *quota > 0);
    let share = |quota: u64, period: u64| quota.saturating_mul(1_000) / period.max(1);
    let asked = quota.map(|quota| share(quota, cpu.period));
    let given = now.quota.map(|quota| share(quota, now.period));
    let not_in_use = limit.filter(|_| memory.check_before_update);
    let raises = grows(limit, now.memory) || memory.limit < 0;
    let mut settings = resources::resources(from, &mut notes)?.settings;
    if raises {
        swap_first(&mut settings);
    }
    let plan = Update {
        settings,
        more_memory: limit.filter(|_| grows(limit, now.memory)),
        more_processors: asked.filter(|_| grows(asked, given)),
        not_in_use,
    };
    Ok(Checked { plan, notes })
}

/// A limit as the specification writes it.
fn signed(limit: Option<u64>) -> i64 {
    limit.map_or(-1, |limit| i64::try_from(limit).unwrap_or(i64::MAX))
}

/// Whether `asked` is a limit beyond the one there is. Where there is none, only the
/// machine was the limit.
fn grows(asked: Option<u64>, now: Option<u64>) -> bool {
    match (asked, now) {
        (Some(asked), Some(now)) => asked > now,
        (Some(_), None) => true,
        (None, _) => false,
    }
}

/// Whoever gets more memory gets the swap for it first, so that the sum is at no moment
/// below what it was; whoever gets less loses memory first.
fn swap_first(settings: &mut [Setting]) {
    let place = |file: &str| settings.iter().position(|setting| setting.file == file);
    if let (Some(memory), Some(swap)) = (place("memory.max"), place("memory.swap.max"))
        && memory < swap
    {
        settings.swap(memory, swap);
    }
}
