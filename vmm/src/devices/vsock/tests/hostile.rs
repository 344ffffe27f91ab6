//! Guests that break the rules, ask for too much or offer nothing, and resets.

use super::*;

#[test]
fn connections_beyond_the_cap_are_reset_and_closing_one_makes_room_b54() {
    let mut guest = Guest::new();
    let mut held = Vec::new();
    for port in 0..u32::try_from(GUEST_STREAMS).unwrap() {
        held.push(guest.connect(port));
    }
    for port in 100_000..103_000 {
        guest.send(to_host(port, op::REQUEST), &[]);
        guest.expect(op::RST);
    }
    guest.send(to_host(7, op::RST), &[]);
    let _room = guest.connect(200_000);
}

#[test]
fn requests_are_answered_or_dropped_while_the_guest_offers_no_buffer_b54() {
    let mut guest = Guest::with_buffers(0);
    for port in 0..10_000 {
        guest.send(
            Header {
                dst_port: 9,
                ..to_host(port, op::REQUEST)
            },
            &[],
        );
    }
    // All were taken, and the device still works.
    guest.rx.describe(0, 4096, WRITE);
    guest.rx.make_available(0);
    guest.rx.notify();
    assert_eq!(guest.expect(op::RST).dst_port, 0);
}

#[test]
fn nothing_grows_while_the_guest_offers_no_buffer_b54() {
    let mut guest = Guest::new();
    drop(guest.worker.take());
    let io = guest.io(0);
    let (host, events) = (Arc::clone(&guest.device.host), &guest.device.events);
    let running = events.add(|watch| Mux::new(host, io, watch)).unwrap();
    for port in 0..5000 {
        // Opened and reset by the guest, opened and broken, and never opened.
        guest.send(to_host(port, op::REQUEST), &[]);
        guest.send(to_host(port, op::RST), &[]);
        guest.send(to_host(port, op::REQUEST), &[]);
        guest.send(to_host(port, 99), &[]);
        guest.send(to_host(port, op::RW), &[]);
        while guest.accepted().is_some() {}
    }
    // The last one was taken.
    while guest.free.len() < SIZE.into() {
        match guest.tx.used() {
            Some((index, _)) => guest.free.push_back(index),
            None => guest.wait(),
        }
    }
    let mux = running.stop().unwrap();
    assert!(mux.resets.len() <= RESETS, "{}", mux.resets.len());
    assert!(mux.ready.is_empty(), "{}", mux.ready.len());
    assert!(mux.sockets.is_empty() && mux.by_ports.is_empty());
}

#[test]
fn a_hundred_programs_with_three_streams_each_lose_nothing() {
    let mut guest = Guest::new();
    let path = guest.path.clone();
    let programs = thread::spawn(move || {
        let mut programs: Vec<_> = (0..300)
            .map(|port| {
                let mut program = UnixStream::connect(&path).unwrap();
                program
                    .write_all(format!("CONNECT {port}\n").as_bytes())
                    .unwrap();
                program
            })
            .collect();
        for program in &mut programs {
            program
                .set_read_timeout(Some(Duration::from_secs(20)))
                .unwrap();
            let mut line = [0; 14];
            program.read_exact(&mut line).unwrap();
            assert!(line.starts_with(b"OK ") && line.ends_with(b"\n"));
        }
    });
    for _ in 0..300 {
        let request = guest.expect(op::REQUEST);
        guest.send(answer(&request, op::RESPONSE), &[]);
    }
    programs.join().unwrap();
}

#[test]
fn packets_with_forged_context_ids_reach_nobody_b55() {
    let mut guest = Guest::new();
    for src_cid in [0, 1, 2, 4, u64::from(u32::MAX), u64::MAX] {
        guest.send(
            Header {
                src_cid,
                ..to_host(1, op::REQUEST)
            },
            &[],
        );
    }
    for dst_cid in [0, 1, CID, 4, u64::from(u32::MAX), u64::MAX] {
        guest.send(
            Header {
                dst_cid,
                ..to_host(1, op::REQUEST)
            },
            &[],
        );
        assert_eq!(guest.expect(op::RST).src_cid, dst_cid);
    }
    assert!(guest.accepted().is_none());
}

#[test]
fn only_listed_ports_can_be_connected_to_b56() {
    let mut guest = Guest::new();
    for dst_port in [0, 1, 22, PORT - 1, PORT + 1, u32::MAX] {
        guest.send(
            Header {
                dst_port,
                ..to_host(1, op::REQUEST)
            },
            &[],
        );
        assert_eq!(guest.expect(op::RST).src_port, dst_port);
    }
    assert!(guest.accepted().is_none());
    guest.connect(1);
}

type Offence<'a> = &'a dyn Fn(&mut Guest, Header);

