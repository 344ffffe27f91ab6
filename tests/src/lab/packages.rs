//! Every Debian package that the lab is made of, with its reason.
//!
//! Names only: the newest version that the suite has is taken.

/// On the building machine, to make the lab host and to run it.
pub const MACHINE: &[&str] = &[
    "cpio",                   // the lab host's initial file system
    "debian-archive-keyring", // signatures of all that follows
    "debootstrap",            // root file systems
    "e2fsprogs",              // mke2fs -d: disks without mounting
    "qemu-system-x86",        // the emulated processor with SVM
    "qemu-utils",             // qemu-img: overlays
];

/// The suite that the lab host's kernel and the demo image are of.
pub const STABLE: &str = "bookworm";

/// The suite of the lab host: the oldest one with containerd 2.
pub const LAB: &str = "forky";

/// The kernel of the lab host; its KVM is what the product runs on.
pub const LAB_KERNEL: &str = "linux-image-cloud-amd64";

/// In the lab host, beside Debian's minimal system.
pub const LAB_HOST: &[&str] = &[
    "acl",                         // getfacl: files that a container wrote
    "attr",                        // getfattr: likewise
    "busybox-static",              // the small image, and the initial file system
    "ca-certificates",             // containerd wants to see some
    "conntrack",                   // port mappings of CNI plug-ins
    "containerd",                  // what stands above us
    "containernetworking-plugins", // bridge, portmap, host-local, loopback
    "crun",                        // a second OCI runtime to compare with
    "curl",                        // a client for network tests
    "dbus",                        // systemctl
    "e2fsprogs",                   // disks for block devices in tests
    "ethtool",                     // offloads of taps
    "fio",                         // throughput
    "iproute2",                    // ip, ss, tc
    "iptables",                    // CNI plug-ins call it
    "iputils-ping",                // network tests
    "kmod",                        // modules of the lab's kernel
    "nftables",                    // what network tests look at
    "procps",                      // ps
    "python3-minimal",             // raw requests in tests
    "qemu-system-x86",             // its microvm machine is the peer in benches
    "runc",                        // the runtime to compare with
    "skopeo",                      // images between formats
    "socat",                       // sockets by hand
    "strace",                      // system calls of the VMM, counted
    "stress-ng",                   // load
    "systemd",                     // starts containerd; cgroups as on real hosts
    "systemd-sysv",                // as init
    "udev",                        // names of devices
    "virtiofsd",                   // the peer of the file server in benches
];

/// Modules of the lab host's kernel, loaded at boot: nothing loads them on
/// demand in a container or a network namespace of a test.
pub const MODULES: &[&str] = &[
    "br_netfilter",
    "bridge",
    "erofs",
    "kvm-amd",
    "loop",
    "overlay",
    "tun",
    "veth",
    "vhost_vsock",
];

/// The one program of the busybox image.
pub const BUSYBOX_IMAGE: &str = "busybox-static";

/// In the Debian image, beside Debian's minimal system.
pub const DEBIAN: &[&str] = &[
    "acl",             // ACLs on the shared file system
    "attr",            // extended attributes on it
    "gcc",             // building is a real load
    "libc6-dev",       // for gcc
    "procps",          // ps
    "python3-minimal", // an interpreter with many files
    "redis-server",    // a server
    "redis-tools",     // its client
];
