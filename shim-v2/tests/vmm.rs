//! The shim's side of a VMM with the real program and guests of a few bytes. Needs
//! root, a usable `/dev/kvm` and the program beside the shim's; is skipped without.
#![expect(
    clippy::tests_outside_test_module,
    reason = "the whole crate is a suite"
)]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    fs::{self, File},
    future::Future,
    io::{Seek, Write},
    os::{fd::OwnedFd, unix::net::UnixListener},
    path::PathBuf,
    time::Duration,
};

use bulkhead_shim::vm::{
    Shape, Size,
    vmm::{Launch, Vmm},
};
use bulkhead_vmm::config::{Policy, Share};
use rustix::{
    fs::MemfdFlags,
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount},
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
    thread::UnshareFlags,
};

/// A guest that never leaves by itself: `jmp $`.
const SPINS: &[u8] = &[0xeb, 0xfe];
/// One that powers off: `mov dx, 0x600; mov al, 1; out dx, al; jmp $`.
const POWERS_OFF: &[u8] = &[0x66, 0xba, 0x00, 0x06, 0xb0, 0x01, 0xee, 0xeb, 0xfe];

/// Time in which things must happen.
const LIMIT: Duration = Duration::from_secs(20);

fn file(content: &[u8]) -> OwnedFd {
    let mut file = File::from(rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
    file.write_all(content).unwrap();
    file.rewind().unwrap();
    file.into()
}

/// An executable of one segment at 16 MiB.
fn kernel(code: &[u8]) -> OwnedFd {
    let length = code.len() as u64;
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
    elf.resize(16, 0);
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [0x100_0000_u64, 64, 0] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    for word in [0x1000, 0x100_0000, 0x100_0000, length, length, 0x1000] {
        elf.extend(word.to_le_bytes());
    }
    elf.resize(0x1000, 0);
    elf.extend(code);
    file(&elf)
}

/// Runs `test` with a started VMM in a mount namespace like a shim's.
fn with_vmm<F: Future<Output = ()>>(
    code: &'static [u8],
    test: impl FnOnce(Vmm) -> F + Send + 'static,
) {
    let Some((binary, kvm)) = available() else {
        return;
    };
    let shim = std::thread::spawn(move || {
        // SAFETY: only this thread's namespace and file system context change.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
        mount_change(
            "/",
            MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
        )
        .unwrap();
        let dir = tempfile::tempdir().unwrap();
        let share = dir.path().join("share");
        fs::create_dir(&share).unwrap();
        mount("share", &share, "tmpfs", MountFlags::empty(), None).unwrap();
        mount_change(&share, MountPropagationFlags::SHARED).unwrap();
        let listener = UnixListener::bind(dir.path().join("vsock.sock")).unwrap();
        let (_ours, acceptor) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let launch = Launch {
            binary,
            kvm,
            kernel: kernel(code),
            root: file(&[0; 512]),
            listener: listener.into(),
            acceptor,
            console: false,
            cmdline: String::new(),
            shape: Shape::fixed(Size {
                vcpus: 2,
                memory_mib: 64,
            }),
            share: share.clone(),
            shares: vec![Share {
                tag: "bulkhead".into(),
                dir: share.clone(),
                read_only: false,
                policy: Policy::Shared,
                queues: 1,
            }],
            oom_score_adj: 100,
            cgroup: None,
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let vmm = Vmm::launch(launch).await.unwrap();
            tokio::time::timeout(LIMIT, test(vmm)).await.unwrap();
        });
        unmount(&share, UnmountFlags::DETACH).unwrap();
    });
    shim.join().unwrap();
}

/// The program and KVM.
fn available() -> Option<(PathBuf, OwnedFd)> {
    let own = std::env::current_exe().unwrap();
    let binary = own.parent()?.parent()?.join("bulkhead-vmm");
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    match kvm {
        _ if !rustix::process::geteuid().is_root() => eprintln!("skipped: it needs root"),
        _ if !binary.is_file() => eprintln!("skipped: bulkhead-vmm is not built"),
        Ok(kvm) => return Some((binary, kvm.into())),
        Err(_) => eprintln!("skipped: it needs /dev/kvm"),
    }
    None
}

#[test]
fn a_running_vm_is_paused_resumed_and_let_go() {
    with_vmm(SPINS, |vmm| async move {
        let control = vmm.control();
        let status = control.status().await.unwrap();
        assert_eq!(
            (status.paused, status.vcpus, status.memory_mib),
            (false, 2, 64)
        );
        control.pause().await.unwrap();
        assert!(control.status().await.unwrap().paused);
        control.resume().await.unwrap();
        assert!(!control.status().await.unwrap().paused);
        control.release();
        let end = vmm.ended().await;
        assert_eq!(end.status, 255);
        assert_eq!(end.reason, "Whoever started the virtual machine is gone");
        assert!(control.status().await.is_err());
    });
}

#[test]
fn a_guest_that_powers_off_is_told_as_such_f33() {
    with_vmm(POWERS_OFF, |vmm| async move {
        let end = vmm.ended().await;
        assert_eq!(
            (end.status, end.reason.as_str()),
            (255, "The guest powered off")
        );
    });
}

#[test]
fn a_stopped_vmm_can_be_killed_f25() {
    with_vmm(SPINS, |vmm| async move {
        vmm.control().status().await.unwrap();
        let pid = rustix::process::Pid::from_raw(vmm.process().pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
        // What a stopped process does not see.
        vmm.control().release();
        vmm.kill();
        let end = vmm.ended().await;
        assert_eq!(
            (end.status, end.reason.as_str()),
            (137, "the VM was killed")
        );
    });
}

#[test]
fn no_thread_of_the_shim_keeps_the_vmms_namespaces() {
    with_vmm(SPINS, |vmm| async move {
        vmm.control().status().await.unwrap();
        let namespace = |path: &str| fs::read_link(format!("{path}/ns/mnt")).unwrap();
        let own = namespace("/proc/thread-self");
        let its = namespace(&format!("/proc/{}", vmm.process().pid));
        assert_ne!(own, its);
        // Other tests start VMMs as well, so this may take a while; the limit ends it.
        let starting = || {
            let mut tasks = fs::read_dir("/proc/self/task").unwrap();
            tasks.any(|task| {
                let task = task.unwrap().path();
                let name = fs::read_to_string(task.join("comm")).unwrap_or_default();
                let seen = fs::read_link(task.join("ns/mnt"));
                assert!(seen.is_err() || seen.unwrap() != its, "{name}");
                name.trim_end() == "vmm-start"
            })
        };
        while starting() {
            tokio::task::yield_now().await;
        }
        vmm.kill();
        vmm.ended().await;
    });
}
