//! The machine of a pod follows its containers.

use std::{
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    output::within,
    pod::Pod,
    process::Streams,
    root::{Root, config, forever, process},
};

/// A member of this sandbox, or a sandbox, with a limit of memory.
fn limited(sandbox: Option<&Pod>, mib: u64) -> Value {
    let mut config = config(&forever(&[]));
    config["annotations"] = match sandbox {
        None => json!({"io.kubernetes.cri.container-type": "sandbox"}),
        Some(pod) => json!({
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": pod.id(),
        }),
    };
    config["linux"]["resources"]["memory"] = json!({"limit": mib << 20});
    config
}

/// MiB of memory that the guest has.
fn memory(pod: &Pod) -> u64 {
    let shows = process(&["cat", "/proc/meminfo"]);
    let shows = pod.exec(&shows, Streams::Output);
    shows.start().unwrap();
    let text = shows.output(within(Duration::from_secs(20)));
    let text = String::from_utf8(text).unwrap();
    assert_eq!(shows.wait(), 0, "{text}");
    shows.delete().unwrap();
    let total = text
        .lines()
        .next()
        .and_then(|line| line.split_whitespace().nth(1));
    total.unwrap().parse::<u64>().unwrap() >> 10
}

/// Waits until the guest has so much. What its kernel uses itself it cannot give back.
fn becomes(pod: &Pod, mib: u64) {
    const KEPT: u64 = 16;
    let end = Instant::now() + Duration::from_secs(60);
    while !(mib..=mib + KEPT).contains(&memory(pod)) {
        assert!(Instant::now() < end, "{} MiB, not {mib}", memory(pod));
        thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn the_machine_grows_for_a_container_that_joins_and_shrinks_when_it_leaves_rs_13() {
    let pod = Pod::start("sandbox", Root::new(), &limited(None, 64));
    pod.run(Streams::Nothing);
    let first = memory(&pod);
    let member = pod.join("member", Root::new(), &limited(Some(&pod), 300));
    member.run(Streams::Nothing);
    assert_eq!(memory(&pod), first + 300);
    // It can be used: more than the machine had at first.
    let uses = process(&["dd", "if=/dev/zero", "of=/dev/null", "bs=250M", "count=1"]);
    let uses = member.exec(&uses, Streams::Output);
    uses.start().unwrap();
    assert_eq!(uses.wait(), 0, "{}", uses.words());
    let small = pod.join("small", Root::new(), &limited(Some(&pod), 32));
    small.run(Streams::Nothing);
    assert_eq!(memory(&pod), first + 332);
    small.leave();
    member.leave();
    becomes(&pod, first);
    pod.end();
}
