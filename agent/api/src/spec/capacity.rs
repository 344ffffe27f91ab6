//! What a machine can give to a container.

/// Memory and processors of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// In bytes.
    pub memory: u64,
    /// Virtual ones.
    pub processors: u64,
}

/// A limit beyond that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Beyond {
    /// The field of `linux.resources`.
    pub what: &'static str,
    /// Its value.
    pub asked: String,
    /// What there is.
    pub most: String,
}

impl Capacity {
    /// Refuses limits that promise what there is not: bytes of memory, and thousandths of
    /// a processor.
    pub fn can_give(self, memory: Option<u64>, thousandths: Option<u64>) -> Result<(), Beyond> {
        if let Some(bytes) = memory.filter(|bytes| *bytes > self.memory) {
            return Err(Beyond {
                what: "memory.limit",
                asked: format!("{bytes} bytes"),
                most: format!("{} bytes", self.memory),
            });
        }
        let most = self.processors.saturating_mul(1_000);
        if let Some(thousandths) = thousandths.filter(|thousandths| *thousandths > most) {
            let (whole, rest) = (thousandths / 1_000, thousandths % 1_000);
            return Err(Beyond {
                what: "cpu.quota",
                asked: format!("{whole}.{rest:03} processors"),
                most: self.processors.to_string(),
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_the_machine_has_is_refused_with_the_most_there_is_ta_68() {
        let machine = Capacity {
            memory: 256 << 20,
            processors: 2,
        };
        assert_eq!(machine.can_give(None, None), Ok(()));
        assert_eq!(machine.can_give(Some(256 << 20), Some(2_000)), Ok(()));
        let refused = |memory, thousandths| {
            let beyond = machine.can_give(memory, thousandths).unwrap_err();
            (beyond.what, beyond.asked, beyond.most)
        };
        assert_eq!(
            refused(Some(257 << 20), None),
            (
                "memory.limit",
                "269484032 bytes".to_owned(),
                "268435456 bytes".to_owned()
            )
        );
        assert_eq!(
            refused(None, Some(2_001)),
            ("cpu.quota", "2.001 processors".to_owned(), "2".to_owned())
        );
    }
}
