//! Which addresses the network has, and which are whose. Pure.
//!
//! A container has a number, from 2 to 254: its IPv4 and IPv6 addresses end with it, and
//! so does the address of its interface, so that who remembers that of an earlier
//! container is not wrong. The bridge is number 1.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

/// That of the bridge.
const GATEWAY: u8 = 1;

/// Those that containers can have.
const NUMBERS: std::ops::RangeInclusive<u8> = 2..=254;

/// The networks of the bridge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Subnets {
    /// With 8 bits for numbers.
    pub(super) v4: Ipv4Net,
    /// With 64 bits for them; none where the host has no IPv6.
    pub(super) v6: Option<Ipv6Net>,
}

/// The addresses of one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Addresses {
    pub(super) v4: Ipv4Addr,
    pub(super) v6: Option<Ipv6Addr>,
    pub(super) mac: [u8; 6],
}

impl Subnets {
    /// Networks that meet none of `taken`; `id` makes that of IPv6 one of this host's own
    /// (RFC 4193, 3.2). None if every one meets something.
    pub(super) fn choose(taken: &[IpNet], id: Option<[u8; 5]>) -> Option<Subnets> {
        let is_free = |net: IpNet| {
            let meets = |taken: &IpNet| taken.contains(&net) || net.contains(taken);
            // A route to everywhere is nobody's network.
            !taken
                .iter()
                .any(|taken| taken.prefix_len() > 0 && meets(taken))
        };
        // Not 10.88.0.0/16 and those behind it, which podman takes later without a look.
        let third = |first, second| {
            (0..=255)
                .map(move |third| Ipv4Net::new_assert(Ipv4Addr::new(first, second, third, 0), 24))
        };
        let mut all = third(10, 91).chain(third(172, 30)).chain(third(192, 168));
        let v4 = all.find(|net| is_free((*net).into()))?;
        let v6 = id.map(|[a, b, c, d, e]| {
            let bytes = [0xfd, a, b, c, d, e, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            Ipv6Net::new_assert(Ipv6Addr::from(bytes), 64)
        });
        let v6 = v6.filter(|net| is_free((*net).into()));
        Some(Subnets { v4, v6 })
    }

    /// Those of the bridge.
    pub(super) fn gateway(&self) -> Addresses {
        self.of(GATEWAY)
    }

    /// Those of a number.
    pub(super) fn of(&self, number: u8) -> Addresses {
        let [a, b, c, _] = self.v4.network().octets();
        let v6 = self.v6.map(|net| {
            let mut bytes = net.network().octets();
            bytes[15] = number;
            Ipv6Addr::from(bytes)
        });
        Addresses {
            v4: Ipv4Addr::new(a, b, c, number),
            v6,
            // Locally administered.
            mac: [0x02, 0x62, a, b, c, number],
        }
    }

    /// The lowest number that nobody has.
    pub(super) fn free(&self, is_taken: impl Fn(u8) -> bool) -> Result<u8, String> {
        let mut numbers = NUMBERS;
        numbers.find(|number| !is_taken(*number)).ok_or_else(|| {
            format!(
                "every address of {} is taken; end a container first",
                self.v4
            )
        })
    }

    /// The number of an address that somebody wants.
    pub(super) fn number(&self, wanted: Ipv4Addr) -> Result<u8, String> {
        let net = self.v4;
        if !net.contains(&wanted) {
            return Err(format!("the network is {net}; give one of its addresses"));
        }
        let [_, _, _, number] = wanted.octets();
        if number == GATEWAY {
            return Err("it is the host's in this network; give another one".to_owned());
        }
        if !NUMBERS.contains(&number) {
            return Err(format!("it is not an address of one machine in {net}"));
        }
        Ok(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: [u8; 5] = [1, 2, 3, 4, 5];

    fn chosen(taken: &[&str]) -> Option<String> {
        let taken: Vec<IpNet> = taken.iter().map(|net| net.parse().unwrap()).collect();
        Subnets::choose(&taken, None).map(|subnets| subnets.v4.to_string())
    }

    #[test]
    fn a_network_is_chosen_that_meets_none_of_the_hosts() {
        for (taken, expected) in [
            (&[][..], "10.91.0.0/24"),
            (&["0.0.0.0/0", "::/0"], "10.91.0.0/24"),
            (&["10.88.0.0/16", "192.168.1.0/24"], "10.91.0.0/24"),
            (&["10.91.0.77/32"], "10.91.1.0/24"),
            (&["10.91.0.0/20"], "10.91.16.0/24"),
            (&["10.0.0.0/8"], "172.30.0.0/24"),
            (&["10.0.0.0/8", "172.16.0.0/12"], "192.168.0.0/24"),
        ] {
            assert_eq!(chosen(taken).as_deref(), Some(expected), "{taken:?}");
        }
        assert_eq!(chosen(&["0.0.0.0/1", "128.0.0.0/1"]), None);
    }

    #[test]
    fn an_ipv6_network_that_is_there_is_not_taken_again() {
        let v6 = |taken: &[IpNet]| Subnets::choose(taken, Some(ID)).unwrap().v6;
        let own: Ipv6Net = "fd01:203:405::/64".parse().unwrap();
        assert_eq!(v6(&[]), Some(own));
        assert_eq!(v6(&["fd01:203::/32".parse().unwrap()]), None);
    }

    #[test]
    fn all_addresses_of_a_container_end_with_its_number() {
        let subnets = Subnets::choose(&[], Some(ID)).unwrap();
        let found = subnets.of(0x1f);
        assert_eq!(found.v4.to_string(), "10.91.0.31");
        assert_eq!(found.v6.unwrap().to_string(), "fd01:203:405::1f");
        assert_eq!(found.mac, [2, 0x62, 10, 91, 0, 31]);
    }

    #[test]
    fn numbers_are_given_once_and_in_order() {
        let subnets = Subnets::choose(&[], None).unwrap();
        assert_eq!(subnets.free(|number| [2, 3, 5].contains(&number)), Ok(4));
        assert!(subnets.free(|_| true).unwrap_err().contains("10.91.0.0/24"));
        assert_eq!(subnets.number("10.91.0.9".parse().unwrap()), Ok(9));
        for (address, words) in [
            ("10.91.1.9", "the network is 10.91.0.0/24"),
            ("10.91.0.0", "not an address of one machine"),
            ("10.91.0.1", "the host's"),
            ("10.91.0.255", "not an address of one machine"),
        ] {
            let error = subnets.number(address.parse().unwrap()).unwrap_err();
            assert!(error.contains(words), "{address}: {error}");
        }
    }
}
