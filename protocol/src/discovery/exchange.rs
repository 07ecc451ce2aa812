//! The advert exchange: one request-response protocol on which a peer is asked what it hosts.
//!
//! Request: one byte 0 (every model) or 1 followed by the 32 bytes of a model id. Response: one byte with the number of
//! adverts (0 to [`MAX_ADVERTS`]), then for each a `u32` length (little-endian) and that many bytes of a signed advert.

use std::io;

use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use libp2p::StreamProtocol;
use libp2p::request_response::Codec;

use crate::ModelId;
use crate::advert::MAX_ADVERT_BYTES;

/// The protocol's name in multistream negotiation.
pub const ADVERT_PROTOCOL: StreamProtocol = StreamProtocol::new("/hanse/advert/1");
/// The most adverts in one response: a member hosts few models at once.
pub const MAX_ADVERTS: usize = 8;

/// Which advert is asked for; `None` asks for all.
pub(crate) type AdvertRequest = Option<ModelId>;
/// Encoded signed adverts, unverified.
pub(crate) type AdvertResponse = Vec<Vec<u8>>;

/// Reads and writes the exchange's two messages within their limits.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct AdvertCodec;

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl Codec for AdvertCodec {
    type Protocol = StreamProtocol;
    type Request = AdvertRequest;
    type Response = AdvertResponse;

    async fn read_request<T: AsyncRead + Unpin + Send>(
        &mut self,
        _: &StreamProtocol,
        io: &mut T,
    ) -> io::Result<AdvertRequest> {
        let mut kind = [0];
        io.read_exact(&mut kind).await?;
        match kind[0] {
            0 => Ok(None),
            1 => {
                let mut id = [0; 32];
                io.read_exact(&mut id).await?;
                Ok(Some(ModelId(id)))
            }
            _ => Err(invalid("an advert request starts with 0 or 1")),
        }
    }

    async fn read_response<T: AsyncRead + Unpin + Send>(
        &mut self,
        _: &StreamProtocol,
        io: &mut T,
    ) -> io::Result<AdvertResponse> {
        let mut count = [0];
        io.read_exact(&mut count).await?;
        if usize::from(count[0]) > MAX_ADVERTS {
            return Err(invalid("too many adverts in one response"));
        }
        let mut adverts = Vec::new();
        for _ in 0..count[0] {
            let mut length = [0; 4];
            io.read_exact(&mut length).await?;
            let length = u32::from_le_bytes(length);
            if length as usize > MAX_ADVERT_BYTES {
                return Err(invalid("an advert is longer than allowed"));
            }
            let mut advert = Vec::new();
            // `take` and `read_to_end` grow with what arrives, so a false length costs nothing.
            (&mut *io).take(u64::from(length)).read_to_end(&mut advert).await?;
            if advert.len() != length as usize {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            adverts.push(advert);
        }
        Ok(adverts)
    }

    async fn write_request<T: AsyncWrite + Unpin + Send>(
        &mut self,
        _: &StreamProtocol,
        io: &mut T,
        request: AdvertRequest,
    ) -> io::Result<()> {
        match request {
            None => io.write_all(&[0]).await,
            Some(model) => {
                io.write_all(&[1]).await?;
                io.write_all(&model.0).await
            }
        }
    }

    async fn write_response<T: AsyncWrite + Unpin + Send>(
        &mut self,
        _: &StreamProtocol,
        io: &mut T,
        adverts: AdvertResponse,
    ) -> io::Result<()> {
        let count = u8::try_from(adverts.len()).map_err(|_| invalid("too many adverts in one response"))?;
        io.write_all(&[count]).await?;
        for advert in adverts {
            let length = u32::try_from(advert.len()).map_err(|_| invalid("an advert is longer than allowed"))?;
            io.write_all(&length.to_le_bytes()).await?;
            io.write_all(&advert).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::executor::block_on;
    use futures::io::Cursor;

    fn read(bytes: &[u8]) -> io::Result<AdvertResponse> {
        block_on(AdvertCodec.read_response(&ADVERT_PROTOCOL, &mut Cursor::new(bytes)))
    }

    #[test]
    fn messages_survive_the_round_trip() {
        for request in [None, Some(ModelId([9; 32]))] {
            let mut wire = Cursor::new(Vec::new());
            block_on(AdvertCodec.write_request(&ADVERT_PROTOCOL, &mut wire, request)).unwrap();
            let back =
                block_on(AdvertCodec.read_request(&ADVERT_PROTOCOL, &mut Cursor::new(wire.into_inner()))).unwrap();
            assert_eq!(back, request);
        }
        let adverts = vec![vec![1, 2, 3], vec![]];
        let mut wire = Cursor::new(Vec::new());
        block_on(AdvertCodec.write_response(&ADVERT_PROTOCOL, &mut wire, adverts.clone())).unwrap();
        assert_eq!(read(&wire.into_inner()).unwrap(), adverts);
    }

    #[test]
    fn lengths_beyond_the_limits_and_truncations_are_refused() {
        assert!(read(&[200]).is_err(), "too many adverts");
        assert!(read(&[1, 0xff, 0xff, 0xff, 0xff]).is_err(), "too long");
        assert!(read(&[1, 4, 0, 0, 0, 1, 2]).is_err(), "truncated");
        assert!(read(&[]).is_err(), "empty");
        assert!(block_on(AdvertCodec.read_request(&ADVERT_PROTOCOL, &mut Cursor::new([7]))).is_err());
    }
}
