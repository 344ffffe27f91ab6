//! Whether ports of the host are free.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket},
};

use crate::{
    args::network::{Protocol, Publish},
    error::{Result, refused},
};

/// Refuses ports that are given twice, or that a program of the host has.
pub(super) fn check(ports: &[Publish]) -> Result<()> {
    for (n, port) in ports.iter().enumerate() {
        let shown = port.to_string();
        if ports.iter().take(n).any(|other| other.meets(port)) {
            let reason = "another --publish has this port of the host";
            return Err(refused("--publish", &shown, reason));
        }
        if let Err(error) = is_free(port) {
            let reason = match error.kind() {
                io::ErrorKind::AddrInUse => {
                    "a program of the host has this port (`ss -lntup` says which); \
                     end it, or give another port"
                        .to_owned()
                }
                io::ErrorKind::AddrNotAvailable => {
                    "the host does not have this address; `ip address` shows those it has"
                        .to_owned()
                }
                _ => format!("the port cannot be taken: {error}"),
            };
            return Err(refused("--publish", &shown, &reason));
        }
    }
    Ok(())
}

/// Takes a port for a moment.
fn is_free(port: &Publish) -> io::Result<()> {
    let take = |ip: IpAddr| {
        let at = SocketAddr::new(ip, port.host);
        match port.protocol {
            Protocol::Tcp => TcpListener::bind(at).map(drop),
            Protocol::Udp => UdpSocket::bind(at).map(drop),
        }
    };
    let Some(ip) = port.ip else {
        take(Ipv4Addr::UNSPECIFIED.into())?;
        return match take(Ipv6Addr::UNSPECIFIED.into()) {
            // A host without IPv6.
            Err(error) if error.kind() != io::ErrorKind::AddrInUse => Ok(()),
            done => done,
        };
    };
    take(ip)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_that_somebody_has_or_that_come_twice_are_refused() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let [tcp, udp] = [tcp.local_addr(), udp.local_addr()].map(|it| it.unwrap().port());
        for (all, words) in [
            (vec![format!("{tcp}:80")], "a program of the host"),
            (vec![format!("127.0.0.1:{tcp}:80")], "a program of the host"),
            (vec![format!("{udp}:80/udp")], "a program of the host"),
            (
                vec!["192.0.2.1:80:80".to_owned()],
                "does not have this address",
            ),
            (
                vec!["127.0.0.1:0".replace(":0", ":1:1"); 2],
                "another --publish",
            ),
        ] {
            let ports: Vec<Publish> = all.iter().map(|text| text.parse().unwrap()).collect();
            let error = check(&ports).unwrap_err().text();
            assert!(
                error.contains(words) && error.contains("--publish"),
                "{error}"
            );
        }
        assert!(check(&[]).is_ok());
    }
}
