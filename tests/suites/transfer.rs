//! Files that are copied into a container and out of it by the shim's socket: the Transfer
//! and Streaming services, in a guest, without containerd.
#![expect(
    clippy::tests_outside_test_module,
    reason = "the whole crate is a suite"
)]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "transfer/caller.rs"]
mod caller;
#[path = "shim/client.rs"]
mod client;
#[path = "shim/task.rs"]
mod task;

use std::{
    collections::BTreeMap,
    fs,
    io::Read,
    process::Command,
    sync::LazyLock,
    time::{Duration, Instant},
};

use bulkhead_shim::transfer::proto::transfer::TransferRequest;
use bulkhead_tests::bundle;
use caller::{At, Caller};
use client::{Shim, ext4, mount};
use containerd_shim_protos::{
    api::{Empty, ExecProcessRequest, StatsRequest, StatsResponse},
    cgroups_v2::metrics::Metrics,
    protobuf::{Message, well_known_types::any::Any},
    shim_async::Client,
};
use serde_json::json;
use tokio::runtime::{Builder, Runtime};
use ttrpc::Code;

const LIMIT: Duration = Duration::from_secs(120);

/// Waits for what callers do.
fn block_on<T>(doing: impl Future<Output = T>) -> T {
    static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
        let mut builder = Builder::new_current_thread();
        builder.enable_all().build().unwrap()
    });
    RUNTIME.block_on(doing)
}

/// A container that sleeps, with a directory of the host as its root.
fn sleeper(id: &str) -> Shim {
    let shim = Shim::start(id, &bundle::config("sleep 10000"));
    root(&shim);
    shim.create(Vec::new()).unwrap();
    shim.start_program().unwrap();
    shim
}

/// Fills the root of a bundle.
fn root(shim: &Shim) {
    let root = shim.bundle().join("rootfs");
    fs::create_dir(&root).unwrap();
    bundle::busybox_root(&root);
    for place in ["proc", "tmp", "data"] {
        fs::create_dir_all(root.join(place)).unwrap();
    }
}

impl Shim {
    /// Somebody on a connection of their own.
    fn caller(&self) -> Caller {
        let address = fs::read_to_string(self.bundle().join("address")).unwrap();
        Caller(block_on(Client::connect(address.trim())).unwrap())
    }

    fn at(&self, path: &str) -> At {
        At {
            container: self.id.clone(),
            path: path.to_owned(),
            ..At::default()
        }
    }

    /// What a shell in the container says.
    fn sh(&self, script: &str) -> String {
        let output = self.bundle().join("exec");
        let process = json!({
            "args": ["sh", "-c", script], "cwd": "/", "env": ["PATH=/bin"],
            "user": {"uid": 0, "gid": 0},
        });
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
            value: process.to_string().into_bytes(),
            ..Any::default()
        };
        let request = ExecProcessRequest {
            id: self.id.clone(),
            exec_id: "e".into(),
            spec: Some(spec).into(),
            stdout: format!("file://{}", output.display()),
            stderr: format!("file://{}", output.display()),
            ..ExecProcessRequest::default()
        };
        self.task.call::<Empty>("Exec", &request).unwrap();
        self.task.start("e").unwrap();
        self.task.wait("e").unwrap();
        self.task.delete("e").unwrap();
        let said = fs::read_to_string(&output).unwrap_or_default();
        fs::remove_file(output).unwrap();
        said
    }

    /// How many processes the guest has for the container.
    fn processes(&self) -> u64 {
        let request = StatsRequest {
            id: self.id.clone(),
            ..StatsRequest::default()
        };
        let answer = self.task.call::<StatsResponse>("Stats", &request);
        let metrics = Metrics::parse_from_bytes(&answer.unwrap().stats.value).unwrap();
        metrics.pids.current
    }

    /// Waits until nobody copies in the container any more.
    fn is_left_alone(&self) {
        let begin = Instant::now();
        while self.processes() > 1 {
            assert!(begin.elapsed() < LIMIT, "a process is left");
            // Connections of callers that have gone are closed meanwhile.
            block_on(async { tokio::time::sleep(Duration::from_millis(10)).await });
        }
    }

    fn end(self) {
        self.kill().unwrap();
        assert_eq!(self.wait(), Ok(137), "{}", self.said());
        assert_eq!(self.delete(), Ok(137));
        self.shutdown();
    }
}

