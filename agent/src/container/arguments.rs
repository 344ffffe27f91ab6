//! What the host names in a call: ids, signals, sizes of terminals.

use bulkhead_agent_api::agent::Stdio;

use crate::error::Error;

/// Ids become names of cgroups.
pub(super) fn check_id(id: &str) -> Result<(), Error> {
    const BYTES_MAX: usize = 128;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    let good = id.len() <= BYTES_MAX
        && id
            .bytes()
            .next()
            .is_some_and(|first| first.is_ascii_alphanumeric())
        && id.bytes().all(plain);
    if good {
        Ok(())
    } else {
        Err(Error::BadId(id.chars().take(BYTES_MAX).collect()))
    }
}

pub(super) fn check_signal(signal: u32) -> Result<i32, Error> {
    match i32::try_from(signal) {
        Ok(number @ 0..=64) => Ok(number),
        _ => Err(Error::BadSignal(signal)),
    }
}

pub(super) fn terminal_size(stdio: &Stdio) -> Result<Option<(u16, u16)>, Error> {
    if stdio.terminal {
        size(stdio.columns, stdio.rows).map(Some)
    } else {
        Ok(None)
    }
}

pub(super) fn size(columns: u32, rows: u32) -> Result<(u16, u16), Error> {
    match (u16::try_from(columns), u16::try_from(rows)) {
        (Ok(columns), Ok(rows)) => Ok((columns, rows)),
        _ => Err(Error::BadSize { columns, rows }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_no_path_b18() {
        let long = "a".repeat(128);
        for good in ["a", "0", "A.b_c-d", &long] {
            assert!(check_id(good).is_ok(), "{good}");
        }
        let too_long = "a".repeat(129);
        for bad in [
            "", ".", "..", "../x", "a/b", "-a", "_a", "a\0", "a\n", "é", "%n", &too_long,
        ] {
            assert!(matches!(check_id(bad), Err(Error::BadId(_))), "{bad}");
        }
    }

    #[test]
    fn a_signal_is_zero_to_sixty_four_b26() {
        assert_eq!(check_signal(0).unwrap(), 0);
        assert_eq!(check_signal(64).unwrap(), 64);
        assert!(check_signal(65).is_err());
        assert!(check_signal(u32::MAX).is_err());
    }

    #[test]
    fn a_terminal_has_sixteen_bits_of_size_b25() {
        assert_eq!(size(0, 0).unwrap(), (0, 0));
        assert_eq!(size(65_535, 65_535).unwrap(), (65_535, 65_535));
        assert!(size(65_536, 1).is_err());
    }
}
