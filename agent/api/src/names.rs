//! Questions to a name server and its answers (RFC 1035), as they go over one stream
//! between the guest, where they are asked, and the host, where they are answered.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Most questions that are not answered yet.
pub const QUESTIONS: usize = 64;

/// A question or its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Which question it is, or belongs to: the guest counts them.
    pub number: u32,
    /// Asked by TCP rather than UDP, and to be asked so.
    pub tcp: bool,
    /// As it goes over the wire, without the length that TCP puts before it. An answer of
    /// no bytes says that there is none.
    pub body: Vec<u8>,
}

impl Message {
    /// Reads the next one.
    ///
    /// # Errors
    ///
    /// The stream breaks, or ends.
    pub async fn read(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Message> {
        let number = from.read_u32_le().await?;
        let tcp = from.read_u8().await? != 0;
        Ok(Message {
            number,
            tcp,
            body: read_body(from).await?,
        })
    }

    /// Writes it.
    ///
    /// # Errors
    ///
    /// The stream breaks, or the body has more than 65,535 bytes.
    pub async fn write(&self, to: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
        to.write_u32_le(self.number).await?;
        to.write_u8(self.tcp.into()).await?;
        write_body(to, &self.body).await
    }
}

/// Reads a message with its length before it, as it goes over TCP (RFC 1035, 4.2.2).
///
/// # Errors
///
/// The stream breaks, or ends.
pub async fn read_body(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let mut body = vec![0; usize::from(from.read_u16().await?)];
    from.read_exact(&mut body).await?;
    Ok(body)
}

/// Writes it so.
///
/// # Errors
///
/// The stream breaks, or the message has more than 65,535 bytes.
pub async fn write_body(to: &mut (impl AsyncWrite + Unpin), body: &[u8]) -> io::Result<()> {
    let length = u16::try_from(body.len()).map_err(io::Error::other)?;
    to.write_u16(length).await?;
    to.write_all(body).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_written_is_read() {
        let messages = [(7, false, vec![]), (u32::MAX, true, vec![1; 65_535])];
        let mut stream = Vec::new();
        let messages = messages.map(|(number, tcp, body)| Message { number, tcp, body });
        for message in &messages {
            message.write(&mut stream).await.unwrap();
        }
        let mut stream = &stream[..];
        for message in &messages {
            assert_eq!(Message::read(&mut stream).await.unwrap(), *message);
        }
        assert!(Message::read(&mut stream).await.is_err());
        let long = Message {
            body: vec![0; 65_536],
            ..messages[0].clone()
        };
        assert!(long.write(&mut Vec::new()).await.is_err());
    }
}
