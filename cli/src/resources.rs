//! Verbs on what a container may use and has used: `pause`, `resume`, `update`, `stats`.

use std::path::Path;

use bulkhead_client::{ContainerId, Record, Task, paths, record, state::connect};
use containerd_shim_protos::{
    cgroups::metrics as v1,
    cgroups_v2::metrics as v2,
    protobuf::{MessageFull, well_known_types::any::Any},
};
use serde::Serialize;
use serde_json::json;

use crate::{
    args,
    error::{Result, refused},
    output,
    run::{require_root, runtime},
    spec::cpu_limit,
};

/// Lets every process of a container stand still.
pub(crate) fn pause(args: &args::Paused) -> Result<u8> {
    require_root()?;
    runtime()?.block_on(async { task(&args.id).await?.pause().await })?;
    Ok(0)
}

/// Lets them go on.
pub(crate) fn resume(args: &args::Paused) -> Result<u8> {
    require_root()?;
    runtime()?.block_on(async { task(&args.id).await?.resume().await })?;
    Ok(0)
}

/// Changes limits.
pub(crate) fn update(args: &args::Update) -> Result<u8> {
    require_root()?;
    let mut resources = json!({});
    if let Some(memory) = args.memory {
        resources["memory"] = json!({"limit": memory.bytes});
    }
    if let Some(cpus) = args.cpus {
        resources["cpu"] = cpu_limit(cpus.thousandths);
    }
    if let Some(limit) = args.pids {
        resources["pids"] = json!({"limit": limit});
    }
    runtime()?.block_on(async { task(&args.id).await?.update(&resources).await })?;
    Ok(0)
}

/// Prints what containers have used.
pub(crate) fn stats(args: &args::Stats) -> Result<u8> {
    require_root()?;
    let runtime = runtime()?;
    let (ids, named) = match args.ids.as_slice() {
        [] => {
            let found = record::all(Path::new(paths::CONTAINERS))?;
            let ids: Vec<ContainerId> = found.into_iter().map(|found| found.id).collect();
            (ids, false)
        }
        ids => (ids.to_vec(), true),
    };
    let mut rows = Vec::new();
    for id in ids {
        let said = runtime.block_on(async { task(&id).await?.stats().await });
        match said {
            Ok(any) => rows.push(Row::new(&id, &any)?),
            // Among all of them there are those that have ended.
            Err(_) if !named => {}
            Err(error) => return Err(error.into()),
        }
    }
    output::print(args.format, rows.as_slice(), table)?;
    Ok(0)
}

async fn task(id: &ContainerId) -> bulkhead_client::Result<Task> {
    let record = Record::load(Path::new(paths::CONTAINERS), id)?;
    connect(id, &record.bundle).await
}

/// What a container has used. Bytes and microseconds; what has no limit has none here.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Row {
    id: String,
    cpu_us: u64,
    cpu_user_us: u64,
    cpu_system_us: u64,
    memory: u64,
    memory_limit: Option<u64>,
    memory_peak: u64,
    /// Without files that can be read again.
    memory_working_set: u64,
    swap: u64,
    pids: u64,
    pids_limit: Option<u64>,
    oom_kills: u64,
}

