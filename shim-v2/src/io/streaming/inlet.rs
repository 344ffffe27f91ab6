//! Input from a stream.

use std::time::Duration;

use tokio::{sync::watch, time::timeout};

use super::{
    Claim,
    link::{Ended, Link, Message},
};

/// Bytes that may be on their way.
const WINDOW: usize = 64 << 10;
/// Time for input to come when its end was announced by other ways.
const REST: Duration = Duration::from_millis(500);

/// The receiving end of a stream.
#[derive(Debug)]
pub(in crate::io) struct Inlet {
    claim: Claim,
    link: Option<Link>,
    /// Credit that the peer has.
    granted: usize,
    /// True once the caller has said that input ends.
    closing: watch::Receiver<bool>,
}

impl Inlet {
    pub(in crate::io) fn new(claim: Claim, closing: watch::Receiver<bool>) -> Self {
        Inlet {
            claim,
            link: None,
            granted: 0,
            closing,
        }
    }

    /// Waits for bytes; `None` at their end. Credit for the last ones is granted by
    /// the next call, so that nothing is asked for that cannot be delivered.
    pub(in crate::io) async fn read(&mut self) -> Option<Vec<u8>> {
        loop {
            let received = if *self.closing.borrow() {
                // What was sent before that is on its way or here.
                match timeout(REST, self.receive()).await {
                    Ok(received) => received,
                    Err(_) => return None,
                }
            } else {
                let mut closing = self.closing.clone();
                tokio::select! {
                    biased;
                    received = self.receive() => received,
                    // A sender that is gone means no more than one that is silent.
                    Ok(_) = closing.wait_for(|closing| *closing) => continue,
                }
            };
            match received {
                Ok(Message::Data(bytes)) => {
                    self.granted = self.granted.saturating_sub(bytes.len());
                    if !bytes.is_empty() {
                        return Some(bytes);
                    }
                }
                Ok(Message::Credit(_) | Message::Other) => {}
                Err(Ended::Finished) => return None,
                Err(Ended::Broken) => self.link = None,
            }
        }
    }

    async fn receive(&mut self) -> Result<Message, Ended> {
        let Some(link) = &mut self.link else {
            self.link = Some(self.claim.next().await);
            self.granted = 0;
            return Ok(Message::Other);
        };
        if self.granted < WINDOW / 2 {
            let credit = WINDOW - self.granted;
            if link
                .grant(i32::try_from(credit).unwrap_or(0))
                .await
                .is_err()
            {
                return Err(Ended::Broken);
            }
            self.granted = WINDOW;
        }
        tokio::select! {
            biased;
            received = link.receive() => received,
            newer = self.claim.next() => {
                self.link = Some(newer);
                self.granted = 0;
                Ok(Message::Other)
            }
        }
    }
}
