//! The files by which a container knows names: `hosts` and `resolv.conf`.
//!
//! They lie in the container's directory and are mounted from there. That of hosts is
//! written in place when another container comes or goes, so each sees the others at once.

use std::{
    fs::{self, File},
    io::{self, Write},
    net::IpAddr,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use super::store::{Lease, State};

/// The host's servers for names.
const HOSTS: &str = "/etc/resolv.conf";

/// Those behind systemd-resolved, which itself is reached on the host only.
const BEHIND_RESOLVED: &str = "/run/systemd/resolve/resolv.conf";

/// What is said to whoever looks why names are not found.
const NO_SERVER: &str =
    "# The host has no server that a container can reach: bulkhead run --dns IP\n";

/// How podman and Docker call the host.
const HOST: &str = "host.containers.internal host.docker.internal";

/// What every file of hosts begins with.
const LOCALHOST: &str = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n";

/// The file of hosts of a container.
pub(super) fn hosts_file(containers: &Path, id: &str) -> PathBuf {
    containers.join(id).join("hosts")
}

/// Writes the file of hosts of every container.
pub(super) fn tell_all(containers: &Path, state: &State) -> io::Result<()> {
    for lease in &state.leases {
        let path = hosts_file(containers, &lease.id);
        match write_in_place(&path, &hosts(state, lease)) {
            // Not made yet, or its container is just removed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            done => done?,
        }
    }
    Ok(())
}

/// Makes a file that everybody may read.
pub(super) fn make(path: &Path, text: &str) -> io::Result<()> {
    let mut file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(path)?;
    file.write_all(text.as_bytes())
}

/// Whoever reads meanwhile never finds it empty.
fn write_in_place(path: &Path, text: &str) -> io::Result<()> {
    let mut options = File::options();
    let file = options
        .write(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)?;
    file.write_all_at(text.as_bytes(), 0)?;
    file.set_len(text.len() as u64)
}

/// What a container in the network finds in its file of hosts.
pub(super) fn hosts(state: &State, own: &Lease) -> String {
    let mut text = LOCALHOST.to_owned();
    let gateway = state.subnets.gateway();
    for added in &own.hosts {
        let ip = added.ip.unwrap_or_else(|| gateway.v4.into());
        line(&mut text, ip, &added.name);
    }
    line(&mut text, gateway.v4.into(), HOST);
    let mut named = |lease: &Lease, names: &str| {
        let of = state.subnets.of(lease.number);
        for ip in [Some(IpAddr::V4(of.v4)), of.v6.map(IpAddr::V6)]
            .into_iter()
            .flatten()
        {
            line(&mut text, ip, names);
        }
    };
    let names = if own.hostname == own.id {
        own.id.clone()
    } else {
        format!("{} {}", own.hostname, own.id)
    };
    named(own, &names);
    let others = state.leases.iter().filter(|lease| lease.id != own.id);
    others.for_each(|lease| named(lease, &lease.id));
    text
}

/// The same of one without a network, where its own name is its own affair.
pub(super) fn hosts_alone(hostname: &str, hosts: &[crate::args::network::AddHost]) -> String {
    let mut text = LOCALHOST.to_owned();
    let added = |host: &crate::args::network::AddHost| Some((host.ip?, host.name.clone()));
    for (ip, name) in hosts.iter().filter_map(added) {
        line(&mut text, ip, &name);
    }
    line(&mut text, [127, 0, 1, 1].into(), hostname);
    text
}

fn line(text: &mut String, ip: IpAddr, names: &str) {
    text.push_str(&format!("{ip}\t{names}\n"));
}

/// What a container finds in its `resolv.conf`, of what the host has now; and whether the
/// host has servers, but none that a container can reach.
pub(super) fn resolvers(dns: &[IpAddr]) -> (String, bool) {
    let host = fs::read_to_string(HOSTS).unwrap_or_default();
    let text = resolv_conf(&host, || fs::read_to_string(BEHIND_RESOLVED).ok(), dns);
    let are_own = !has_servers(&text) && has_servers(&host);
    (text, are_own)
}

/// The host's file, without servers that a container cannot reach; with those behind
/// systemd-resolved if there are no others; with `dns` instead if there are any.
fn resolv_conf(
    host: &str,
    behind_resolved: impl FnOnce() -> Option<String>,
    dns: &[IpAddr],
) -> String {
    let mut servers: Vec<IpAddr> = dns.to_vec();
    if servers.is_empty() {
        servers = reachable(host);
    }
    if servers.is_empty() {
        servers = behind_resolved().map_or_else(Vec::new, |text| reachable(&text));
    }
    let mut text = String::new();
    for kept in host.lines() {
        let word = kept.split_whitespace().next().unwrap_or_default();
        if ["search", "domain", "options", "sortlist"].contains(&word) {
            text.push_str(kept.trim());
            text.push('\n');
        }
    }
    if servers.is_empty() {
        text.push_str(NO_SERVER);
    }
    for server in servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    text
}

/// Whether names can be asked for by such a file.
fn has_servers(resolv_conf: &str) -> bool {
    resolv_conf
        .lines()
        .any(|line| line.starts_with("nameserver "))
}

/// The servers of such a file that are not of the host itself, or of one link of it.
fn reachable(resolv_conf: &str) -> Vec<IpAddr> {
    let server = |line: &str| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next()?.parse().ok())?
    };
    let servers = resolv_conf.lines().filter_map(server);
    let is_own = |ip: &IpAddr| ip.is_loopback() || ip.is_unspecified();
    servers.filter(|ip| !is_own(ip)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::tests::state;

    #[test]
    fn a_container_knows_itself_what_was_added_and_the_others() {
        let state = state();
        let [web, db] = &state.leases[..] else {
            panic!()
        };
        assert_eq!(
            hosts(&state, web),
            "127.0.0.1\tlocalhost\n\
             ::1\tlocalhost ip6-localhost ip6-loopback\n\
             192.0.2.7\tcache\n\
             10.91.0.1\touter\n\
             10.91.0.1\thost.containers.internal host.docker.internal\n\
             10.91.0.2\tfront web\n\
             fd01:203:405::2\tfront web\n\
             10.91.0.3\tdb\n\
             fd01:203:405::3\tdb\n"
        );
        assert!(hosts(&state, db).ends_with("10.91.0.2\tweb\nfd01:203:405::2\tweb\n"));
    }

    #[test]
    fn a_file_of_hosts_is_written_in_place() {
        let dir = tempfile::tempdir().unwrap();
        let mut state = state();
        let path = hosts_file(dir.path(), "web");
        // A container whose file is not there keeps nobody from being told.
        tell_all(dir.path(), &state).unwrap();
        fs::create_dir(dir.path().join("web")).unwrap();
        make(&path, "").unwrap();
        let open = File::open(&path).unwrap();
        tell_all(dir.path(), &state).unwrap();
        let long = io::read_to_string(&open).unwrap();
        assert_eq!(long, hosts(&state, &state.leases[0]));
        state.leases.pop();
        tell_all(dir.path(), &state).unwrap();
        let short = fs::read_to_string(&path).unwrap();
        assert!(short.len() < long.len() && !short.contains("db"), "{short}");
        assert_eq!(open.metadata().unwrap().len(), short.len() as u64);
    }

    #[test]
    fn servers_that_only_the_host_reaches_are_left_out() {
        let check = |host: &str, behind: Option<&str>, dns: &[&str], expected: &str| {
            let dns: Vec<IpAddr> = dns.iter().map(|ip| ip.parse().unwrap()).collect();
            let text = resolv_conf(host, || behind.map(str::to_owned), &dns);
            assert_eq!(text, expected, "{host}");
        };
        let both = "# mine\nnameserver 127.0.0.53\nnameserver 192.0.2.1\nsearch example.test\n";
        check(
            both,
            None,
            &[],
            "search example.test\nnameserver 192.0.2.1\n",
        );
        check(
            both,
            None,
            &["192.0.2.9"],
            "search example.test\nnameserver 192.0.2.9\n",
        );
        let stub = "nameserver 127.0.0.53\noptions edns0";
        let behind = "nameserver 192.0.2.2\nnameserver fe80::1%eth0\nnameserver 2001:db8::1";
        check(
            stub,
            Some(behind),
            &[],
            "options edns0\nnameserver 192.0.2.2\nnameserver 2001:db8::1\n",
        );
        check(
            "nameserver ::1\nnameserver\nnameserver x",
            None,
            &[],
            NO_SERVER,
        );
        assert!(has_servers("options x\nnameserver 192.0.2.1\n") && !has_servers("options x\n"));
    }

    #[test]
    fn a_container_without_a_network_knows_its_own_name() {
        let added = ["cache:192.0.2.7", "outer:host-gateway"].map(|text| text.parse().unwrap());
        let text = hosts_alone("web", &added);
        assert!(
            text.ends_with("192.0.2.7\tcache\n127.0.1.1\tweb\n"),
            "{text}"
        );
    }
}
