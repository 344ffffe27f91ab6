//! Processors that come while the machine runs. None goes: one that the guest does not
//! use sleeps.

use super::Starter;
use crate::processors::Maker;

/// Makes the processors that the guest knows of, but that do not exist yet.
#[derive(Debug)]
pub(crate) struct Processors {
    /// None once one was made that no thread runs.
    maker: Option<Maker>,
    starter: Starter,
}

impl Processors {
    /// Those that this one makes.
    pub(crate) fn new(maker: Maker, starter: Starter) -> Processors {
        Processors {
            maker: Some(maker),
            starter,
        }
    }

    /// Makes some until there are `count`.
    pub(super) fn have(&mut self, count: u8) -> Result<(), String> {
        let maker = self.maker.as_mut();
        let maker = maker.ok_or("no more processors can be made: one has no thread")?;
        let most = maker.most();
        if count > most {
            return Err(format!(
                "{count} processors are too many: {most} are the most"
            ));
        }
        while maker.made() < count {
            let number = maker.made();
            let vcpu = maker.make();
            let vcpu =
                vcpu.map_err(|error| format!("processor {number} cannot be made: {error}"))?;
            let name = format!("vcpu-{number}");
            let starter = &self.starter;
            let started = vcpu.start_later(|run| starter.thread(name, |_| run()));
            if let Err(error) = started {
                self.maker = None;
                return Err(format!(
                    "the thread of processor {number} does not start: {error}"
                ));
            }
        }
        Ok(())
    }
}