fn header(size: usize) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_size(size.try_into().unwrap());
    header.set_mode(0o644);
    header.set_uid(1000);
    header.set_gid(1000);
    header.set_mtime(1_000_000_000);
    header
}

fn archive<'a>(files: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = header(content.len());
        builder.append_data(&mut header, name, content).unwrap();
    }
    builder.into_inner().unwrap()
}

fn files(tar: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let mut archive = tar::Archive::new(tar);
    let mut files = BTreeMap::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let name = String::from_utf8(entry.path_bytes().to_vec()).unwrap();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        files.insert(name, content);
    }
    files
}

/// Bytes of which each place can be told.
fn pattern(length: usize) -> Vec<u8> {
    let words = (0_u64..).flat_map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    words.take(length).collect()
}

/// So many mebibytes that are not the same, made fast.
fn mebibytes(count: u8) -> Vec<u8> {
    let one = pattern(1 << 20);
    let mut all = Vec::new();
    for number in 0..count {
        all.extend_from_slice(&[number; 8]);
        all.extend_from_slice(&one[8..]);
    }
    all
}

#[test]
fn a_file_is_copied_in_seen_by_an_exec_and_copied_out_again_ss_18_ss_19_ss_20() {
    let shim = sleeper("round");
    let caller = shim.caller();
    let content = b"twenty-five bytes of text";
    let tar = archive([("transferred.txt", &content[..])]);
    let copied = block_on(caller.copy_in(&tar, &shim.at("/tmp")));
    assert_eq!(copied, Ok(()));
    let seen = shim.sh("cat /tmp/transferred.txt; stat -c ' %u %a' /tmp/transferred.txt");
    assert_eq!(seen, "twenty-five bytes of text 0 644\n");
    let out = block_on(caller.copy_out(&shim.at("/tmp/transferred.txt")));
    let out = files(&out.unwrap());
    assert_eq!(
        out,
        BTreeMap::from([("transferred.txt".into(), content.to_vec())])
    );

    let mut kept = shim.at("/tmp/a/b");
    kept.preserve_ownership = true;
    block_on(caller.copy_in(&tar, &kept)).unwrap();
    assert_eq!(
        shim.sh("stat -c %u /tmp/a /tmp/a/b/transferred.txt"),
        "0\n1000\n"
    );
    let tree = block_on(caller.copy_out(&shim.at("/tmp/a"))).unwrap();
    let names: Vec<String> = files(&tree).into_keys().collect();
    assert_eq!(names, ["a/", "a/b/", "a/b/transferred.txt"]);
    let mut header = shim.at("/tmp/a");
    header.no_walk = true;
    let header = block_on(caller.copy_out(&header)).unwrap();
    assert_eq!(files(&header).into_keys().collect::<Vec<_>>(), ["a/"]);
    shim.is_left_alone();
    shim.end();
}

#[test]
fn what_cannot_be_copied_is_refused_at_once_and_nothing_leaves_the_container_ss_63() {
    let shim = sleeper("refused");
    let caller = shim.caller();
    let probe = block_on(caller.transfer(&TransferRequest::default()));
    assert_eq!(probe, Err(Code::INVALID_ARGUMENT));
    let long = format!("/.fuzz-missing/{}", "x/".repeat(1900));
    for path in ["/.fuzz-missing", "/.fuzz-missing/a", "/etc/passwd/x", &long] {
        let mut at = shim.at(path);
        at.no_walk = true;
        let begin = Instant::now();
        let missing = block_on(caller.copy_out(&at));
        assert_eq!(missing, Err(Code::NOT_FOUND), "{path}");
        assert!(begin.elapsed() < Duration::from_secs(20));
    }
    let unknown = At {
        container: "another".into(),
        ..shim.at("/")
    };
    let tar = archive([("f", &b"x"[..])]);
    assert_eq!(
        block_on(caller.copy_in(&tar, &unknown)),
        Err(Code::NOT_FOUND)
    );
    assert_eq!(block_on(caller.copy_out(&unknown)), Err(Code::NOT_FOUND));

    // Upwards, through links of the container, and through links of the archive.
    shim.sh("ln -s ../../../../../../run /tmp/up; ln -s /etc /tmp/etc");
    block_on(caller.copy_in(&tar, &shim.at("/tmp/up/../../x"))).unwrap();
    assert_eq!(shim.sh("cat /x/f"), "x");
    let through = archive([("etc/passwd", &b"x"[..])]);
    let refused = block_on(caller.copy_in(&through, &shim.at("/tmp")));
    assert_eq!(refused, Err(Code::INVALID_ARGUMENT));
    let mut builder = tar::Builder::new(Vec::new());
    let mut link = header(0);
    link.set_entry_type(tar::EntryType::Symlink);
    builder.append_link(&mut link, "l", "/etc").unwrap();
    builder
        .append_data(&mut header(1), "l/passwd", &b"x"[..])
        .unwrap();
    let attack = builder.into_inner().unwrap();
    let refused = block_on(caller.copy_in(&attack, &shim.at("/data")));
    assert_eq!(refused, Err(Code::INVALID_ARGUMENT));
    assert!(!shim.sh("cat /etc/passwd").starts_with('x'));
    let garbage = block_on(caller.copy_in(&[b'x'; 10_000], &shim.at("/data")));
    assert_eq!(garbage, Err(Code::INVALID_ARGUMENT));
    shim.is_left_alone();
    shim.end();
}

