//! Requests and answers over the socket, of a machine that is none.

use std::{thread, thread::JoinHandle};

use rustix::net::{AddressFamily, SocketFlags, SocketType, recv, socketpair};

use super::*;
use crate::standing::Stand;
use std::sync::Arc;

struct Served {
    socket: OwnedFd,
    gate: Arc<Gate>,
    ending: Ending,
    thread: JoinHandle<(End, String)>,
}

/// A machine of so many processors, none of which has come to the gate.
fn serve(processors: usize) -> Served {
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    let gate = Gate::new(processors).unwrap();
    let ending = Ending::new().unwrap();
    let (its_gate, its_ending) = (Arc::clone(&gate), ending.clone());
    let thread = thread::spawn(move || {
        let control = Control {
            socket: Some(theirs),
            gate: &its_gate,
            hotplug: None,
            present: &Present::default(),
            status: |paused| Status {
                paused,
                vcpus: 3,
                most_vcpus: 4,
                memory_mib: 64,
                most_memory_mib: 128,
                exits: Exits::default(),
                running_us: 5,
            },
            standing: || "x".repeat(LONGEST),
        };
        control.serve(&its_ending)
    });
    Served {
        socket: ours,
        gate,
        ending,
        thread,
    }
}

impl Served {
    fn ask(&self, number: u64, request: Request) {
        let message = encode(&Asked { number, request }).unwrap();
        send(&self.socket, &message, SendFlags::empty()).unwrap();
    }

    fn answer(&self) -> (u64, Answer) {
        let mut message = vec![0; LONGEST];
        let (length, _) = recv(&self.socket, message.as_mut_slice(), RecvFlags::empty()).unwrap();
        let Answered { number, answer } = decode(&message[..length]).unwrap();
        (number, answer)
    }
}

#[test]
fn the_messages_are_what_the_documentation_shows() {
    let asked = Asked {
        number: 7,
        request: Request::Pause,
    };
    let text = String::from_utf8(encode(&asked).unwrap()).unwrap();
    assert_eq!(text, r#"{"number":7,"request":"pause"}"#);
    let answered: Answered = decode(br#"{"number":7,"answer":{"refused":"no"}}"#).unwrap();
    assert_eq!(answered.answer, Answer::Refused("no".into()));
}

#[test]
fn the_machine_ends_when_the_socket_does_f1() {
    let served = serve(1);
    drop(served.socket);
    let (end, reason) = served.thread.join().unwrap();
    assert_eq!(end, End::Orphaned);
    assert_eq!(reason, "Whoever started the virtual machine is gone");
}

#[test]
fn the_machines_own_end_ends_the_service() {
    let served = serve(1);
    served.ending.end(End::PowerOff, "off");
    assert_eq!(served.thread.join().unwrap(), (End::PowerOff, "off".into()));
}

#[test]
fn a_pause_is_answered_when_the_last_processor_has_stopped() {
    let served = serve(1);
    served.gate.open();
    served.ask(1, Request::Pause);
    // Others are served while the processor is held up.
    served.ask(2, Request::Status);
    let (number, answer) = served.answer();
    let Answer::Status(status) = answer else {
        panic!("{answer:?}");
    };
    assert_eq!((number, status.paused, status.vcpus), (2, false, 3));
    let gate = Arc::clone(&served.gate);
    let processor = thread::spawn(move || {
        gate.wait(0, Stand::default(), &std::sync::atomic::AtomicU8::new(1));
    });
    assert_eq!(served.answer(), (1, Answer::Done));
    served.ask(3, Request::Pause);
    assert_eq!(served.answer(), (3, Answer::Done), "paused already");
    served.ask(4, Request::Status);
    assert!(matches!(served.answer(), (4, Answer::Status(status)) if status.paused));
    served.ask(5, Request::Resume);
    assert_eq!(served.answer(), (5, Answer::Done));
    processor.join().unwrap();
}

#[test]
fn a_resume_ends_a_pause_that_waits() {
    let served = serve(1);
    served.gate.open();
    served.ask(1, Request::Pause);
    served.ask(2, Request::Resume);
    let refused = Answer::Refused("Resumed meanwhile".into());
    assert_eq!(served.answer(), (1, refused));
    assert_eq!(served.answer(), (2, Answer::Done));
    assert!(!served.gate.is_closed());
}

#[test]
fn what_is_no_request_is_refused_and_the_machine_goes_on() {
    let served = serve(1);
    let long = vec![b' '; LONGEST + 1];
    for message in [&b"{"[..], b"{\"number\":1,\"request\":\"sing\"}", &long] {
        send(&served.socket, message, SendFlags::empty()).unwrap();
        let (number, answer) = served.answer();
        assert_eq!(number, 0);
        assert!(matches!(answer, Answer::Refused(_)), "{answer:?}");
    }
    served.ask(9, Request::Status);
    assert_eq!(served.answer().0, 9);
}

#[test]
fn words_without_end_are_cut_to_what_a_message_holds() {
    let served = serve(1);
    served.ask(1, Request::Standing);
    assert!(matches!(served.answer(), (1, Answer::Standing(words)) if words.len() > 1000));
}

#[test]
fn a_disk_needs_a_descriptor_and_a_place() {
    let served = serve(1);
    served.ask(1, Request::Attach { read_only: true });
    let refused = Answer::Refused("no descriptor came along".into());
    assert_eq!(served.answer(), (1, refused));
    served.ask(2, Request::Detach { device: 0 });
    let refused = Answer::Refused("the machine is as large as it will ever be".into());
    assert_eq!(served.answer(), (2, refused));
}

#[test]
fn a_limit_is_for_a_disk_or_an_interface_that_is_there() {
    let served = serve(1);
    let text = br#"{"number":1,"request":{"limit":{"device":3,
        "limits":{"disk":{"bytes":{"per_second":1000000}}}}}}"#;
    send(&served.socket, text, SendFlags::empty()).unwrap();
    let refused = Answer::Refused("no disk and no interface is device 3".into());
    assert_eq!(served.answer(), (1, refused));
    served.ask(2, Request::Disks);
    assert_eq!(served.answer(), (2, Answer::Disks(Vec::new())));
    served.ask(3, Request::Interfaces);
    assert_eq!(served.answer(), (3, Answer::Interfaces(Vec::new())));
}

#[test]
fn whoever_never_reads_ends_the_machine_instead_of_blocking_it() {
    let served = serve(1);
    let message = encode(&Asked {
        number: 1,
        request: Request::Status,
    })
    .unwrap();
    let ended = loop {
        if send(&served.socket, &message, SendFlags::NOSIGNAL).is_err() {
            break served.thread.join().unwrap();
        }
    };
    assert_eq!(ended.0, End::Orphaned);
    assert!(ended.1.contains("takes no answer"), "{}", ended.1);
}
