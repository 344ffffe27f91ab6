//! Verbs on containers that exist: `exec`, `kill`, `rm` and `list`.
//!
//! The shim of a container is found by the file `address` that its start wrote into
//! the bundle; what the shim says is the truth, the record only remembers.

use std::{
    fs,
    io::{self, Write},
    path::Path,
};

use bulkhead_image::users::User;
use containerd_shim_protos::api::{ExecProcessRequest, Status};
use serde::Serialize;

use crate::{
    args::{self, ContainerId},
    attach::{self, Signals},
    client::{self, Process, Task},
    error::{Error, Result, at, host},
    paths,
    record::{Record, Scratch},
    run::{exit_code, own_env, refused, require_root, runtime},
    spec::{self, Settings},
    stdio::{Streams, Wanted},
    terminal,
};

/// Runs one more process in a running container; answers its exit code.
pub(crate) fn exec(args: &args::Exec) -> Result<u8> {
    require_root()?;
    let record = Record::load(&args.id)?;
    let user = match args.user.as_deref() {
        Some(text) => numbers(text)?,
        None => own_user(&record.bundle),
    };
    let mut env = record.env.clone();
    spec::merge_env(&mut env, &args.env, own_env);
    if args.tty {
        spec::default_env(
            &mut env,
            "TERM",
            &own_env("TERM").unwrap_or_else(|| "xterm".to_owned()),
        );
    }
    let cwd = match args.workdir.as_deref() {
        None => record.cwd.clone(),
        Some(dir) if dir.starts_with('/') => dir.to_owned(),
        Some(dir) => {
            return Err(refused(
                "Working directory",
                dir,
                "it must be an absolute path in the container",
            ));
        }
    };
    let settings = Settings {
        args: args.command.clone(),
        env,
        cwd,
        user,
        terminal: args.tty.then(terminal::size),
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
            stdin: args.interactive,
            terminal: args.tty,
        };
        let streams = Streams::new(own.path(), "", wanted)?;
        let [stdin, stdout, stderr] = streams.names();
        let mut request = ExecProcessRequest::new();
        request.id = process.id.to_string();
        request.exec_id.clone_from(&process.exec_id);
        request.terminal = args.tty;
        request.stdin = stdin;
        request.stdout = stdout;
        request.stderr = stderr;
        task.exec(request, &settings.process()).await?;
        let result = attach::run(&task, &process, streams, args.tty, &mut signals).await;
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

/// Sends a signal to the first process.
pub(crate) fn kill(args: &args::Kill) -> Result<u8> {
    require_root()?;
    let record = Record::load(&args.id)?;
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
        if let Err(error) = runtime.block_on(remove(id, args.force))
            && let Err(before) = std::mem::replace(&mut failure, Err(error))
        {
            report(&before);
        }
    }
    failure
}

fn report(error: &Error) {
    let _ = writeln!(io::stderr(), "bulkhead: {}", error.text());
}

async fn remove(id: &ContainerId, force: bool) -> Result<()> {
    let record = match Record::load(id) {
        Ok(record) => record,
        // A run that was killed before it could write one.
        Err(Error::NoContainer(_)) if paths::container(id).is_dir() => return remove_files(id),
        Err(error) => return Err(error),
    };
    let state = state(id, &record).await;
    if state == State::Running && !force {
        return Err(Error::Running(id.to_string()));
    }
    if state != State::Exited {
        // Its `bulkhead run` was killed, or force is wanted: what the shim holds goes.
        client::clean_up(
            id,
            if record.bundle.is_dir() {
                &record.bundle
            } else {
                Path::new("/")
            },
        )?;
    }
    remove_files(id)
}

fn remove_files(id: &ContainerId) -> Result<()> {
    Scratch::adopt(paths::bundle(id)).remove()?;
    Scratch::adopt(paths::container(id)).remove()
}

