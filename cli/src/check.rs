//! `bulkhead check`: can this host run containers in virtual machines?
//!
//! Each finding that stands in the way carries its next step.

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::{self, Read},
    path::Path,
};

use bulkhead_shim::config::Config;
use bulkhead_vmm::{
    assets::{Asset, MANIFEST, Manifest},
    probe,
};
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use bulkhead_client::shim::{SHIM, find_binary};

use crate::{args, error::Result, network, output};

/// How good a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    /// As it should be.
    Ok,
    /// Works, but should be known.
    Warning,
    /// Nothing runs before this is mended.
    Failure,
}

/// One finding.
#[derive(Clone, Debug, Serialize)]
struct Finding {
    name: &'static str,
    status: Status,
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    next_step: Option<String>,
}

impl Finding {
    fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Finding {
            name,
            status: Status::Ok,
            detail: detail.into(),
            next_step: None,
        }
    }

    fn warning(name: &'static str, detail: impl Into<String>, next: impl Into<String>) -> Self {
        Finding {
            name,
            status: Status::Warning,
            detail: detail.into(),
            next_step: Some(next.into()),
        }
    }

    fn failure(name: &'static str, detail: impl Into<String>, next: impl Into<String>) -> Self {
        Finding {
            name,
            status: Status::Failure,
            detail: detail.into(),
            next_step: Some(next.into()),
        }
    }
}

#[derive(Debug, Serialize)]
struct Report {
    usable: bool,
    findings: Vec<Finding>,
}

/// Looks at everything and prints it; the exit code is 0 only if containers can run.
pub(crate) fn check(args: &args::Check) -> Result<u8> {
    let mut findings = vec![user(), processor(), virtual_machines()];
    findings.extend(assets());
    findings.extend(binaries());
    findings.extend([overlay(), cgroups(), network()]);
    findings.extend(side_channels(Path::new("/sys")));
    let usable = findings
        .iter()
        .all(|finding| finding.status != Status::Failure);
    let report = Report { usable, findings };
    output::print(args::Format::of(args.json), &report, table)?;
    Ok(u8::from(!usable))
}

fn table(report: &Report) -> String {
    let mut text = String::new();
    let width = report
        .findings
        .iter()
        .map(|finding| finding.name.len())
        .max()
        .unwrap_or(0);
    for Finding {
        name,
        status,
        detail,
        next_step,
    } in &report.findings
    {
        let mark = match status {
            Status::Ok => "ok  ",
            Status::Warning => "note",
            Status::Failure => "FAIL",
        };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{mark}  {name:width$}  {detail}");
        if let Some(next) = next_step {
            let _ = writeln!(text, "      {:width$}  -> {next}", "");
        }
    }
    let verdict = if report.usable {
        "This host can run containers in virtual machines."
    } else {
        "This host cannot run containers in virtual machines yet: see FAIL above."
    };
    let _ = writeln!(text, "\n{verdict}");
    text
}

/// May we do what `bulkhead run` does?
fn user() -> Finding {
    // In a thread of its own, whose namespace ends with it.
    let mount = || nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS);
    let may_mount = std::thread::spawn(mount)
        .join()
        .is_ok_and(|done| done.is_ok());
    user_finding(rustix::process::geteuid().is_root(), may_mount)
}

fn user_finding(is_root: bool, may_mount: bool) -> Finding {
    const NAME: &str = "user";
    match (is_root, may_mount) {
        (true, true) => Finding::ok(NAME, "root"),
        (true, false) => Finding::failure(
            NAME,
            "root, but not allowed to mount (no CAP_SYS_ADMIN)",
            "run it outside of the container that it is in, or give that one the capability",
        ),
        (false, _) => Finding::failure(
            NAME,
            "not root",
            "only root can mount file systems and open what a VM needs: use sudo",
        ),
    }
}

/// The flag by which a processor says that it can virtualise.
fn flag() -> Option<&'static str> {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = text.lines().find(|line| line.starts_with("flags"))?;
    ["vmx", "svm"]
        .into_iter()
        .find(|flag| flags.split_whitespace().any(|word| word == *flag))
}

fn processor() -> Finding {
    const NAME: &str = "processor";
    match flag() {
        Some("vmx") => Finding::ok(NAME, "Intel VT-x (vmx)"),
        Some(_) => Finding::ok(NAME, "AMD-V (svm)"),
        None => Finding::warning(
            NAME,
            "no flag of hardware virtualisation (vmx, svm) in /proc/cpuinfo",
            "enable it in the firmware, or in a VM ask its provider for nested virtualisation",
        ),
    }
}

