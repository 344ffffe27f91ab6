//! Output into a stream.

use std::time::Duration;

use futures::FutureExt;
use tokio::time::timeout;

use super::{
    Claim,
    link::{Ended, Link, Message},
    outgoing::Outgoing,
};

/// Time for the last bytes to be acknowledged before the stream is ended.
const LAST: Duration = Duration::from_millis(200);

/// The sending end of a stream.
#[derive(Debug)]
pub(in crate::io) struct Outlet {
    claim: Claim,
    link: Option<Link>,
    out: Outgoing,
}

/// What happens while something is to be sent.
enum News {
    Newer(Link),
    Received(Result<Message, Ended>),
}

impl Outlet {
    pub(in crate::io) fn new(claim: Claim) -> Self {
        Outlet {
            claim,
            link: None,
            out: Outgoing::default(),
        }
    }

    /// Sends bytes: waits for somebody to take them, and for credit.
    pub(in crate::io) async fn write(&mut self, bytes: &[u8]) {
        self.out.push(bytes);
        self.send().await;
    }

    async fn send(&mut self) {
        while self.out.unsent() > 0 {
            // What has come meanwhile counts before anything is sent.
            if let Some(news) = self.news().now_or_never() {
                self.take(news);
                continue;
            }
            let Some((link, message)) = self.link.as_ref().zip(self.out.next()) else {
                let news = self.news().await;
                self.take(news);
                continue;
            };
            // A peer that does not read may have been replaced by one that does.
            tokio::select! {
                biased;
                sent = link.data(message) => if sent.is_err() {
                    self.unlink();
                },
                newer = self.claim.next() => self.take(News::Newer(newer)),
            }
        }
    }

    async fn news(&mut self) -> News {
        let Some(link) = &mut self.link else {
            return News::Newer(self.claim.next().await);
        };
        tokio::select! {
            biased;
            newer = self.claim.next() => News::Newer(newer),
            received = link.receive() => News::Received(received),
        }
    }

    fn take(&mut self, news: News) {
        match news {
            News::Newer(link) => {
                self.acknowledged();
                self.out.relink();
                self.link = Some(link);
            }
            News::Received(Ok(Message::Credit(credit))) => self.out.grant(credit),
            News::Received(Ok(Message::Data(_) | Message::Other)) => {}
            News::Received(Err(_)) => self.unlink(),
        }
    }

    fn unlink(&mut self) {
        self.acknowledged();
        self.link = None;
        self.out.relink();
    }

    /// Takes the credit that has come on the present link.
    fn acknowledged(&mut self) {
        let Some(link) = &mut self.link else { return };
        while let Some(Ok(message)) = link.receive().now_or_never() {
            if let Message::Credit(credit) = message {
                self.out.grant(credit);
            }
        }
    }

    /// Ends the stream: all was sent.
    pub(in crate::io) async fn finish(&mut self) {
        self.claim.close();
        let settled = async {
            while !self.out.is_settled() {
                let news = self.news().await;
                self.take(news);
                self.send().await;
            }
        };
        // Whoever does not acknowledge the last bytes may still have taken them.
        let _ = timeout(LAST, settled).await;
        if let Some(link) = self.link.take() {
            let _ = timeout(LAST, link.finish()).await;
        }
    }

    /// Gives the last bytes and the end to whoever comes for them later.
    pub(in crate::io) async fn linger(mut self) {
        loop {
            let link = self.claim.next().await;
            self.take(News::Newer(link));
            self.send().await;
            self.finish().await;
        }
    }
}
