//! What a container has used, read from the files of its cgroup.
//!
//! A file that the kernel does not have is a count of nothing: not every kernel has
//! every controller, and statistics are no reason to fail.

use std::{collections::HashMap, fs};

use bulkhead_agent_api::agent::{
    Amount, Device, HugePages, Interface, Pressure, Stall, StatsResponse,
};

use super::{Cgroup, value};

/// Sizes of huge pages, as files are named by them.
const HUGE_PAGES: [&str; 2] = ["2MB", "1GB"];

/// Counters of the network namespace of the agent, which is that of all containers.
const INTERFACES: &str = "/proc/net/dev";

impl Cgroup {
    /// What its processes have used by now.
    pub(crate) fn stats(&self) -> StatsResponse {
        let counters = |name: &str| counters(&self.text(name));
        let pressure = |name: &str| Some(pressure(&self.text(name))).into();
        StatsResponse {
            cpu: counters("cpu.stat"),
            memory: counters("memory.stat"),
            memory_events: counters("memory.events"),
            pids: Some(self.amount("pids")).into(),
            memory_use: Some(self.amount("memory")).into(),
            swap_use: Some(self.amount("memory.swap")).into(),
            devices: devices(&self.text("io.stat")),
            huge_pages: HUGE_PAGES
                .into_iter()
                .filter_map(|size| self.huge_pages(size))
                .collect(),
            interfaces: interfaces(&fs::read_to_string(INTERFACES).unwrap_or_default()),
            cpu_pressure: pressure("cpu.pressure"),
            memory_pressure: pressure("memory.pressure"),
            io_pressure: pressure("io.pressure"),
            ..StatsResponse::default()
        }
    }

    /// The content of one of its files; nothing without the file.
    pub(super) fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path.join(name)).unwrap_or_default()
    }

    fn amount(&self, name: &str) -> Amount {
        let number = |what: &str| number(&self.text(&format!("{name}.{what}")));
        Amount {
            current: number("current").unwrap_or(0),
            limit: number("max").unwrap_or(u64::MAX),
            peak: number("peak").unwrap_or(0),
            ..Amount::default()
        }
    }

    fn huge_pages(&self, size: &str) -> Option<HugePages> {
        let file = format!("hugetlb.{size}");
        let events = fs::read_to_string(self.path.join(format!("{file}.events"))).ok()?;
        Some(HugePages {
            size: size.to_owned(),
            amount: Some(self.amount(&file)).into(),
            refused: value(&events, "max").unwrap_or(0),
            ..HugePages::default()
        })
    }
}

/// The number that a file consists of; none for `max`.
pub(super) fn number(text: &str) -> Option<u64> {
    text.trim_end().parse().ok()
}

/// A file of `key value` lines.
fn counters(text: &str) -> HashMap<String, u64> {
    pairs(text.lines().filter_map(|line| line.split_once(' ')))
}

fn pairs<'a>(pairs: impl Iterator<Item = (&'a str, &'a str)>) -> HashMap<String, u64> {
    pairs
        .filter_map(|(key, value)| Some((key.to_owned(), value.parse().ok()?)))
        .collect()
}

/// `io.stat`: lines of a device number and `key=value` words.
fn devices(text: &str) -> Vec<Device> {
    let device = |line: &str| {
        let (number, words) = line.split_once(' ')?;
        let (major, minor) = number.split_once(':')?;
        Some(Device {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            counters: pairs(words.split(' ').filter_map(|word| word.split_once('='))),
            ..Device::default()
        })
    };
    text.lines().filter_map(device).collect()
}

/// `/proc/net/dev`: after two lines of headings a name and sixteen numbers in each.
fn interfaces(text: &str) -> Vec<Interface> {
    let interface = |line: &str| {
        let (name, numbers) = line.split_once(':')?;
        let numbers: Vec<u64> = numbers
            .split_whitespace()
            .map_while(|number| number.parse().ok())
            .collect();
        let at = |column: usize| numbers.get(column).copied().unwrap_or(0);
        Some(Interface {
            name: name.trim_start().to_owned(),
            rx_bytes: at(0),
            rx_packets: at(1),
            rx_errors: at(2),
            rx_dropped: at(3),
            tx_bytes: at(8),
            tx_packets: at(9),
            tx_errors: at(10),
            tx_dropped: at(11),
            ..Interface::default()
        })
    };
    text.lines().skip(2).filter_map(interface).collect()
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, and a line that begins with `full`.
fn pressure(text: &str) -> Pressure {
    let stall = |kind: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(kind));
        let word = |key: &str| {
            let mut words = line.unwrap_or_default().split(' ');
            words.find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
        };
        let average = |key| word(key).and_then(|text| text.parse().ok()).unwrap_or(0.0);
        let stall = Stall {
            avg10: average("avg10"),
            avg60: average("avg60"),
            avg300: average("avg300"),
            total: word("total").and_then(number).unwrap_or(0),
            ..Stall::default()
        };
        Some(stall).into()
    };
    Pressure {
        some: stall("some "),
        full: stall("full "),
        ..Pressure::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_keys_and_numbers_are_read_and_nonsense_is_skipped() {
        let read = counters("usage_usec 12\nuser_usec 7\nempty\nbad x\n neg -1\n");
        assert_eq!(read.len(), 2);
        assert_eq!((read["usage_usec"], read["user_usec"]), (12, 7));
        assert_eq!(
            (number("5\n"), number("max\n"), number("")),
            (Some(5), None, None)
        );
    }

    #[test]
    fn a_line_of_io_stat_is_a_device() {
        let read = devices("254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\nx:y a=1\n8:1\n");
        let [device] = read.as_slice() else {
            panic!("{read:?}");
        };
        assert_eq!((device.major, device.minor), (254, 0));
        assert_eq!((device.counters["rbytes"], device.counters["wios"]), (1, 4));
    }

    #[test]
    fn received_and_sent_are_not_mixed_up() {
        let text = "Inter-|   Receive      |  Transmit\n face |bytes\n    lo: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n";
        let read = interfaces(text);
        let [lo] = read.as_slice() else {
            panic!("{read:?}");
        };
        assert_eq!(lo.name, "lo");
        assert_eq!((lo.rx_bytes, lo.rx_dropped), (1, 4));
        assert_eq!((lo.tx_bytes, lo.tx_packets, lo.tx_dropped), (9, 10, 12));
    }

    #[test]
    fn a_pressure_file_has_two_lines_or_none() {
        let text = "some avg10=1.50 avg60=0.25 avg300=0.00 total=77\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=5\n";
        let read = pressure(text);
        assert_eq!((read.some.avg10, read.some.total), (1.5, 77));
        assert_eq!((read.full.avg10, read.full.total), (0.0, 5));
        assert_eq!(pressure("").some.total, 0);
    }
}
