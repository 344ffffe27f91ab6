//! One command, run with two runtimes.

use std::{
    fmt::Write,
    path::{Path, PathBuf},
};

use bulkhead_tests::{BUSYBOX_NAME, Command, Outcome};

/// The runtimes: ours, and the one to compare with.
pub(crate) const RUNTIMES: [&str; 2] = ["io.containerd.bulkhead.v2", "io.containerd.runc.v2"];

/// Who starts containers.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Engine {
    Ctr,
    Docker,
}

/// A container that is run to its end.
pub(crate) struct Case {
    what: &'static str,
    flags: Vec<String>,
    program: Vec<String>,
    input: Option<PathBuf>,
    /// Both must fail, and say this in whatever case.
    fails: Option<&'static str>,
    /// What ours alone prints, where a difference is meant.
    ours: Option<&'static str>,
}

/// A program and its arguments.
pub(crate) fn case<'a>(what: &'static str, program: impl IntoIterator<Item = &'a str>) -> Case {
    Case {
        what,
        flags: Vec::new(),
        program: program.into_iter().map(str::to_owned).collect(),
        input: None,
        fails: None,
        ours: None,
    }
}

/// A script.
pub(crate) fn shell(what: &'static str, script: &str) -> Case {
    case(what, ["sh", "-c", script])
}

impl Engine {
    /// The words before the flags of a case.
    fn run(self, runtime: &str) -> Vec<&str> {
        match self {
            Engine::Ctr => vec!["ctr", "run", "--runtime", runtime, "--rm"],
            Engine::Docker => vec![
                "docker",
                "run",
                "--runtime",
                runtime,
                "--rm",
                "--network=none",
                "--name=case",
            ],
        }
    }

    /// The words between its flags and its program.
    fn image(self) -> &'static [&'static str] {
        match self {
            Engine::Ctr => &[BUSYBOX_NAME, "case"],
            Engine::Docker => &["busybox"],
        }
    }

    /// Removes what a failed case may leave with any runtime: of `ctr` a container, or a
    /// snapshot for which there was none to be, until containerd collects its garbage.
    fn remove(self) {
        let commands = match self {
            Engine::Ctr => vec!["ctr container rm case", "ctr snapshot rm case"],
            Engine::Docker => vec!["docker rm --force case"],
        };
        for command in commands {
            let words: Vec<&str> = command.split(' ').collect();
            // Fails where there is nothing to remove.
            let _ = Command::new(words[0], &words[1..]).run();
        }
    }
}

impl Case {
    /// What the engine is told besides.
    pub(crate) fn with<'a>(mut self, flags: impl IntoIterator<Item = &'a str>) -> Case {
        self.flags = flags.into_iter().map(str::to_owned).collect();
        self
    }

    /// Standard input is this file.
    pub(crate) fn input(mut self, path: &Path) -> Case {
        self.input = Some(path.to_owned());
        self
    }

    /// With both runtimes it fails, and this is a part of what is said of it.
    pub(crate) fn fails(mut self, why: &'static str) -> Case {
        self.fails = Some(why);
        self
    }

    /// A difference that `docs/differences.md` explains: ours prints this, runc does not.
    pub(crate) fn ours(mut self, printed: &'static str) -> Case {
        self.ours = Some(printed);
        self
    }

    fn run(&self, engine: Engine, runtime: &str) -> Outcome {
        let mut words = engine.run(runtime);
        words.extend(self.flags.iter().map(String::as_str));
        words.extend(engine.image());
        words.extend(self.program.iter().map(String::as_str));
        let mut command = Command::new(words[0], &words[1..]);
        if let Some(input) = &self.input {
            command = command.stdin_from(input);
        }
        let outcome = command.run();
        if outcome.code != 0 {
            engine.remove();
        }
        outcome
    }

    /// What differs; nothing if all is well.
    fn difference(&self, engine: Engine) -> Option<String> {
        let [ours, theirs] = RUNTIMES.map(|runtime| self.run(engine, runtime));
        let same = match (self.fails, self.ours) {
            (None, None) => told(&ours) == told(&theirs),
            (None, Some(printed)) => ours.stdout == printed && theirs.stdout != printed,
            (Some(why), _) => {
                let says = |outcome: &Outcome| outcome.stderr.to_lowercase().contains(why);
                ours.code == theirs.code && ours.code != 0 && says(&ours) && says(&theirs)
            }
        };
        let (ours, theirs) = (brief(&ours), brief(&theirs));
        (!same).then(|| format!("{}\n  ours: {ours}\n  runc: {theirs}\n", self.what))
    }
}

fn told(outcome: &Outcome) -> (i32, &str, &str) {
    (outcome.code, &outcome.stdout, &outcome.stderr)
}

/// The beginning of an outcome.
fn brief(outcome: &Outcome) -> String {
    let cut = |text: &str| text.chars().take(2000).collect::<String>();
    let (out, err) = (cut(&outcome.stdout), cut(&outcome.stderr));
    format!("exit code {}\n{out}\n{err}", outcome.code)
}

/// Runs all of them; fails with all that differs.
#[track_caller]
pub(crate) fn compare(engine: Engine, cases: impl IntoIterator<Item = Case>) {
    let mut differences = String::new();
    let (mut all, mut differ) = (0, 0);
    for case in cases {
        all += 1;
        if let Some(difference) = case.difference(engine) {
            differ += 1;
            writeln!(differences, "{difference}").expect("memory suffices");
        }
    }
    eprintln!("{engine:?}: {all} cases, {differ} of them differ");
    assert!(
        differ == 0,
        "{differ} of {all} cases differ:\n{differences}"
    );
}

/// Takes the steps with each runtime, and tidies up after them; fails with those of which
/// not the same is told.
#[track_caller]
pub(crate) fn same(steps: &[&str], take: impl Fn(&str, &str) -> String, tidy: impl Fn()) {
    let [ours, theirs] = RUNTIMES.map(|runtime| {
        let told = steps
            .iter()
            .map(|step| take(step, runtime).replace(runtime, "RUNTIME"));
        let told: Vec<String> = told.collect();
        tidy();
        told
    });
    let differ: Vec<_> = ours.iter().zip(&theirs).filter(|(a, b)| a != b).collect();
    eprintln!("{} steps, {} of them differ", steps.len(), differ.len());
    assert!(differ.is_empty(), "ours, runc's: {differ:#?}");
}
