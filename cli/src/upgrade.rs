//! `bulkhead upgrade`: shims of pods that run go on with the program that is installed.

use bulkhead_shim::{
    names,
    statedir::StateDir,
    upgrade::{Asked, Outcome},
};
use serde::Serialize;

use crate::{
    args::Upgrade,
    error::{Error, Result, refused},
    output,
    run::require_root,
};

/// What is told of one pod.
#[derive(Debug, Serialize)]
struct Told {
    namespace: String,
    pod: String,
    pid: i32,
    #[serde(flatten)]
    outcome: Outcome,
}

/// Asks the shims, and prints what came of it.
pub(crate) fn upgrade(args: &Upgrade) -> Result<u8> {
    require_root()?;
    let pods = pods(args)?;
    // All at once: each has time of its own.
    let asked: Vec<Asked> = pods.iter().filter_map(Asked::of).collect();
    let told: Vec<Told> = asked
        .into_iter()
        .map(|asked| Told {
            namespace: asked.pod().namespace(),
            pod: asked.pod().group(),
            pid: asked.shim().pid,
            outcome: asked.wait(),
        })
        .collect();
    output::print(args.format, told.as_slice(), table)?;
    let stays = |told: &&Told| matches!(told.outcome, Outcome::Refused { .. } | Outcome::Silent);
    match told.iter().filter(stays).count() {
        0 => Ok(0),
        count => Err(Error::Shim(format!(
            "{count} of {} shims go on with the program that they have",
            told.len()
        ))),
    }
}

/// The pods that are meant.
fn pods(args: &Upgrade) -> Result<Vec<StateDir>> {
    let mut pods = StateDir::everywhere();
    pods.retain(|pod| {
        let wanted = args.namespace.as_ref();
        wanted.is_none_or(|wanted| *wanted == pod.namespace())
    });
    if args.ids.is_empty() {
        return Ok(pods);
    }
    let mut meant = Vec::new();
    for id in &args.ids {
        let name = names::ContainerId::new(id.as_str());
        let name = name.map_err(|error| refused("Container", id.as_str(), &error.to_string()))?;
        let before = meant.len();
        meant.extend(pods.iter().filter(|pod| pod.has(&name)).cloned());
        if meant.len() == before {
            let reason = "there is no such container in a virtual machine of bulkhead";
            return Err(refused("Container", id.as_str(), reason));
        }
    }
    meant.sort_by(|a, b| a.path().cmp(b.path()));
    meant.dedup_by(|a, b| a.path() == b.path());
    Ok(meant)
}

fn table(told: &[Told]) -> String {
    let mut table = output::columns(["NAMESPACE", "POD", "PID", "OUTCOME"]);
    for told in told {
        table.add_row([
            told.namespace.clone(),
            told.pod.clone(),
            told.pid.to_string(),
            told.outcome.to_string(),
        ]);
    }
    output::text(&table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_pod_has_a_line_that_says_what_came_of_it() {
        let told = |pod: &str, outcome| Told {
            namespace: "default".to_owned(),
            pod: pod.to_owned(),
            pid: 7,
            outcome,
        };
        let told = [
            told(
                "web",
                Outcome::TakenOver {
                    version: "2.0.0".to_owned(),
                },
            ),
            told(
                "db",
                Outcome::Refused {
                    reason: "files are being copied".to_owned(),
                },
            ),
        ];
        let text = table(&told);
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert!(lines[1].contains("web") && lines[1].ends_with("goes on as version 2.0.0"));
        assert!(
            lines[2].ends_with("stays: files are being copied"),
            "{text}"
        );
        let json = serde_json::to_value(&told).unwrap();
        assert_eq!(json[0]["outcome"], "taken over");
        assert_eq!(json[1]["reason"], "files are being copied");
    }
}
