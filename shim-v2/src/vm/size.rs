//! How large a virtual machine is, and how large it can become.

use serde::{Deserialize, Serialize};

use crate::{config::Config, spec::Limits};

/// Most processors of a machine that runs, by default: of one for a single container, for
/// which four cost its guest no more memory than one does, and of one that others join.
const USUAL_VCPUS: u8 = 4;
const POD_VCPUS: u8 = 16;
/// Most processors and MiB of memory that a machine can have at all.
const VCPUS: u8 = 64;
const MEMORY_MIB: u32 = 1_048_576;

/// Size of a virtual machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Virtual processors, 1 to 64.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
}

/// Whether more containers are to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pod {
    /// As far as is known there will be one.
    Single,
    /// Others join it.
    Joined,
}

/// How a machine begins, and what may come while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// What it begins with.
    pub first: Size,
    /// The largest that it can become.
    pub most: Size,
    /// Places for disks.
    pub places: u8,
    /// Places for network interfaces.
    pub interfaces: u8,
}

impl Size {
    /// That of this host, as far as a machine can have it.
    #[must_use]
    pub fn of_this_host() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let info = rustix::system::sysinfo();
        let bytes = info.totalram.saturating_mul(u64::from(info.mem_unit));
        Size {
            vcpus: u8::try_from(cpus).unwrap_or(VCPUS).min(VCPUS),
            memory_mib: u32::try_from(bytes >> 20)
                .unwrap_or(MEMORY_MIB)
                .clamp(64, MEMORY_MIB),
        }
    }

    /// The size for containers with these limits, at most what the configuration says
    /// or else that of the host.
    ///
    /// Processors: the sum of the limits, rounded up; if one has none, not fewer than
    /// the configuration says. Memory: the sum of the limits and what the guest needs
    /// itself; those without a limit together what the configuration says.
    #[must_use]
    pub fn of(limits: impl IntoIterator<Item = Limits>, config: &Config, host: Size) -> Self {
        let (mut thousandths, mut bytes) = (0_u64, 0_u64);
        let (mut free_cpus, mut free_memory) = (false, false);
        for limit in limits {
            match limit.thousandths() {
                Some(limit) => thousandths = thousandths.saturating_add(limit),
                None => free_cpus = true,
            }
            match limit.memory {
                Some(limit) => bytes = bytes.saturating_add(limit),
                None => free_memory = true,
            }
        }
        let least = if free_cpus { config.vcpus } else { 1 };
        let vcpus = u8::try_from(thousandths.div_ceil(1_000)).unwrap_or(VCPUS);
        let own = if free_memory {
            config.memory_mib
        } else {
            config.guest_overhead_mib
        };
        let memory = u64::from(own).saturating_add(bytes.div_ceil(1 << 20));
        let most = config.most_vcpus.unwrap_or(host.vcpus);
        let most_mib = config.most_memory_mib.unwrap_or(host.memory_mib);
        Size {
            vcpus: vcpus.max(least).min(most),
            memory_mib: u32::try_from(memory).unwrap_or(MEMORY_MIB).min(most_mib),
        }
    }

    /// The larger of both, in each respect.
    #[must_use]
    pub fn or(self, other: Size) -> Size {
        Size {
            vcpus: self.vcpus.max(other.vcpus),
            memory_mib: self.memory_mib.max(other.memory_mib),
        }
    }

    /// The smaller of both, in each respect.
    #[must_use]
    pub fn and(self, other: Size) -> Size {
        Size {
            vcpus: self.vcpus.min(other.vcpus),
            memory_mib: self.memory_mib.min(other.memory_mib),
        }
    }
}

impl Shape {
    /// A machine that begins so, on a host of this size, with these places for disks.
    #[must_use]
    pub fn new(first: Size, config: &Config, host: Size, pod: Pod, places: u8) -> Self {
        let usual = match pod {
            Pod::Single => USUAL_VCPUS,
            Pod::Joined => POD_VCPUS,
        };
        let most = Size {
            vcpus: config.most_vcpus.unwrap_or_else(|| host.vcpus.min(usual)),
            memory_mib: config.most_memory_mib.unwrap_or(host.memory_mib),
        };
        Shape {
            first,
            most: most.or(first),
            places,
            interfaces: 0,
        }
    }

