//! The words about networks.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    str::FromStr,
};

use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};

use super::Format;

/// Options of `run` that are about its network.
#[derive(Debug, Default, Args)]
pub(crate) struct Options {
    /// What the container is connected to; bridge if not given.
    #[arg(long, value_name = "bridge|none")]
    pub(crate) network: Option<Mode>,
    /// Pass a port of the host on to the container.
    #[arg(short, long, value_name = "[IP:]HOST:CONT[/tcp|/udp]")]
    pub(crate) publish: Vec<Publish>,
    /// Ask this server for names, in place of the host's.
    #[arg(long, value_name = "IP")]
    pub(crate) dns: Vec<IpAddr>,
    /// Host name in the container; its id if not given.
    #[arg(long, value_name = "NAME", value_parser = host_name)]
    pub(crate) hostname: Option<String>,
    /// Let the container know this name; host-gateway is the host.
    #[arg(long, value_name = "NAME:IP")]
    pub(crate) add_host: Vec<AddHost>,
    /// IPv4 address in the bridge's network; a free one if not given.
    #[arg(long, value_name = "ADDRESS", value_parser = address)]
    pub(crate) ip: Option<Ipv4Addr>,
}

/// What a container is connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// The host's bridge of ours.
    Bridge,
    /// Nothing.
    None,
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const INSTEAD: &str = "give bridge or none instead";
        let kind = text.split_once(':').map_or(text, |(kind, _)| kind);
        let reason = match (kind, text) {
            (_, "bridge") => return Ok(Mode::Bridge),
            (_, "none") => return Ok(Mode::None),
            ("host" | "ns", _) => "a virtual machine cannot be in a network of the host",
            ("container" | "pod", _) => "a virtual machine cannot share the network of another one",
            ("cni", _) => "plug-ins are called by containerd and others that start pods by us",
            ("passt" | "pasta" | "slirp4netns" | "private", _) => {
                "networks of users are not there, for only root runs containers"
            }
            _ => "there is no such network",
        };
        Err(format!("{reason}; {INSTEAD}"))
    }
}

/// What carries a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Protocol {
    /// Connections.
    Tcp,
    /// Datagrams.
    Udp,
}

impl Protocol {
    /// As it is written.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        }
    }
}

/// A port of the host that is passed on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Publish {
    /// Only at this address of the host.
    pub(crate) ip: Option<IpAddr>,
    /// On the host.
    pub(crate) host: u16,
    /// In the container.
    pub(crate) container: u16,
    /// Of what.
    pub(crate) protocol: Protocol,
}

impl Publish {
    /// Whether both mean one port of the host.
    pub(crate) fn meets(&self, other: &Publish) -> bool {
        let together = match (self.ip, other.ip) {
            (None, _) | (_, None) => true,
            (Some(a), Some(b)) => {
                a.is_ipv4() == b.is_ipv4() && (a == b || a.is_unspecified() || b.is_unspecified())
            }
        };
        together && self.host == other.host && self.protocol == other.protocol
    }
}

impl FromStr for Publish {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const FORM: &str = "a port is published as HOST:CONT, IP:HOST:CONT or [IPv6]:HOST:CONT, \
                            with /tcp or /udp behind it";
        let (ports, protocol) = match text.split_once('/') {
            None | Some((_, "tcp")) => (text.trim_end_matches("/tcp"), Protocol::Tcp),
            Some((ports, "udp")) => (ports, Protocol::Udp),
            Some((_, other)) => return Err(format!("{other:?} is neither tcp nor udp; {FORM}")),
        };
        let (host, container) = ports.rsplit_once(':').ok_or(FORM)?;
        let (ip, host) = match host.rsplit_once(':') {
            None => (None, host),
            Some((ip, host)) => {
                let plain = ip
                    .strip_prefix('[')
                    .and_then(|ip| ip.strip_suffix(']'))
                    .filter(|ip| ip.contains(':'))
                    .unwrap_or(ip);
                let bare = plain == ip && ip.contains(':');
                let ip = plain.parse().ok().filter(|_| !bare);
                let ip: IpAddr = ip.ok_or_else(|| format!("{ip:?} is no address; {FORM}"))?;
                (Some(ip), host)
            }
        };
        Ok(Publish {
            ip,
            host: port("host's port", host)?,
            container: port("container's port", container)?,
            protocol,
        })
    }
}

impl fmt::Display for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ip {
            Some(ip) => write!(f, "{}", SocketAddr::new(ip, self.host))?,
            None => write!(f, "{}", self.host)?,
        }
        write!(f, ":{}/{}", self.container, self.protocol.name())
    }
}

fn port(what: &str, text: &str) -> Result<u16, String> {
    if text.contains('-') {
        return Err(format!(
            "the {what} {text:?} is a range; publish each port by an option of its own"
        ));
    }
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    match text.parse() {
        Ok(port @ 1..) if digits => Ok(port),
        _ => Err(format!("the {what} {text:?} is no number from 1 to 65535")),
    }
}

/// A name that the container shall know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct AddHost {
    /// The name.
    pub(crate) name: String,
    /// Whose; none is the host as the container sees it.
    pub(crate) ip: Option<IpAddr>,
}

impl FromStr for AddHost {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = || "a host is added as NAME:IP or NAME:host-gateway".to_owned();
        let (name, ip) = text.split_once(':').ok_or_else(form)?;
        let name = host_name(name)?;
        let ip = match ip {
            "host-gateway" => None,
            ip => Some(
                ip.trim_start_matches('[')
                    .trim_end_matches(']')
                    .parse()
                    .map_err(|_| format!("{ip:?} is no address; {}", form()))?,
            ),
        };
        Ok(AddHost { name, ip })
    }
}

