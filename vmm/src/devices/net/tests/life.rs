//! What the driver finds, and what stays when the device is stopped, reset or loses
//! its tap.

use super::*;

#[test]
fn the_driver_finds_address_link_and_mtu() {
    let guest = Guest::new(0);
    assert_eq!(guest.net.id(), 1);
    assert_eq!(guest.net.queue_sizes(), [256, 256]);
    assert_eq!(guest.net.features(), 0b1_1011_1011_1010_1011);
    let config = [2, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0xdc, 5];
    assert_eq!(guest.net.config(), config);
}

#[test]
fn what_no_device_can_be_made_of_is_refused() {
    let events = EventLoop::new("test").unwrap();
    let (tap, _host) = pair();
    let refused = |tap: &OwnedFd, options| {
        let made = Net::new(Arc::clone(&events), tap.try_clone().unwrap(), options);
        made.err().map(|error| error.kind()) == Some(io::ErrorKind::InvalidInput)
    };
    assert!(!refused(&tap, OPTIONS));
    let mac = |mac| Options { mac, ..OPTIONS };
    assert!(refused(&tap, mac([0; 6])));
    assert!(refused(&tap, mac([1, 0, 0x5e, 0, 0, 1])));
    assert!(refused(&tap, Options { mtu: 67, ..OPTIONS }));
    rustix::io::ioctl_fionbio(&tap, false).unwrap();
    assert!(refused(&tap, OPTIONS));
}

#[test]
fn a_device_that_was_stopped_goes_on_where_it_was() {
    let mut guest = Guest::new(60);
    guest.host_sends(plain(), &frame(100, 1));
    let taken = guest.fill_the_tap();
    guest.restart();
    guest.turns();
    guest.expect(&frame(100, 1));
    // What was taken from the queue before is used after.
    let mut sent = 0;
    for round in 0..60 {
        while let Some(got) = guest.host_gets() {
            assert!(got == (plain(), frame(100, sent)), "{sent}");
            sent += 1;
            guest.turns();
        }
        guest.host_sends(plain(), &frame(100, round));
        guest.turns();
        if round < 59 {
            guest.expect(&frame(100, round));
        }
        if round % 10 == 0 {
            guest.restart();
            guest.turns();
        }
    }
    assert_eq!(sent, 30);
    assert!(guest.received().is_none(), "all buffers are full");
    assert_eq!(guest.tx.all_used().len(), 30 - taken);
    let mut heads: Vec<_> = guest.free.iter().copied().collect();
    heads.sort_unstable();
    assert_eq!(heads, (0..QUEUE).collect::<Vec<_>>(), "each once");
}

#[test]
fn a_frame_that_waits_when_the_device_is_stopped_is_counted() {
    let mut guest = Guest::new(8);
    guest.host_sends(to_be_cut(), &frame(12_000, 1));
    guest.turns();
    guest.offer_and_notify(2);
    guest.host_sends(to_be_cut(), &frame(5000, 2));
    guest.turns();
    guest.restart();
    assert_eq!(value(&guest.counters().unfit), 1);
    guest.host_sends(plain(), &frame(100, 3));
    guest.turns();
    guest.expect(&frame(12_000, 1));
    guest.expect(&frame(100, 3));
}

#[test]
fn a_reset_leaves_nothing_to_watch_b48() {
    let mut guest = Guest::new(4);
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    // Other tests open and close some beside it.
    let before = descriptors();
    for _ in 0..1000 {
        guest.fill_the_tap();
        drop(guest.worker.take());
        guest.host_sends(plain(), &frame(100, 1));
        guest.tx.notify();
        guest.rx.notify();
        while guest.host_gets().is_some() {}
        assert!(!guest.events.is_ready(), "nobody is there to be told");
        net::recv(&*guest.net.tap.0, &mut [0; 200][..], RecvFlags::empty()).unwrap();
        for queue in [&guest.rx, &guest.tx] {
            queue.write(queue.base, &[0; 0x3000]);
        }
        let mem = Arc::clone(&guest.rx.mem);
        guest.rx = Driver::with_size(&mem, 0x1000, BUFFER, QUEUE);
        guest.tx = Driver::with_size(&mem, 0x200_0000, SLOT, QUEUE);
        (guest.free, guest.sent) = ((0..QUEUE).collect(), 0);
        guest.offer(4);
        let rings = [&guest.rx, &guest.tx].map(|queue| queue.ring(interrupt(&guest.irq)));
        guest.activate(rings, feature::OFFERED);
        guest.turns();
    }
    assert!(descriptors() < before + 500);
}

#[test]
fn an_interface_that_is_gone_ends_nothing_f47() {
    let mut guest = Guest::new(4);
    let (_, other) = pair();
    drop(std::mem::replace(&mut guest.host, other));
    guest.turns();
    for _ in 0..3 {
        guest.send(plain(), &frame(100, 1));
        guest.notify_sent();
        guest.offer_and_notify(1);
    }
    assert_eq!(value(&guest.counters().refused), 3);
    assert_eq!(guest.tx.all_used().len(), 3);
    assert!(guest.received().is_none());
}

#[test]
fn an_interface_that_is_about_to_go_is_not_reported_again_and_again_f47() {
    let mut guest = Guest::new(4);
    drop(guest.worker.take());
    let queues = [&guest.rx, &guest.tx].map(|queue| Some(queue.ring(interrupt(&guest.irq))));
    let io = Io {
        queues: queues.into(),
        features: feature::OFFERED,
    };
    let registration = guest.events.add(|watch| {
        let mut server = Server::new(&guest.net, io, watch)?;
        // It gives nothing, and no error yet.
        for (events, watched) in [(EventFlags::IN, true), (EventFlags::ERR, false)] {
            server.ready(READABLE, events, watch)?;
            assert_eq!(server.readable.is_some(), watched);
        }
        Ok(server)
    });
    drop(registration.unwrap());
}

#[test]
fn an_interface_that_goes_while_it_is_full_ends_nothing_f47() {
    let mut guest = Guest::new(0);
    let taken = guest.fill_the_tap();
    let (_, other) = pair();
    drop(std::mem::replace(&mut guest.host, other));
    guest.turns();
    assert_eq!(guest.tx.all_used().len(), 30 - taken);
    assert_eq!(value(&guest.counters().refused), 30 - taken as u64);
}

#[test]
fn a_driver_that_leaves_a_queue_out_is_refused() {
    let guest = Guest::new(0);
    let (tap, _host) = pair();
    let mut net = Net::new(Arc::clone(&guest.events), tap, OPTIONS).unwrap();
    for missing in [0, 1] {
        let mut queues = vec![None, None];
        queues[1 - missing] = Some(guest.rx.ring(interrupt(&guest.irq)));
        assert!(
            net.activate(Io {
                queues,
                features: 0
            })
            .is_err()
        );
    }
    assert!(
        net.activate(Io {
            queues: vec![],
            features: 0
        })
        .is_err()
    );
}
