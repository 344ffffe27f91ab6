//! Signals by name and number.

use std::str::FromStr;

/// Names without `SIG`, with their numbers on x86-64 (signal(7)).
const NAMES: [(&str, u32); 33] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("IOT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("POLL", 29),
    ("PWR", 30),
    ("SYS", 31),
];

/// The number of a signal, 1 to 64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Number(pub(crate) u32);

impl FromStr for Number {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(number) = text.parse::<u32>() {
            return match number {
                1..=64 => Ok(Number(number)),
                _ => Err("signals are numbered from 1 to 64".to_owned()),
            };
        }
        let upper = text.to_ascii_uppercase();
        let name = upper.strip_prefix("SIG").unwrap_or(&upper);
        if let Some(&(_, number)) = NAMES.iter().find(|(known, _)| *known == name) {
            return Ok(Number(number));
        }
        // Real-time signals as kill(1) of the C library counts them.
        let offset = |rest: &str| rest.parse::<u32>().ok().filter(|offset| *offset <= 30);
        let number = match name {
            "RTMIN" => Some(34),
            "RTMAX" => Some(64),
            _ => name
                .strip_prefix("RTMIN+")
                .and_then(|rest| Some(34 + offset(rest)?))
                .or_else(|| {
                    name.strip_prefix("RTMAX-")
                        .and_then(|rest| Some(64 - offset(rest)?))
                }),
        };
        number
            .map(Number)
            .ok_or_else(|| format!("there is no signal {text:?}; `kill -l` lists them"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_understood() {
        let cases = [
            ("TERM", 15),
            ("SIGTERM", 15),
            ("sigint", 2),
            ("9", 9),
            ("RTMIN+3", 37),
            ("SIGRTMAX-1", 63),
        ];
        for (text, number) in cases {
            assert_eq!(text.parse(), Ok(Number(number)), "{text}");
        }
        for text in ["", "0", "65", "-1", "SIG", "NOPE", "RTMIN+99", "RTMAX-31"] {
            assert!(text.parse::<Number>().is_err(), "{text}");
        }
    }
}