impl fmt::Display for AddHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ip {
            Some(ip) => write!(f, "{}:{ip}", self.name),
            None => write!(f, "{}:host-gateway", self.name),
        }
    }
}

/// A name that files of names, and the kernel, take.
fn host_name(text: &str) -> Result<String, String> {
    let byte = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    let begins = text
        .bytes()
        .next()
        .is_some_and(|byte| byte.is_ascii_alphanumeric());
    if text.len() > 64 || !begins || !text.bytes().all(byte) {
        return Err(format!(
            "the name {text:?} is not 1 to 64 letters, digits, '-', '.' and '_', \
             of which a letter or digit comes first"
        ));
    }
    Ok(text.to_owned())
}

fn address(text: &str) -> Result<Ipv4Addr, String> {
    match text.parse() {
        Ok(IpAddr::V4(ip)) => Ok(ip),
        Ok(IpAddr::V6(_)) => {
            Err("give an IPv4 address; the IPv6 address ends with the same number".to_owned())
        }
        Err(_) => Err("it is no IPv4 address".to_owned()),
    }
}

/// What to do with networks.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// List the networks, and who has which addresses and ports.
    Ls {
        /// How it is printed.
        #[arg(long, value_enum, default_value_t = Format::Table)]
        format: Format,
    },
    /// Remove what containers left that are gone, and the bridge if nobody uses it.
    Prune,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_that_are_not_understood_are_refused() {
        for (text, shown) in [
            ("80:8080", "80:8080/tcp"),
            ("80:8080/tcp", "80:8080/tcp"),
            ("53:53/udp", "53:53/udp"),
            ("127.0.0.1:1:65535", "127.0.0.1:1:65535/tcp"),
            ("[fd00::1]:80:80/udp", "[fd00::1]:80:80/udp"),
        ] {
            let port: Publish = text.parse().unwrap();
            assert_eq!(port.to_string(), shown);
        }
        for (text, words) in [
            ("", "HOST:CONT"),
            ("80", "HOST:CONT"),
            (":80", "host's port \"\""),
            ("80:", "container's port \"\""),
            ("0:80", "host's port \"0\""),
            ("80:0", "container's port \"0\""),
            ("+80:80", "host's port \"+80\""),
            ("65536:80", "host's port \"65536\""),
            ("8000-8010:80", "is a range"),
            ("80:80/sctp", "neither tcp nor udp"),
            ("80:80/udp/tcp", "neither tcp nor udp"),
            ("80:80/tcp/tcp", "neither tcp nor udp"),
            ("localhost:80:80", "is no address"),
            ("fd00::1:80:80", "is no address"),
            ("[127.0.0.1]:80:80", "is no address"),
            ("1.2.3.4:5:80:80", "is no address"),
        ] {
            let error = text.parse::<Publish>().unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn a_port_meets_others_of_its_addresses_and_kind() {
        let meets = |a: &str, b: &str| {
            let [a, b] = [a, b].map(|text| text.parse::<Publish>().unwrap());
            assert_eq!(a.meets(&b), b.meets(&a));
            a.meets(&b)
        };
        assert!(meets("80:1", "80:2") && meets("80:1", "127.0.0.1:80:2"));
        assert!(meets("0.0.0.0:80:1", "127.0.0.1:80:2") && meets("[::]:80:1", "80:2"));
        assert!(!meets("80:1", "81:1") && !meets("80:1", "80:1/udp"));
        assert!(!meets("127.0.0.1:80:1", "127.0.0.2:80:2"));
        assert!(!meets("0.0.0.0:80:1", "[::]:80:2"));
    }

    #[test]
    fn networks_that_are_not_there_are_refused_with_what_can_be_given() {
        assert_eq!("bridge".parse(), Ok(Mode::Bridge));
        assert_eq!("none".parse(), Ok(Mode::None));
        for (text, words) in [
            ("host", "network of the host"),
            ("ns:/run/netns/x", "network of the host"),
            ("container:web", "of another one"),
            ("cni:net", "plug-ins"),
            ("passt", "only root"),
            ("mine", "no such network"),
            ("", "no such network"),
            ("bridge:ip=1", "no such network"),
        ] {
            let error = text.parse::<Mode>().unwrap_err();
            assert!(error.contains(words) && error.ends_with("bridge or none instead"));
        }
    }

    #[test]
    fn names_and_addresses_are_judged() {
        for text in [
            "db:10.0.0.1",
            "db:fd00::1",
            "db:[fd00::1]",
            "a_b.c-d:host-gateway",
        ] {
            assert!(text.parse::<AddHost>().is_ok(), "{text}");
        }
        for text in [
            "",
            "db",
            "db:",
            ":10.0.0.1",
            "d b:10.0.0.1",
            "d\nb:10.0.0.1",
            "-db:10.0.0.1",
            "ä:10.0.0.1",
            "#:10.0.0.1",
            "db:nowhere",
            "db:10.0.0.1 x",
        ] {
            assert!(text.parse::<AddHost>().is_err(), "{text}");
        }
        assert!(host_name(&"a".repeat(64)).is_ok() && host_name(&"a".repeat(65)).is_err());
        assert!(address("10.0.0.1").is_ok());
        assert!(address("fd00::1").unwrap_err().contains("IPv4"));
        assert!(address("10.0.0.300").is_err());
    }
}
