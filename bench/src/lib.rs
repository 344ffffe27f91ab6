//! What the benchmarks share: running commands by the lab host's clock, KVM's counters,
//! and the table that they print.
//!
//! The clock is the lab host's: where that counts instructions, so do the benches, and
//! "virtual ms" are millions of instructions, whatever else the machine does. Figures
//! mean something as ratios within one run only.
#![expect(
    clippy::print_stdout,
    reason = "tables on standard output are the programs' purpose"
)]

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, ensure};

/// Counters of KVM in debugfs, summed over all virtual machines.
pub const KVM_COUNTERS: [&str; 8] = [
    "exits",
    "io_exits",
    "mmio_exits",
    "halt_exits",
    "irq_window",
    "insn_emulation",
    "pf_taken",
    "tlb_flush",
];

/// KVM's counters now; 0 where this kernel has none of a name.
///
/// # Errors
///
/// debugfs is not mounted.
pub fn kvm_counters() -> Result<BTreeMap<&'static str, u64>> {
    let dir = Path::new("/sys/kernel/debug/kvm");
    ensure!(dir.is_dir(), "{} is missing: mount debugfs", dir.display());
    KVM_COUNTERS
        .into_iter()
        .map(|name| match fs::read_to_string(dir.join(name)) {
            Ok(text) => Ok((name, text.trim().parse()?)),
            Err(_) => Ok((name, 0)),
        })
        .collect()
}

/// A started program; killed when it is no longer needed.
#[derive(Debug)]
pub struct Running(pub Child);

impl Running {
    /// Starts it, without input.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub fn start(command: &mut Command) -> Result<Running> {
        let child = command.stdin(Stdio::null()).spawn();
        let name = command.get_program().to_string_lossy().into_owned();
        Ok(Running(
            child.with_context(|| format!("Cannot start {name}"))?,
        ))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only if it has ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The runtimes of containerd: ours, and the one to compare with.
pub const OURS: &str = "io.containerd.bulkhead.v2";
/// See [`OURS`].
pub const RUNC: &str = "io.containerd.runc.v2";
/// The small image in containerd.
pub const IMAGE: &str = "localhost/lab/busybox:latest";
/// A program that does nothing.
pub const SLEEP: [&str; 2] = ["sleep", "100000"];

/// A container of `ctr`; removed when dropped.
#[derive(Debug)]
pub struct Task(&'static str);

impl Task {
    /// Starts one that sleeps.
    ///
    /// # Errors
    ///
    /// `ctr` fails.
    pub fn start(id: &'static str, runtime: &str) -> Result<Task> {
        let run = ["ctr", "run", "--detach", "--runtime", runtime, IMAGE, id];
        let task = Task(id);
        output(&[&run[..], &SLEEP].concat())?;
        Ok(task)
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        for line in [
            &["ctr", "task", "rm", "--force", self.0][..],
            &["ctr", "container", "rm", self.0],
        ] {
            let _ = output(line);
        }
    }
}

/// Resident KiB of a process: (guest memory, everything else). Guest memory is
/// every mapping of at least `least` KiB.
///
/// # Errors
///
/// The process is gone.
pub fn resident(pid: u32, least: u64) -> Result<(u64, u64)> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut guest, mut rest, mut size) = (0, 0, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(key), Some(value)) = (words.next(), words.next()) else {
            continue;
        };
        match key {
            "Size:" => size = value.parse::<u64>()?,
            "Rss:" if size >= least => guest += value.parse::<u64>()?,
            "Rss:" => rest += value.parse::<u64>()?,
            _ => {}
        }
    }
    Ok((guest, rest))
}

/// Runs a command that must succeed; milliseconds from its start to its end.
///
/// # Errors
///
/// It fails.
pub fn timed(argv: &[&str]) -> Result<f64> {
    let began = Instant::now();
    let output = output(argv)?;
    drop(output);
    Ok(began.elapsed().as_secs_f64() * 1e3)
}

