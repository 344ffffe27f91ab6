//! Verbs on containers that exist: `exec`, `kill`, `rm` and `list`.

use std::{
    fs,
    io::{self, Write},
    path::Path,
};

use bulkhead_client::{
    ContainerId, Process, Record, Scratch, Signals, State, Streams, attach, paths, record,
    state::{self, connect},
    streams::Wanted,
    terminal,
};
use bulkhead_image::users::{self, Identity, User};
use containerd_shim_protos::api::ExecProcessRequest;
use serde::Serialize;

use crate::{
    args, clearing,
    error::{Error, Result, at},
    network, output,
    run::{exit_code, own_env, own_term, require_root, runtime, working_dir},
    spec::{self, Settings},
};

/// Runs one more process in a running container; answers its exit code.
pub(crate) fn exec(args: &args::Exec) -> Result<u8> {
    require_root()?;
    let record = load(&args.id)?;
    let flags = &args.process;
    let Identity { user, home } = match flags.user.as_deref() {
        // As the files of the container say now.
        Some(text) => users::look_up(&record.roots, text)?,
        None => Identity {
            user: own_user(&record.bundle),
            home: record.home.clone(),
        },
    };
    let settings = Settings {
        args: args.command.clone(),
        env: environment(&record, flags, &home),
        cwd: match &flags.workdir {
            None => record.cwd.clone(),
            Some(dir) => working_dir(dir)?,
        },
        user,
        terminal: flags.tty.then(terminal::size),
        ..Settings::default()
    };
    runtime()?.block_on(async {
        let mut signals = Signals::take()?;
        let task = signals.or(connect(&args.id, &record.bundle)).await?;
        let process = Process {
            id: args.id.clone(),
            exec_id: format!("exec-{}", std::process::id()),
        };
        let dir = paths::bundle(&args.id).join(&process.exec_id);
        let own = Scratch::make(dir.clone()).map_err(at("make", dir))?;
        let wanted = Wanted {
            stdin: flags.interactive,
            terminal: flags.tty,
        };
        let streams = Streams::new(own.path(), "", wanted)?;
        let [stdin, stdout, stderr] = streams.names();
        let mut request = ExecProcessRequest::new();
        request.id = process.id.to_string();
        request.exec_id.clone_from(&process.exec_id);
        request.terminal = flags.tty;
        request.stdin = stdin;
        request.stdout = stdout;
        request.stderr = stderr;
        task.exec(request, &settings.process()).await?;
        let started = attach::start(&task, &process, streams, flags.tty, &mut signals).await;
        let result = match started {
            Ok(mut attached) => attached.follow(&mut signals).await,
            Err(error) => Err(error),
        };
        if result.is_err() {
            // It may run without us: an interrupted exec leaves no process.
            let _ = task.kill(&process, libc::SIGKILL.unsigned_abs()).await;
            let _ = task.wait(&process).await;
        }
        let deleted = task.delete(&process).await;
        let status = result?;
        deleted?;
        Ok(exit_code(status))
    })
}

/// What is remembered of a container.
fn load(id: &ContainerId) -> Result<Record> {
    Ok(Record::load(Path::new(paths::CONTAINERS), id)?)
}

/// The environment of an exec whose user is at home in `home`.
fn environment(record: &Record, flags: &args::Process, home: &str) -> Vec<String> {
    let mut env = record.env.clone();
    spec::merge_env(&mut env, &flags.env, own_env);
    if !home.is_empty() {
        spec::default_env(&mut env, "HOME", home);
    }
    if flags.tty {
        spec::default_env(&mut env, "TERM", &own_term());
    }
    env
}

/// Sends a signal to the first process.
pub(crate) fn kill(args: &args::Kill) -> Result<u8> {
    require_root()?;
    let record = load(&args.id)?;
    runtime()?.block_on(async {
        let task = connect(&args.id, &record.bundle).await?;
        let process = Process {
            id: args.id.clone(),
            exec_id: String::new(),
        };
        task.kill(&process, args.signal.0).await
    })?;
    Ok(0)
}

/// Removes containers that have ended. Goes on after a failure and answers the last.
pub(crate) fn rm(args: &args::Rm) -> Result<u8> {
    require_root()?;
    let runtime = runtime()?;
    let mut failure = Ok(0);
    for id in &args.ids {
        let removed = state::remove(Path::new(paths::CONTAINERS), id, args.force);
        let removed = runtime.block_on(removed).map_err(Error::from);
        if let Err(error) = removed.and_then(|()| network::forget(id))
            && let Err(before) = std::mem::replace(&mut failure, Err(error))
        {
            report(&before);
        }
    }
    clearing::all();
    failure
}

