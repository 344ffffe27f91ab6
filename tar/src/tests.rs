//! Fields of headers; whole archives are tested with what is made of them.

use super::*;

#[test]
fn numbers_are_octal_or_in_base_256() {
    for (field, value) in [
        (&b"0000644\0"[..], Some(0o644)),
        (b"  644 \0\0", Some(0o644)),
        (b"\0\0\0\0\0\0\0\0", Some(0)),
        (b"00000644", Some(0o644)),
        (b"\x80\0\0\0\0\0\x01\0", Some(256)),
        (b"\xff\xff\xff\xff\xff\xff\xff\xfb", Some(-5)),
        (b"\x80\x7f\xff\xff\xff\xff\xff\xff\xff", Some(i64::MAX)),
        (b"\x80\x80\0\0\0\0\0\0\0", None),
        (b"0000648\0", None),
        (b"-1\0", None),
        (b"+1\0", None),
    ] {
        assert_eq!(number(field).ok(), value, "{field:?}");
    }
}

#[test]
fn times_have_fractions_and_signs() {
    for (text, expected) in [
        ("1", Some((1, 0))),
        ("1.5", Some((1, 500_000_000))),
        ("1.", Some((1, 0))),
        ("0.1234567899", Some((0, 123_456_789))),
        ("-1.25", Some((-2, 750_000_000))),
        ("-0.5", Some((-1, 500_000_000))),
        ("-3", Some((-3, 0))),
        ("1.x", None),
        ("+1", None),
        ("99999999999999999999", None),
    ] {
        let seen = time(text.as_bytes()).ok();
        let seen = seen.map(|time| (time.seconds, time.nanoseconds));
        assert_eq!(seen, expected, "{text}");
    }
}

#[test]
fn records_count_their_own_length() {
    let mut extended = Extended::default();
    extended.records(b"12 path=a\nb\n6 a==\n5 b=\n").unwrap();
    assert_eq!(extended.get("path"), Some(&b"a\nb"[..]));
    assert_eq!(extended.get("a"), Some(&b"="[..]));
    assert_eq!(extended.get("b"), None);
    for text in [
        &b"8 path=a\n"[..],
        b"x path=a\n",
        b"10 path=ab\n",
        b"5 =b\n",
        b"999 a=b\n",
        b"4 a\n",
    ] {
        assert!(Extended::default().records(text).is_err(), "{text:?}");
    }
}