#[test]
#[ignore = "it takes three minutes: cargo xtask test --full runs it"]
fn a_thousand_small_files_are_copied_overwritten_and_compared_ss_61() {
    let shim = sleeper("many");
    let caller = shim.caller();
    let name = |number: usize| format!("file-{number:04}");
    let all: BTreeMap<String, Vec<u8>> = (0..1000)
        .map(|number| (name(number), pattern(number)))
        .collect();
    let tar = archive(all.iter().map(|(name, content)| (&**name, &**content)));
    block_on(caller.copy_in(&tar, &shim.at("/tmp/stress-read"))).unwrap();
    // Three on one connection, at the same time.
    block_on(async {
        let headers = async {
            for number in 0..20 {
                let mut at = shim.at(&format!("/tmp/stress-read/{}", name(900 + number)));
                at.no_walk = true;
                let header = caller.copy_out(&at).await.unwrap();
                let mut archive = tar::Archive::new(&*header);
                let entry = archive.entries().unwrap().next().unwrap().unwrap();
                assert_eq!(entry.size(), 900 + number as u64);
            }
        };
        let overwrite = async {
            for number in 0..20 {
                let tar = archive([(&*name(number), &b"other"[..])]);
                let to = shim.at("/tmp/stress-read");
                caller.copy_in(&tar, &to).await.unwrap();
            }
        };
        let compare = async {
            for number in 500..520 {
                let at = shim.at(&format!("/tmp/stress-read/{}", name(number)));
                let out = files(&caller.copy_out(&at).await.unwrap());
                assert_eq!(out[&name(number)], all[&name(number)]);
            }
        };
        tokio::join!(headers, overwrite, compare);
    });
    let out = block_on(caller.copy_out(&shim.at("/tmp/stress-read"))).unwrap();
    let out = files(&out);
    assert_eq!(out.len(), 1001);
    for (number, (name, content)) in all.iter().enumerate() {
        let seen = &out[&format!("stress-read/{name}")];
        if number < 20 {
            assert_eq!(seen, b"other", "{name}");
        } else {
            assert!(seen == content, "{name}");
        }
    }
    shim.is_left_alone();
    shim.end();
}

#[test]
#[ignore = "it takes three minutes: cargo xtask test --full runs it"]
fn thirty_six_mebibytes_arrive_as_they_were_both_ways_and_on_a_disk_too_ss_61() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk");
    ext4(&image);
    // More than the disk has.
    let large = mebibytes(36);
    let tar = archive([("large", &*large)]);
    let shim = sleeper("large");
    let caller = shim.caller();
    let begin = Instant::now();
    block_on(caller.copy_in(&tar, &shim.at("/data"))).unwrap();
    eprintln!("36 MiB in: {:?}", begin.elapsed());
    let file = dir.path().join("large");
    fs::write(&file, &large).unwrap();
    let sum = Command::new("sha256sum").arg(&file).output().unwrap();
    let sum = String::from_utf8(sum.stdout).unwrap();
    let sum = sum.split_whitespace().next().unwrap();
    assert!(shim.sh("sha256sum /data/large").starts_with(sum));
    let begin = Instant::now();
    let out = block_on(caller.copy_out(&shim.at("/data/large"))).unwrap();
    eprintln!("36 MiB out: {:?}", begin.elapsed());
    assert!(files(&out)["large"] == large);
    shim.end();

    // What is no directory of the host, and smaller than what is sent.
    let shim = Shim::start("full", &bundle::config("sleep 10000"));
    let rootfs = mount("ext4", &image, &["rw"]);
    shim.create(vec![rootfs]).unwrap();
    shim.start_program().unwrap();
    let full = block_on(shim.caller().copy_in(&tar, &shim.at("/data")));
    assert_eq!(full, Err(Code::RESOURCE_EXHAUSTED));
    // What there was room for is there, as with any tar.
    shim.sh("rm /data/large");
    let small = archive([("small", &large[..100_000])]);
    block_on(shim.caller().copy_in(&small, &shim.at("/other"))).unwrap();
    let out = block_on(shim.caller().copy_out(&shim.at("/other/small")));
    assert!(files(&out.unwrap())["small"] == large[..100_000]);
    shim.end();
}