/// What commands took, by their names.
#[derive(Debug, Default)]
pub struct Taken(BTreeMap<&'static str, Vec<(f64, f64)>>);

impl Taken {
    /// Runs each command in turn, `rounds` times and once more before: the first of each
    /// finds nothing in the page cache.
    ///
    /// # Errors
    ///
    /// One fails.
    pub fn measure(ways: &[(&'static str, Vec<&str>)], rounds: usize) -> Result<Taken> {
        let mut taken = Taken::default();
        for round in 0..=rounds {
            for (name, argv) in ways {
                let before = kvm_counters()?["exits"];
                let ms = timed(argv)?;
                let exits = kvm_counters()?["exits"].saturating_sub(before);
                if round > 0 {
                    let exits = f64::from(u32::try_from(exits)?);
                    taken.0.entry(name).or_default().push((ms, exits));
                }
            }
            eprintln!("round {round} of {rounds}");
        }
        Ok(taken)
    }

    /// Milliseconds of this command: the median.
    #[must_use]
    pub fn ms(&self, name: &str) -> f64 {
        median(self.0[name].iter().map(|(ms, _)| *ms))
    }

    /// Exits of all guests meanwhile: the median.
    #[must_use]
    pub fn exits(&self, name: &str) -> f64 {
        median(self.0[name].iter().map(|(_, exits)| *exits))
    }
}

/// Runs a command that must succeed: its standard output.
///
/// # Errors
///
/// It fails.
pub fn output(argv: &[&str]) -> Result<String> {
    let [program, arguments @ ..] = argv else {
        anyhow::bail!("No command");
    };
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("Cannot start {program}"))?;
    ensure!(
        output.status.success(),
        "{}: {}: {}",
        argv.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The value in the middle.
#[must_use]
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Prints a row: a name, ours, and each peer with the ratio of ours to it.
pub fn row(name: &str, ours: f64, peers: &[f64]) {
    print!("{name:<26}{ours:>14.1}");
    for peer in peers {
        let ratio = if *peer == 0.0 {
            "-".to_owned()
        } else {
            format!("{:.2}", ours / peer)
        };
        print!("{peer:>16.1}{ratio:>8}");
    }
    println!();
}

/// Prints the head of the rows that follow.
pub fn head(ours: &str, peers: &[&str]) {
    print!("{:<26}{ours:>14}", "");
    for peer in peers {
        print!("{peer:>16}{:>8}", "ratio");
    }
    println!();
}

/// What a benchmark promises; said by [`Goals::kept`] if it does not hold.
#[derive(Debug, Default)]
pub struct Goals(Vec<String>);

impl Goals {
    /// `value` must not be above `most`.
    pub fn at_most(&mut self, what: &str, value: f64, most: f64) {
        if value > most || value.is_nan() {
            self.0
                .push(format!("{what} is {value:.2}, not at most {most}"));
        }
    }

    /// # Errors
    ///
    /// Names each goal that was missed.
    pub fn kept(self) -> Result<()> {
        ensure!(self.0.is_empty(), "Goals missed: {}", self.0.join("; "));
        println!("all goals kept");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missed_goal_is_named_with_its_figure() {
        let mut goals = Goals::default();
        goals.at_most("ratio", 0.45, 0.5);
        goals.at_most("exits", 61.0, 60.0);
        goals.at_most("memory", f64::NAN, 4.0);
        assert_eq!(
            goals.kept().unwrap_err().to_string(),
            "Goals missed: exits is 61.00, not at most 60; memory is NaN, not at most 4"
        );
        assert!(Goals::default().kept().is_ok());
    }

    #[test]
    fn the_median_is_in_the_middle() {
        assert!((median([3.0, 1.0, 2.0]) - 2.0).abs() < f64::EPSILON);
        assert!(median([]).is_nan());
    }
}