    /// A machine that stays as it is.
    #[must_use]
    pub fn fixed(size: Size) -> Self {
        Shape {
            first: size,
            most: size,
            places: 0,
            interfaces: 0,
        }
    }

    /// Processors that may come.
    #[must_use]
    pub fn more_vcpus(&self) -> u8 {
        self.most.vcpus.saturating_sub(self.first.vcpus)
    }

    /// MiB of memory that may come.
    #[must_use]
    pub fn more_memory_mib(&self) -> u32 {
        self.most.memory_mib.saturating_sub(self.first.memory_mib)
    }

    /// Places for disks, interfaces and memory.
    #[must_use]
    pub fn all_places(&self) -> u8 {
        let memory = u8::from(self.more_memory_mib() > 0);
        let devices = self.places.saturating_add(self.interfaces);
        devices.saturating_add(memory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: Size = Size {
        vcpus: 16,
        memory_mib: 16_384,
    };

    fn limit(thousandths: u64, mib: u64) -> Limits {
        let given = |value| Some(value).filter(|value| *value > 0);
        Limits {
            quota: given(thousandths * 100),
            period: 100_000,
            memory: given(mib << 20),
        }
    }

    fn size(limits: &[Limits]) -> (u8, u32) {
        size_by(&Config::default(), limits)
    }

    fn size_by(config: &Config, limits: &[Limits]) -> (u8, u32) {
        let size = Size::of(limits.iter().copied(), config, HOST);
        (size.vcpus, size.memory_mib)
    }

    fn most(most_vcpus: Option<u8>, most_memory_mib: Option<u32>) -> Config {
        Config {
            most_vcpus,
            most_memory_mib,
            ..Config::default()
        }
    }

    #[test]
    fn a_vm_is_as_large_as_its_container_and_the_guest_itself_b11_cl_13() {
        assert_eq!(size(&[limit(0, 0)]), (1, 512));
        assert_eq!(size(&[limit(1_500, 256)]), (2, 384));
        assert_eq!(size(&[limit(100_000, 1 << 30)]), (16, 16_384));
        assert_eq!(size(&[limit(1, 1)]), (1, 129));
        let most = most(Some(4), Some(1_024));
        assert_eq!(size_by(&most, &[limit(9_000, 2_048)]), (4, 1_024));
    }

    #[test]
    fn a_pod_is_as_large_as_its_containers_together_rs_11_rs_13() {
        assert_eq!(size(&[limit(1_500, 256), limit(400, 100)]), (2, 484));
        assert_eq!(size(&[limit(1_500, 256), limit(600, 0)]), (3, 768));
        assert_eq!(size(&[limit(0, 0), limit(0, 0)]), (1, 512));
        assert_eq!(size(&[limit(0, 0), limit(2_100, 100)]), (3, 612));
    }

    #[test]
    fn a_machine_can_become_as_large_as_the_host_and_the_configuration_let_it() {
        let first = Size {
            vcpus: 2,
            memory_mib: 512,
        };
        let shape = |vcpus, memory_mib| {
            let config = most(vcpus, memory_mib);
            let single = Shape::new(first, &config, HOST, Pod::Single, 3);
            let shape = Shape::new(first, &config, HOST, Pod::Joined, 3);
            assert!(vcpus.is_none() || single == shape);
            (
                shape.more_vcpus(),
                shape.more_memory_mib(),
                shape.all_places(),
            )
        };
        let single = Shape::new(first, &Config::default(), HOST, Pod::Single, 3);
        assert_eq!(single.more_vcpus(), 2);
        assert_eq!(shape(None, None), (14, 15_872, 4));
        assert_eq!(shape(Some(64), Some(1 << 20)), (62, 1_048_064, 4));
        assert_eq!(shape(Some(1), Some(64)), (0, 0, 3));
        assert_eq!(shape(Some(4), Some(1_024)), (2, 512, 4));
    }
}