fn virtual_machines() -> Finding {
    const NAME: &str = "KVM";
    match probe::probe() {
        probe::Verdict::Usable => Finding::ok(NAME, "/dev/kvm runs 64-bit code with paging"),
        probe::Verdict::Closed(errno) => {
            let error = io::Error::from_raw_os_error(errno);
            Finding::failure(NAME, format!("/dev/kvm: {error}"), next_step(errno))
        }
        probe::Verdict::Broken(reason) => Finding::failure(
            NAME,
            format!("/dev/kvm opens, but cannot run a guest: {reason}"),
            "use a machine with hardware virtualisation (bare metal, or a VM with nested virtualisation)",
        ),
    }
}

/// What to do when `/dev/kvm` does not open.
fn next_step(errno: i32) -> &'static str {
    match errno {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => {
            "load the module: `modprobe kvm_intel` or `modprobe kvm_amd`; \
             if that fails enable virtualisation in the firmware, or nested virtualisation of the VM"
        }
        libc::EACCES | libc::EPERM => {
            "run as root, or let your user into the group kvm; in a container pass the device on (--device /dev/kvm)"
        }
        libc::EBUSY => {
            "another hypervisor (such as VirtualBox or VMware) holds the processor: stop it"
        }
        _ => "the kernel's log (`dmesg | grep -i kvm`) says more",
    }
}

fn assets() -> Vec<Finding> {
    const NAME: &str = "guest assets";
    const BUILD: &str =
        "install bulkhead's kernel and root image, or set assets_dir in /etc/bulkhead/config.toml";
    let dir = match Config::load() {
        Ok(config) => config.assets_dir,
        Err(error) => {
            return vec![Finding::failure(
                "configuration",
                error.to_string(),
                "correct the file",
            )];
        }
    };
    let path = dir.join(MANIFEST);
    let manifest: Manifest = match fs::read(&path) {
        Ok(text) => match serde_json::from_slice(&text) {
            Ok(manifest) => manifest,
            Err(error) => {
                return vec![Finding::failure(
                    NAME,
                    format!("{}: {error}", path.display()),
                    BUILD,
                )];
            }
        },
        Err(error) => {
            return vec![Finding::failure(
                NAME,
                format!("{}: {error}", path.display()),
                BUILD,
            )];
        }
    };
    [
        ("guest kernel", &manifest.kernel),
        ("guest root", &manifest.root),
    ]
    .map(|(name, asset)| verify(name, &dir, asset))
    .to_vec()
}

fn verify(name: &'static str, dir: &Path, asset: &Asset) -> Finding {
    let path = dir.join(&asset.file);
    match sha256(&path) {
        Ok(found) if found.eq_ignore_ascii_case(&asset.sha256) => {
            let version = asset
                .version
                .as_deref()
                .map(|version| format!(", version {version}"))
                .unwrap_or_default();
            Finding::ok(name, format!("{}{version}", path.display()))
        }
        Ok(found) => Finding::failure(
            name,
            format!(
                "{} has the SHA-256 {found}, its manifest says {}",
                path.display(),
                asset.sha256
            ),
            "install it again",
        ),
        Err(error) => Finding::failure(
            name,
            format!("{}: {error}", path.display()),
            "install it again",
        ),
    }
}

fn sha256(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 256 << 10];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex::encode(hash.finalize())),
            count => hash.update(buffer.get(..count).unwrap_or_default()),
        }
    }
}

fn binaries() -> Vec<Finding> {
    const NEXT: &str = "install it beside bulkhead";
    let shim = find_binary(SHIM);
    let vmm = shim.as_ref().ok().and_then(|shim| {
        let shim = shim.canonicalize().ok()?;
        bulkhead_shim::vm::vmm::find(&shim).ok()
    });
    vec![
        match shim {
            Ok(path) => Finding::ok("shim", path.display().to_string()),
            Err(_) => Finding::failure(
                "shim",
                format!("{SHIM} is neither beside bulkhead nor in PATH"),
                NEXT,
            ),
        },
        match vmm {
            Some(path) => Finding::ok("VMM", path.display().to_string()),
            None => Finding::failure(
                "VMM",
                "bulkhead-vmm is neither beside the shim nor in /usr/bin",
                NEXT,
            ),
        },
    ]
}

fn overlay() -> Finding {
    const NAME: &str = "overlayfs";
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if known.split_whitespace().any(|word| word == "overlay") {
        return Finding::ok(NAME, "in the kernel");
    }
    let release = rustix::system::uname();
    let modules = Path::new("/lib/modules").join(release.release().to_string_lossy().as_ref());
    let listed = |name| {
        fs::read_to_string(modules.join(name)).is_ok_and(|text| text.contains("/overlay.ko"))
    };
    if listed("modules.dep") || listed("modules.builtin") {
        return Finding::ok(NAME, "a module, loaded on demand");
    }
    Finding::failure(
        NAME,
        "the kernel has none",
        "load or install its module `overlay`; `--rootfs` works without",
    )
}

