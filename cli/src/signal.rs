//! Signals by name and number.

use std::str::FromStr;

use nix::sys::signal::Signal;

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
        // Second names of signal(7).
        let name = match name {
            "IOT" => "ABRT",
            "POLL" => "IO",
            name => name,
        };
        if let Ok(signal) = Signal::from_str(&format!("SIG{name}")) {
            return Ok(Number((signal as i32).unsigned_abs()));
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
            ("SIGIOT", 6),
            ("poll", 29),
            ("STKFLT", 16),
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