impl Row {
    fn new(id: &ContainerId, any: &Any) -> Result<Self> {
        const NS_IN_US: u64 = 1_000;
        // As containerd's readers have it: above it there is no limit.
        let limit = |limit: u64| Some(limit).filter(|limit| (1..1 << 62).contains(limit));
        let id = id.to_string();
        if let Some(of) = read::<v2::Metrics>(any) {
            let (cpu, memory) = (&of.cpu, &of.memory);
            return Ok(Row {
                id,
                cpu_us: cpu.usage_usec,
                cpu_user_us: cpu.user_usec,
                cpu_system_us: cpu.system_usec,
                memory: memory.usage,
                memory_limit: limit(memory.usage_limit),
                memory_peak: memory.max_usage,
                memory_working_set: memory.usage.saturating_sub(memory.inactive_file),
                swap: memory.swap_usage,
                pids: of.pids.current,
                pids_limit: limit(of.pids.limit),
                oom_kills: of.memory_events.oom_kill,
            });
        }
        let Some(of) = read::<v1::Metrics>(any) else {
            let reason = "this version of bulkhead knows the metrics of cgroup v1 and v2 only";
            return Err(refused("The type of statistics", &any.type_url, reason));
        };
        let (cpu, memory) = (&of.cpu.usage, &of.memory);
        let usage = &memory.usage;
        Ok(Row {
            id,
            cpu_us: cpu.total / NS_IN_US,
            cpu_user_us: cpu.user / NS_IN_US,
            cpu_system_us: cpu.kernel / NS_IN_US,
            memory: usage.usage,
            memory_limit: limit(usage.limit),
            memory_peak: usage.max,
            memory_working_set: usage.usage.saturating_sub(memory.total_inactive_file),
            swap: memory.swap.usage.saturating_sub(usage.usage),
            pids: of.pids.current,
            pids_limit: limit(of.pids.limit),
            oom_kills: of.memory_oom_control.oom_kill,
        })
    }
}

/// The message in `any`, if it is of this type.
fn read<M: MessageFull>(any: &Any) -> Option<M> {
    (any.type_url == M::descriptor().full_name())
        .then(|| M::parse_from_bytes(&any.value).ok())
        .flatten()
}

fn table(rows: &[Row]) -> String {
    let mut table = output::columns([
        "ID",
        "CPU TIME",
        "MEMORY",
        "LIMIT",
        "PEAK",
        "PROCESSES",
        "OOM KILLS",
    ]);
    let none = || "none".to_owned();
    for row in rows {
        table.add_row([
            row.id.clone(),
            format!(
                "{}.{:02} s",
                row.cpu_us / 1_000_000,
                row.cpu_us / 10_000 % 100
            ),
            mib(row.memory),
            row.memory_limit.map_or_else(none, mib),
            mib(row.memory_peak),
            row.pids.to_string(),
            row.oom_kills.to_string(),
        ]);
    }
    output::text(&table)
}

fn mib(bytes: u64) -> String {
    let tenths = bytes.saturating_mul(10) >> 20;
    format!("{}.{} MiB", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any<M: MessageFull>(message: &M) -> Any {
        Any {
            type_url: M::descriptor().full_name().to_owned(),
            value: message.write_to_bytes().unwrap(),
            ..Any::default()
        }
    }

    #[test]
    fn both_versions_of_cgroups_are_read_alike() {
        let id: ContainerId = "web".parse().unwrap();
        let mut new = v2::Metrics::new();
        new.cpu.mut_or_insert_default().usage_usec = 1_234_567;
        let memory = new.memory.mut_or_insert_default();
        (memory.usage, memory.inactive_file) = (3 << 20, 1 << 20);
        (memory.usage_limit, memory.max_usage) = (u64::MAX, 4 << 20);
        new.pids.mut_or_insert_default().limit = u64::MAX;
        new.memory_events.mut_or_insert_default().oom_kill = 2;
        let mut old = v1::Metrics::new();
        let cpu = old.cpu.mut_or_insert_default();
        cpu.usage.mut_or_insert_default().total = 1_234_567_000;
        let memory = old.memory.mut_or_insert_default();
        memory.total_inactive_file = 1 << 20;
        let usage = memory.usage.mut_or_insert_default();
        (usage.usage, usage.limit, usage.max) = (3 << 20, 0x7fff_ffff_ffff_f000, 4 << 20);
        memory.swap.mut_or_insert_default().usage = 3 << 20;
        old.memory_oom_control.mut_or_insert_default().oom_kill = 2;
        let row = Row::new(&id, &any(&new)).unwrap();
        assert_eq!(row, Row::new(&id, &any(&old)).unwrap());
        assert_eq!((row.memory_limit, row.pids_limit), (None, None));
        assert_eq!(row.memory_working_set, 2 << 20);
        let text = table(&[row]);
        assert!(
            text.contains("1.23 s") && text.contains("3.0 MiB"),
            "{text}"
        );
        assert!(Row::new(&id, &Any::default()).is_err());
    }
}