fn cgroups() -> Finding {
    const NAME: &str = "cgroup v2";
    const MAGIC: u64 = 0x6367_7270;
    let is_v2 = |path: &str| {
        rustix::fs::statfs(path)
            .is_ok_and(|stat| u64::try_from(stat.f_type).is_ok_and(|kind| kind == MAGIC))
    };
    if is_v2("/sys/fs/cgroup") {
        Finding::ok(NAME, "/sys/fs/cgroup")
    } else if is_v2("/sys/fs/cgroup/unified") {
        Finding::warning(
            NAME,
            "only beside version 1 (hybrid): limits of the host's side do not apply",
            "boot with systemd.unified_cgroup_hierarchy=1",
        )
    } else {
        Finding::warning(
            NAME,
            "not mounted on /sys/fs/cgroup: limits of the host's side do not apply",
            "mount -t cgroup2 none /sys/fs/cgroup, or boot with systemd.unified_cgroup_hierarchy=1",
        )
    }
}

/// Can containers have a network without anybody who makes it for them?
fn network() -> Finding {
    const NAME: &str = "network";
    if !rustix::process::geteuid().is_root() {
        return Finding::warning(NAME, "only root can try it", "use sudo");
    }
    match network::check::missing() {
        None => Finding::ok(NAME, "bridge, veth, tun and nf_tables can be used"),
        Some(missing) => Finding::warning(
            NAME,
            format!(
                "`bulkhead run` works with --network none only: {}",
                missing.detail
            ),
            missing.next,
        ),
    }
}

/// What lets a guest learn of its neighbours through the processor or memory.
fn side_channels(sys: &Path) -> Vec<Finding> {
    let read = |path: &str| {
        fs::read_to_string(sys.join(path))
            .unwrap_or_default()
            .trim()
            .to_owned()
    };
    let mut findings = Vec::new();
    if read("devices/system/cpu/smt/active") == "1" {
        findings.push(Finding::warning(
            "SMT",
            "on: guests on two threads of a core can observe each other",
            "with tenants that do not trust each other switch it off (nosmt)",
        ));
    }
    if read("kernel/mm/ksm/run") == "1" {
        findings.push(Finding::warning(
            "KSM",
            "on: a guest can learn what others have in memory",
            "switch it off: echo 2 > /sys/kernel/mm/ksm/run",
        ));
    }
    let unsafe_pages =
        ["N", "never"].contains(&read("module/kvm/parameters/nx_huge_pages").as_str());
    if unsafe_pages
        && read("devices/system/cpu/vulnerabilities/itlb_multihit").contains("ulnerable")
    {
        findings.push(Finding::warning(
            "nx_huge_pages",
            "off on a processor with the iTLB multihit bug: a guest can stop the host",
            "load kvm with nx_huge_pages=auto",
        ));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_cannot_run_is_not_told_that_the_host_can() {
        assert_eq!(user_finding(true, true).status, Status::Ok);
        for (is_root, may_mount) in [(false, false), (false, true), (true, false)] {
            let finding = user_finding(is_root, may_mount);
            assert_eq!(finding.status, Status::Failure);
            assert!(finding.next_step.is_some());
        }
    }

    #[test]
    fn every_error_of_opening_has_its_next_step() {
        for (errno, words) in [
            (libc::ENOENT, "modprobe"),
            (libc::EACCES, "group kvm"),
            (libc::EBUSY, "another hypervisor"),
            (libc::EIO, "dmesg"),
        ] {
            assert!(next_step(errno).contains(words), "{errno}");
        }
    }

    #[test]
    fn a_changed_asset_is_a_failure_that_names_both_hashes_f32() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("vmlinux"), "kernel").unwrap();
        let good = sha256(&dir.path().join("vmlinux")).unwrap();
        let asset = |sha256: &str| Asset {
            file: "vmlinux".to_owned(),
            sha256: sha256.to_owned(),
            version: None,
        };
        assert_eq!(
            verify("guest kernel", dir.path(), &asset(&good)).status,
            Status::Ok
        );
        let finding = verify("guest kernel", dir.path(), &asset("00"));
        assert_eq!(finding.status, Status::Failure);
        assert!(finding.detail.contains(&good));
    }

    #[test]
    fn risks_are_notes_and_do_not_make_a_host_unusable() {
        let sys = tempfile::tempdir().unwrap();
        for (path, text) in [
            ("devices/system/cpu/smt/active", "1\n"),
            ("kernel/mm/ksm/run", "1\n"),
        ] {
            let path = sys.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let findings = side_channels(sys.path());
        assert_eq!(findings.len(), 2);
        assert!(
            findings
                .iter()
                .all(|finding| finding.status == Status::Warning)
        );
    }
}
