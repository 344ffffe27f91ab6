//! Judges `hooks`: programs that run at points of a container's life.

use crate::spec::{
    Error,
    check::{absolute, list},
    oci,
    plan::{Hook, Hooks},
    process::no_nul,
};

/// Most hooks of one kind.
const HOOKS_MAX: usize = 64;

/// Checks all six kinds.
pub(crate) fn hooks(from: oci::Hooks) -> Result<Hooks, Error> {
    let of = |kind: &str, from| list(&format!("hooks.{kind}"), from, HOOKS_MAX, hook);
    Ok(Hooks {
        prestart: of("prestart", from.prestart)?,
        create_runtime: of("createRuntime", from.create_runtime)?,
        create_container: of("createContainer", from.create_container)?,
        start_container: of("startContainer", from.start_container)?,
        poststart: of("poststart", from.poststart)?,
        poststop: of("poststop", from.poststop)?,
    })
}

fn hook(at: &str, from: oci::Hook) -> Result<Hook, Error> {
    let path = absolute(&format!("{at}.path"), from.path)?;
    no_nul(&format!("{at}.args"), &from.args)?;
    no_nul(&format!("{at}.env"), &from.env)?;
    let is_named = |entry: &String| entry.find('=').is_some_and(|at| at > 0);
    if let Some(n) = from.env.iter().position(|entry| !is_named(entry)) {
        let (field, entry) = (format!("{at}.env[{n}]"), from.env.get(n));
        return Err(Error::new(field, entry, "it must be NAME=value"));
    }
    let timeout_s = match from
        .timeout
        .map(|seconds| (seconds, u32::try_from(seconds)))
    {
        None => None,
        Some((_, Ok(seconds @ 1..))) => Some(seconds),
        Some((seconds, _)) => {
            let reason = "it must be a number of seconds, at least 1";
            return Err(Error::new(format!("{at}.timeout"), seconds, reason));
        }
    };
    let args = if from.args.is_empty() {
        vec![path.to_string_lossy().into_owned()]
    } else {
        from.args
    };
    Ok(Hook {
        path,
        args,
        env: from.env,
        timeout_s,
    })
}
