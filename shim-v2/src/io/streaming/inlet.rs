//! Input from a stream.

use std::time::Duration;

use tokio::{sync::watch, time::timeout};

use super::{
    Claim,
    link::{Ended, Link, Message},
    window::Window,
};

/// Time for input to come when its end was announced by other ways.
const REST: Duration = Duration::from_millis(500);

/// The receiving end of a stream.
#[derive(Debug)]
pub(in crate::io) struct Inlet {
    claim: Claim,
    link: Option<Link>,
    window: Window,
    /// True once the caller has said that input ends.
    closing: watch::Receiver<bool>,
}

impl Inlet {
    pub(in crate::io) fn new(claim: Claim, closing: watch::Receiver<bool>) -> Self {
        Inlet {
            claim,
            link: None,
            window: Window::default(),
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
                    self.window.took(bytes.len());
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
            self.window = Window::default();
            return Ok(Message::Other);
        };
        self.window.open(link).await?;
        tokio::select! {
            biased;
            received = link.receive() => received,
            newer = self.claim.next() => {
                self.link = Some(newer);
                self.window = Window::default();
                Ok(Message::Other)
            }
        }
    }
}