#[test]
fn a_stream_that_breaks_the_rules_is_reset_and_others_live_b57() {
    let mut guest = Guest::new();
    let mut good = guest.connect(1);
    let offences: [Offence<'_>; 6] = [
        // An unknown operation.
        &|guest, header| guest.send(Header { op: 99, ..header }, &[]),
        // More bytes announced than there are.
        &|guest, header| guest.send(data(&header, 100), b"short"),
        // Another request for the same ports.
        &|guest, header| guest.send(header, &[]),
        // An answer that nobody waits for.
        &|guest, header| {
            guest.send(
                Header {
                    op: op::RESPONSE,
                    ..header
                },
                &[],
            );
        },
        // Data after the end of data.
        &|guest, header| {
            let mut end = Header {
                op: op::SHUTDOWN,
                ..header
            };
            end.flags = 2;
            guest.send(end, &[]);
            guest.send(data(&header, 1), b"x");
        },
        // Data beyond credit, with nobody reading.
        &|guest, header| {
            for _ in 0..20 {
                guest.send(data(&header, PACKET), &vec![0; PACKET]);
            }
        },
    ];
    for (port, offence) in (100..).zip(offences) {
        let _host = guest.connect(port);
        offence(&mut guest, to_host(port, op::REQUEST));
        let reset = loop {
            let header = guest.receive().0;
            if header.op == op::RST {
                break header;
            }
        };
        assert_eq!(reset.dst_port, port);
        // What came after the reset is answered by resets of its own.
        while let Some((header, _)) = guest.poll() {
            assert_eq!(header.op, op::RST);
        }
        guest.send(data(&to_host(1, op::RW), 1), b"!");
        good.read_exact(&mut [0]).unwrap();
    }
    // Other socket types do not exist here.
    for kind in [0, 2, 3, u16::MAX] {
        guest.send(
            Header {
                kind,
                ..to_host(900, op::REQUEST)
            },
            &[],
        );
        while guest.receive().0.kind != kind {}
    }
    // No packet at all.
    for len in [0, 1, 43] {
        guest.send_raw(&vec![0xff; len]);
    }
    guest.send(data(&to_host(1, op::RW), 1), b"!");
    good.read_exact(&mut [0]).unwrap();
}

#[test]
fn a_guest_without_room_stops_the_program_and_is_asked_once_for_credit_b57() {
    let mut guest = Guest::new();
    guest.send(
        Header {
            buf_alloc: 10,
            ..to_host(900, op::REQUEST)
        },
        &[],
    );
    guest.expect(op::RESPONSE);
    let mut host = guest.accepted().unwrap();
    host.write_all(&[1; 25]).unwrap();
    assert_eq!(guest.receive().1.len(), 10);
    guest.expect(op::CREDIT_REQUEST);
    let mut more = to_host(900, op::CREDIT_UPDATE);
    more.buf_alloc = 10;
    // Lies do not help.
    more.fwd_cnt = 11;
    guest.send(more, &[]);
    more.fwd_cnt = u32::MAX;
    guest.send(more, &[]);
    more.fwd_cnt = 10;
    guest.send(more, &[]);
    assert_eq!(guest.receive().1.len(), 10);
}

#[test]
fn a_guest_that_does_not_read_holds_the_program_back_b58() {
    let mut guest = Guest::new();
    let mut host = guest.connect(900);
    host.set_nonblocking(true).unwrap();
    let mut written = 0;
    let mut taken = 0;
    loop {
        match host.write(&[7; 8192]) {
            Ok(len) => written += len,
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
        // Never says that its program took something.
        while let Some((header, bytes)) = guest.poll() {
            taken += bytes.len();
            if header.op == op::CREDIT_REQUEST {
                // Credit is used up; the rest stays in the socket.
                assert_eq!(taken, 256 * 1024);
                assert!(written < (1 << 20));
                return;
            }
        }
    }
}

#[test]
fn receive_buffers_for_a_header_alone_come_back_and_data_takes_the_next_b45() {
    let mut guest = Guest::with_buffers(1);
    let mut host = guest.connect(900);
    // The buffer that `connect` gave back is taken by the answer to this.
    let mut credit = to_host(900, op::CREDIT_REQUEST);
    credit.fwd_cnt = 0;
    guest.rx.describe(1, 44, WRITE);
    guest.rx.make_available(1);
    guest.send(credit, &[]);
    assert_eq!(guest.used(), (0, 44));
    host.write_all(b"data").unwrap();
    // Nowhere to go; others are served meanwhile.
    assert_eq!(guest.used(), (1, 0));
    guest.send(data(&to_host(900, op::RW), 4), b"ping");
    host.read_exact(&mut [0; 4]).unwrap();
    guest.rx.describe(2, 48, WRITE);
    guest.rx.make_available(2);
    guest.rx.notify();
    assert_eq!(guest.used(), (2, 48));
    assert_eq!(guest.rx.read(guest.rx.buffer(2).0 + 44, 4), b"data");
}

#[test]
fn a_reset_of_the_device_ends_all_connections() {
    let mut guest = Guest::new();
    let mut host = guest.connect(900);
    guest.worker.take().unwrap().stop();
    assert_eq!(host.read(&mut [0; 8]).unwrap(), 0);
}

#[test]
fn a_device_that_was_reset_is_activated_again_and_serves_its_listener_b48() {
    let mut guest = Guest::new();
    for port in 0..3 {
        let _program = guest.program(port);
        guest.worker.take().unwrap().stop();
        guest.activate(SIZE);
    }
}

#[test]
fn a_ring_that_lies_about_its_index_is_left_alone() {
    let guest = Guest::new();
    for ring in [&guest.tx, &guest.rx] {
        guest
            .mem
            .write_obj(30_000_u16, GuestAddress(ring.base + 0x1002))
            .unwrap();
        ring.notify();
    }
    // The loop still serves others: a program is taken in and let go.
    let mut program = UnixStream::connect(&guest.path).unwrap();
    program.write_all(b"nonsense\n").unwrap();
    let end = program.read(&mut [0; 8]);
    assert!(!matches!(end, Ok(1..)));
    let _ = guest.acceptor.as_fd();
}
