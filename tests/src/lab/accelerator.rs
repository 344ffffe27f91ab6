//! What runs the lab host's instructions: this machine's KVM, or the emulator alone.

use std::fs;

use serde::Deserialize;

/// Where a kernel says whether its virtual machines may have virtual machines.
const NESTED: [&str; 2] = [
    "/sys/module/kvm_amd/parameters/nested",
    "/sys/module/kvm_intel/parameters/nested",
];

/// What runs the lab host's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// The processor itself.
    Kvm,
    /// QEMU's translator, which emulates SVM.
    Emulation,
}

/// The product's report on a host, as far as it matters here.
#[derive(Debug, Deserialize)]
struct Report {
    findings: Vec<Finding>,
}

#[derive(Debug, Deserialize)]
struct Finding {
    name: String,
    status: String,
}

impl Accelerator {
    /// Chooses for this machine by what `bulkhead check --json` says of it: the
    /// processor's flags, and the instructions that it really ran.
    #[must_use]
    pub fn of_this_machine(report: &[u8]) -> Accelerator {
        let nested = NESTED.iter().find_map(|path| fs::read_to_string(path).ok());
        Accelerator::chosen(report, &nested.unwrap_or_default())
    }

    /// KVM is taken if it works and the lab host gets one of its own from it.
    fn chosen(report: &[u8], nested: &str) -> Accelerator {
        let Ok(Report { findings }) = serde_json::from_slice(report) else {
            return Accelerator::Emulation;
        };
        let good = |name: &str| {
            let mut of_name = findings.iter().filter(|finding| finding.name == name);
            of_name.any(|finding| finding.status == "ok")
        };
        let nested = matches!(nested.trim(), "1" | "Y");
        if good("processor") && good("KVM") && nested {
            Accelerator::Kvm
        } else {
            Accelerator::Emulation
        }
    }

    /// QEMU's arguments.
    pub(crate) fn arguments(self) -> [&'static str; 4] {
        match self {
            Accelerator::Kvm => ["-accel", "kvm", "-cpu", "host"],
            // Emulated string instructions move an element a time; without these
            // features kernels move eight bytes each, not one, which is also nearer to
            // what clearing and copying cost a real processor.
            Accelerator::Emulation => [
                "-accel",
                "tcg,thread=single,tb-size=1024",
                "-cpu",
                "max,erms=off,fsrm=off",
            ],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(processor: &str, kvm: &str) -> Vec<u8> {
        let finding = |name: &str, status: &str| serde_json::json!({"name": name, "status": status, "detail": "…"});
        let findings = [
            finding("user", "ok"),
            finding("processor", processor),
            finding("KVM", kvm),
        ];
        serde_json::to_vec(&serde_json::json!({"usable": false, "findings": findings})).unwrap()
    }

    #[test]
    fn kvm_is_taken_where_it_works_and_can_be_nested() {
        let good = report("ok", "ok");
        assert_eq!(Accelerator::chosen(&good, "Y\n"), Accelerator::Kvm);
        assert_eq!(Accelerator::chosen(&good, "1\n"), Accelerator::Kvm);
        assert_eq!(Accelerator::chosen(&good, "0\n"), Accelerator::Emulation);
        assert_eq!(Accelerator::chosen(&good, ""), Accelerator::Emulation);
    }

    #[test]
    fn a_kvm_that_only_opens_is_not_taken() {
        for report in [report("warning", "ok"), report("ok", "failure"), Vec::new()] {
            assert_eq!(Accelerator::chosen(&report, "Y"), Accelerator::Emulation);
        }
    }

    #[test]
    fn the_processor_fits_the_accelerator() {
        assert_eq!(Accelerator::Kvm.arguments()[3], "host");
        assert!(Accelerator::Emulation.arguments()[1].starts_with("tcg"));
    }
}