fn report(error: &Error) {
    let _ = writeln!(io::stderr(), "bulkhead: {}", error.text());
}

/// The user of the container's first process.
fn own_user(bundle: &Path) -> User {
    let spec = fs::read(bundle.join("config.json")).ok();
    let spec: Option<serde_json::Value> = spec.and_then(|text| serde_json::from_slice(&text).ok());
    let user = spec
        .as_ref()
        .and_then(|spec| spec.get("process")?.get("user"));
    let number = |value: &serde_json::Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let field = |name| {
        user.and_then(|user| user.get(name))
            .and_then(number)
            .unwrap_or(0)
    };
    let groups = user.and_then(|user| user.get("additionalGids")?.as_array());
    User {
        uid: field("uid"),
        gid: field("gid"),
        groups: groups.into_iter().flatten().filter_map(number).collect(),
    }
}

#[derive(Debug, Serialize)]
struct Row {
    id: String,
    state: State,
    exit_code: Option<u32>,
    created: Option<u64>,
    source: String,
    command: Vec<String>,
}

impl Row {
    fn new(state: State, found: record::Found) -> Self {
        let record = found.record.ok().flatten();
        Row {
            id: found.id.to_string(),
            state,
            exit_code: record.as_ref().and_then(|record| record.exit_code),
            created: record.as_ref().map(|record| record.created),
            source: record
                .as_ref()
                .map(|record| record.source.clone())
                .unwrap_or_default(),
            command: record.map(|record| record.command).unwrap_or_default(),
        }
    }
}

/// Prints all containers.
pub(crate) fn list(args: &args::List) -> Result<u8> {
    require_root()?;
    let runtime = runtime()?;
    let found = record::all(Path::new(paths::CONTAINERS))?;
    // All at once: one that does not answer delays nobody but the whole, and that once.
    let rows = runtime.block_on(async {
        let mut waiting = tokio::task::JoinSet::new();
        for (place, found) in found.into_iter().enumerate() {
            waiting.spawn(async move { (place, Row::new(State::of(&found).await, found)) });
        }
        let mut rows = waiting.join_all().await;
        rows.sort_by_key(|(place, _)| *place);
        rows.into_iter().map(|(_, row)| row).collect::<Vec<_>>()
    });
    output::print(args::Format::of(args.json), rows.as_slice(), table)?;
    Ok(0)
}

fn table(rows: &[Row]) -> String {
    let mut table = output::columns(["ID", "STATE", "AGE", "SOURCE", "COMMAND"]);
    for row in rows {
        let state = match (row.state, row.exit_code) {
            (State::Starting, _) => "starting".to_owned(),
            (State::Running, _) => "running".to_owned(),
            (State::Exited, code) => format!("exited ({})", code.unwrap_or(0)),
            (State::Dead, _) => "dead".to_owned(),
            (State::Silent, _) => "silent".to_owned(),
            (State::Damaged, _) => "damaged".to_owned(),
        };
        let command: String = row
            .command
            .join(" ")
            .chars()
            .filter(|c| !c.is_control())
            .take(40)
            .collect();
        table.add_row([
            row.id.clone(),
            state,
            row.created.map(age).unwrap_or_default(),
            row.source.clone(),
            command,
        ]);
    }
    output::text(&table)
}

fn age(created: u64) -> String {
    let seconds = record::now().saturating_sub(created);
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..86_400 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exec_as_somebody_else_is_at_home_elsewhere_unless_the_container_says_where() {
        let record = |env: &[&str]| -> Record {
            serde_json::from_value(serde_json::json!({
                "id": "a", "source": "x", "command": [], "created": 1, "bundle": "/b",
                "env": env, "home": "/root",
            }))
            .unwrap()
        };
        let flags = args::Process::default();
        let seen = |env: &[&str], home| environment(&record(env), &flags, home);
        assert_eq!(seen(&["A=1"], "/tmp"), ["A=1", "HOME=/tmp"]);
        assert_eq!(seen(&["HOME=/srv"], "/tmp"), ["HOME=/srv"]);
        assert_eq!(seen(&["A=1"], ""), ["A=1"]);
    }

    #[test]
    fn the_table_shows_control_characters_of_nobody() {
        let row = Row {
            id: "web".to_owned(),
            state: State::Exited,
            exit_code: Some(3),
            created: Some(0),
            source: "x.tar".to_owned(),
            command: vec!["a\u{1b}[2Jb".to_owned()],
        };
        let text = table(&[row]);
        assert!(
            text.contains("exited (3)") && !text.contains('\u{1b}'),
            "{text}"
        );
    }
}
