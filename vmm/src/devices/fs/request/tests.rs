use super::*;

/// Decodes a request as the device does, with this much room for a reply.
fn request_with(operation: u32, body: &[u8], writable: usize) -> Result<String, i32> {
    let len = IN_HEADER + body.len();
    let header = Header {
        len: u32::try_from(len).unwrap(),
        opcode: operation,
        ..Header::default()
    };
    let seen = header.body(len, writable)?;
    let request = Request::decode(&header, &body[..seen], body.len() - seen)?;
    Ok(format!("{request:?}"))
}

fn request(operation: u32, body: &[u8]) -> Result<String, i32> {
    request_with(operation, body, 4096)
}

fn with(fixed: usize, tail: &[u8]) -> Vec<u8> {
    let mut body = vec![0; fixed];
    body.extend(tail);
    body
}

#[test]
fn names_end_once_and_at_the_end_b59() {
    for (opcode, fixed) in [
        (opcode::LOOKUP, 0),
        (opcode::MKNOD, 16),
        (opcode::MKDIR, 8),
        (opcode::LINK, 8),
        (opcode::UNLINK, 0),
        (opcode::RMDIR, 0),
        (opcode::CREATE, 16),
        (opcode::TMPFILE, 16),
        (opcode::GETXATTR, 8),
        (opcode::REMOVEXATTR, 0),
    ] {
        for (tail, fits) in [
            (&b"name\0"[..], true),
            (b"\0", true),
            (b"name", false),
            (b"", false),
            (b"na\0me\0", false),
            (b"name\0\0", false),
        ] {
            let outcome = request(opcode, &with(fixed, tail));
            assert_eq!(outcome.is_ok(), fits, "{opcode} {tail:?}");
        }
    }
    for (opcode, fixed) in [
        (opcode::SYMLINK, 0),
        (opcode::RENAME, 8),
        (opcode::RENAME2, 16),
    ] {
        for (tail, fits) in [
            (&b"a\0b\0"[..], true),
            (b"\0\0", true),
            (b"a\0", false),
            (b"a\0b", false),
            (b"a\0b\0c\0", false),
        ] {
            let outcome = request(opcode, &with(fixed, tail));
            assert_eq!(outcome.is_ok(), fits, "{opcode} {tail:?}");
        }
    }
    let long = vec![b'x'; 100_000];
    assert_eq!(request(opcode::LOOKUP, &long), Err(libc::EINVAL));
}

#[test]
fn lengths_that_do_not_fit_the_operation_are_refused_b61() {
    for opcode in 0..200 {
        let Some(form) = form(opcode) else {
            assert_eq!(request(opcode, &[0; 64]), Err(libc::ENOSYS), "{opcode}");
            continue;
        };
        if form.fixed > 0 {
            let short = vec![0; form.fixed - 1];
            assert_eq!(request(opcode, &short), Err(libc::EINVAL), "{opcode}");
        }
        let header = Header {
            len: 4000,
            opcode,
            ..Header::default()
        };
        assert_eq!(header.body(3999, 4096), Err(libc::EINVAL));
        assert_eq!(header.body(4001, 4096), Err(libc::EINVAL));
        // Extensions were not agreed on.
        let mut bytes = [0; IN_HEADER];
        bytes[0] = u8::try_from(IN_HEADER + form.fixed).unwrap();
        bytes[4] = u8::try_from(opcode).unwrap();
        let len = IN_HEADER + form.fixed;
        assert_eq!(Header::parse(&bytes).body(len, 4096), Ok(form.fixed));
        bytes[36] = 1;
        assert_eq!(Header::parse(&bytes).body(len, 4096), Err(libc::EINVAL));
    }
    for opcode in [65_535, u32::MAX, 436_207_616] {
        assert_eq!(request(opcode, &[]), Err(libc::ENOSYS));
    }
}

#[test]
fn counts_within_a_request_must_be_true_b60_b62() {
    let count = |count: u32, fixed: usize, at: usize, tail: usize| {
        let mut body = with(fixed, &vec![0; tail]);
        body[at..at + 4].copy_from_slice(&count.to_le_bytes());
        body
    };
    for (opcode, body, fits) in [
        (opcode::BATCH_FORGET, count(2, 8, 0, 32), true),
        (opcode::BATCH_FORGET, count(3, 8, 0, 32), false),
        (opcode::BATCH_FORGET, count(u32::MAX, 8, 0, 32), false),
        (opcode::WRITE, count(5, 40, 16, 5), true),
        (opcode::WRITE, count(6, 40, 16, 5), false),
        (opcode::WRITE, count(u32::MAX, 40, 16, 5), false),
        (opcode::SETXATTR, count(1, 16, 0, 2), true),
        (opcode::SETXATTR, count(2, 16, 0, 2), false),
        (opcode::SETXATTR, count(u32::MAX, 16, 0, 2), false),
    ] {
        assert_eq!(request(opcode, &body).is_ok(), fits, "{opcode}");
    }
}

#[test]
fn a_reply_buffer_one_byte_too_small_is_refused_before_anything_happens_b62() {
    for opcode in 0..64 {
        let Some(form) = form(opcode) else { continue };
        if !wants_reply(opcode) {
            continue;
        }
        let body = match form.tail {
            Tail::Name => with(form.fixed, b"a\0"),
            Tail::TwoNames => with(form.fixed, b"a\0b\0"),
            Tail::NameAndValue => with(form.fixed, b"a\0"),
            _ => with(form.fixed, b""),
        };
        let needed = OUT_HEADER + form.reply;
        assert!(request_with(opcode, &body, needed).is_ok(), "{opcode}");
        let short = request_with(opcode, &body, needed - 1);
        assert_eq!(short, Err(libc::EINVAL));
    }
}