#[test]
fn a_copy_whose_caller_stalls_or_goes_leaves_the_others_alone_and_nothing_behind() {
    let shim = sleeper("cancel");
    shim.sh("dd if=/dev/zero of=/data/big bs=1M count=8");
    let tar = archive([("f", &pattern(1 << 20)[..])]);
    let caller = shim.caller();
    for round in 0..2 {
        let gone = shim.caller();
        block_on(async {
            // One has sent a part, one has taken a part, one takes nothing at all.
            let mut half = gone.open().await;
            let request = half.inwards(&shim.at("/data/half"));
            let first = gone.transfer(&request);
            let mut taken = gone.open().await;
            let request = taken.outwards(&shim.at("/data/big"));
            let second = gone.transfer(&request);
            let stalled = gone.open().await;
            let request = stalled.outwards(&shim.at("/data/big"));
            let third = gone.transfer(&request);
            let others = async {
                assert!(half.pour(&tar[..300_000]).await);
                taken.grant(100_000).await;
                taken.hear().await.expect("a part");
                let whole = caller.copy_out(&shim.at("/data/big")).await.unwrap();
                assert_eq!(files(&whole)["big"].len(), 8 << 20);
            };
            tokio::select! {
                ended = first => panic!("{ended:?}"),
                ended = second => panic!("{ended:?}"),
                ended = third => panic!("{ended:?}"),
                () = others => {}
            }
        });
        assert!(shim.processes() > 1, "round {round}: nobody copies");
        drop(gone);
        shim.is_left_alone();
    }
    // One that lasts until its container ends.
    let stalled = block_on(caller.open());
    let request = stalled.outwards(&shim.at("/data/big"));
    let ended = block_on(async {
        let transfer = caller.transfer(&request);
        let kill = async {
            tokio::time::sleep(Duration::from_secs(2)).await;
            shim.task.kill("", true).unwrap();
        };
        tokio::join!(transfer, kill).0
    });
    assert!(ended.is_err());
    // The copy may be gone before its container is.
    assert_eq!(shim.wait(), Ok(137));
    shim.delete().unwrap();
    shim.shutdown();
}

#[test]
fn volumes_are_written_where_they_are_and_read_only_ones_are_not() {
    let volume = tempfile::tempdir().unwrap();
    let mut config = bundle::config("sleep 10000");
    for (place, option) in [("/rw", "rw"), ("/ro", "ro")] {
        let mount = json!({
            "destination": place, "type": "bind", "source": volume.path(),
            "options": ["rbind", option],
        });
        config["mounts"].as_array_mut().unwrap().push(mount);
    }
    let shim = Shim::start("volume", &config);
    root(&shim);
    shim.create(Vec::new()).unwrap();
    shim.start_program().unwrap();
    let caller = shim.caller();
    let tar = archive([("f", &b"x"[..])]);
    block_on(caller.copy_in(&tar, &shim.at("/rw/d"))).unwrap();
    assert_eq!(fs::read(volume.path().join("d/f")).unwrap(), b"x");
    let refused = block_on(caller.copy_in(&tar, &shim.at("/ro/e")));
    assert_eq!(refused, Err(Code::FAILED_PRECONDITION));
    let out = block_on(caller.copy_out(&shim.at("/ro/d/f"))).unwrap();
    assert_eq!(files(&out)["f"], b"x");
    shim.end();
}
