//! Every Debian package that the lab is made of, with its reason.
//!
//! Names only: the newest version that the suite has is taken.

/// On the building machine, to make the lab host and to run it.
pub const MACHINE: &[&str] = &[
    "busybox",                // what the agent's tests run in their containers
    "debian-archive-keyring", // signatures of all that follows
    "e2fsprogs",              // mke2fs -d: disks without mounting
    "fakeroot",               // right owners on disks that a user packs
    "kmod",                   // depmod: the lab host's modules
    "mmdebstrap",             // Debian systems, for root and users
    "qemu-system-x86",        // the emulated processor with SVM
    "qemu-utils",             // qemu-img: overlays
    "uidmap",                 // users make systems in namespaces
];

/// The suite of the lab host, its kernel and the images: Debian's stable one, which
/// moves by point releases only. What has to be newer is a Go module
/// ([`super::programs`]).
pub const STABLE: &str = "trixie";

/// The kernel of the lab host; its KVM is what the product runs on.
pub const LAB_KERNEL: &str = "linux-image-cloud-amd64";

/// In the lab host, beside Debian's minimal system.
pub const LAB_HOST: &[&str] = &[
    "acl",                         // getfacl: files that a container wrote
    "attr",                        // getfattr: likewise
    "busybox-static",              // the small image, and the initial file system
    "ca-certificates",             // containerd wants to see some
    "conntrack",                   // port mappings of CNI plug-ins
    "containernetworking-plugins", // bridge, portmap, host-local, loopback
    "crun",                        // a second OCI runtime to compare with
    "curl",                        // a client for network tests
    "dbus",                        // systemctl
    "docker-cli",                  // the client of the next
    "docker.io",                   // an engine that tests start
    "e2fsprogs",                   // disks for block devices in tests
    "erofs-utils",                 // containerd's erofs snapshotter calls it
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

/// The one program of the busybox image, and where it lies in its package.
pub const BUSYBOX_IMAGE: &str = "busybox-static";
/// See [`BUSYBOX_IMAGE`].
pub const BUSYBOX: &str = "usr/bin/busybox";

/// A Go of any age from 1.21 on: it fetches the one that the modules are built with.
pub const GO: &str = "golang-1.24-go";
/// Its root in that package.
pub const GO_ROOT: &str = "usr/lib/go-1.24";

/// In the Debian image, beside Debian's minimal system.
pub const DEBIAN: &[&str] = &[
    "acl",             // ACLs on the shared file system
    "attr",            // extended attributes on it
    "gcc",             // building is a real load
    "libc6-dev",       // for gcc
    "nginx",           // a server of files
    "postgresql",      // a server that wants every write kept
    "procps",          // ps
    "python3-minimal", // an interpreter with many files
    "redis-server",    // a server
    "redis-tools",     // its client
    "systemd-sysv",    // a first process that owns its cgroups
];