/// What a container does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// Its first process runs.
    Running,
    /// It ended, and everything was taken down.
    Exited,
    /// Neither: `bulkhead run` or the shim was killed.
    Dead,
}

async fn state(id: &ContainerId, record: &Record) -> State {
    if record.exit_code.is_some() {
        return State::Exited;
    }
    let Ok(task) = connect(id, &record.bundle).await else {
        return State::Dead;
    };
    match task.state().await {
        Ok(answer) if answer.status.enum_value_or_default() != Status::STOPPED => State::Running,
        _ => State::Dead,
    }
}

/// Connects to the shim of a container.
async fn connect(id: &ContainerId, bundle: &Path) -> Result<Task> {
    let Ok(address) = fs::read_to_string(bundle.join("address")) else {
        return Err(Error::NotRunning(id.to_string()));
    };
    Task::connect(id, address.trim())
        .await
        .map_err(|_| Error::NotRunning(id.to_string()))
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

fn numbers(text: &str) -> Result<User> {
    let (uid, gid) = text.split_once(':').unwrap_or((text, "0"));
    let number = |id: &str| id.parse::<u32>().ok().filter(|id| *id != u32::MAX);
    match (number(uid), number(gid)) {
        (Some(uid), Some(gid)) => Ok(User {
            uid,
            gid,
            groups: Vec::new(),
        }),
        _ => Err(refused(
            "User",
            text,
            "give numbers, such as 1000 or 1000:1000",
        )),
    }
}

#[derive(Debug, Serialize)]
struct Row {
    id: String,
    state: State,
    exit_code: Option<u32>,
    created: u64,
    source: String,
    command: Vec<String>,
}

/// Prints all containers.
pub(crate) fn list(args: &args::List) -> Result<u8> {
    require_root()?;
    let runtime = runtime()?;
    let mut rows = Vec::new();
    for record in Record::all()? {
        let Ok(id) = record.id.parse::<ContainerId>() else {
            continue;
        };
        let state = runtime.block_on(state(&id, &record));
        let Record {
            id,
            source,
            command,
            created,
            exit_code,
            ..
        } = record;
        rows.push(Row {
            id,
            state,
            exit_code,
            created,
            source,
            command,
        });
    }
    let text = if args.json {
        let mut text = serde_json::to_string_pretty(&rows)
            .map_err(|error| host("write JSON")(io::Error::from(error)))?;
        text.push('\n');
        text
    } else {
        table(&rows)
    };
    io::stdout()
        .write_all(text.as_bytes())
        .map_err(host("write the list"))?;
    Ok(0)
}

fn table(rows: &[Row]) -> String {
    let mut table = comfy_table::Table::new();
    table
        .load_style(comfy_table::presets::NOTHING)
        .set_header(["ID", "STATE", "AGE", "SOURCE", "COMMAND"]);
    for row in rows {
        let state = match (row.state, row.exit_code) {
            (State::Running, _) => "running".to_owned(),
            (State::Exited, code) => format!("exited ({})", code.unwrap_or(0)),
            (State::Dead, _) => "dead".to_owned(),
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
            age(row.created),
            row.source.clone(),
            command,
        ]);
    }
    format!("{}\n", table.trim_fmt())
}

fn age(created: u64) -> String {
    let seconds = crate::record::now().saturating_sub(created);
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
    fn a_user_of_an_exec_is_given_by_numbers() {
        assert_eq!(
            numbers("7").unwrap(),
            User {
                uid: 7,
                gid: 0,
                groups: vec![]
            }
        );
        assert_eq!(
            numbers("7:8").unwrap(),
            User {
                uid: 7,
                gid: 8,
                groups: vec![]
            }
        );
        for text in ["", "web", "7:", "-1", "4294967295"] {
            assert!(numbers(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_table_shows_control_characters_of_nobody() {
        let row = Row {
            id: "web".to_owned(),
            state: State::Exited,
            exit_code: Some(3),
            created: 0,
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
