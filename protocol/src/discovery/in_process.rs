//! A control plane without sockets: all members live in one process, and what they say is counted.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use futures::{AsyncRead, AsyncWrite};
use libp2p::core::muxing::StreamMuxerBox;
use libp2p::core::transport::{Boxed, MemoryTransport};
use libp2p::core::upgrade::Version;
use libp2p::identity::Keypair;
use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, PeerId, Transport, noise, yamux};

/// What one member of an in-process network has sent and received: bytes as a TCP socket would carry them, encrypted and multiplexed.
#[derive(Debug, Default)]
pub struct Traffic {
    sent: AtomicU64,
    received: AtomicU64,
    connections: AtomicU64,
}

impl Traffic {
    /// Bytes sent so far.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Bytes received so far.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Connections made so far, whoever dialled.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.connections.load(Ordering::Relaxed)
    }
}

/// Whether an address is one of an in-process network.
pub(super) fn is_memory(address: &Multiaddr) -> bool {
    matches!(address.iter().next(), Some(Protocol::Memory(_)))
}

/// Connections between members of this process, secured and multiplexed like those over TCP.
pub(super) fn transport(
    keypair: &Keypair,
    traffic: Arc<Traffic>,
) -> Result<Boxed<(PeerId, StreamMuxerBox)>, noise::Error> {
    let counted = MemoryTransport::default().map(move |stream, _| {
        traffic.connections.fetch_add(1, Ordering::Relaxed);
        Counted { stream, traffic }
    });
    let secured = counted.upgrade(Version::V1Lazy).authenticate(noise::Config::new(keypair)?);
    Ok(secured.multiplex(yamux::Config::default()).boxed())
}

/// A stream whose bytes are counted.
struct Counted<S> {
    stream: S,
    traffic: Arc<Traffic>,
}

fn count(outcome: &Poll<io::Result<usize>>, counter: &AtomicU64) {
    if let Poll::Ready(Ok(bytes)) = outcome {
        counter.fetch_add(*bytes as u64, Ordering::Relaxed);
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_read(cx, buffer);
        count(&outcome, &self.traffic.received);
        outcome
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write(cx, bytes);
        count(&outcome, &self.traffic.sent);
        outcome
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_close(cx)
    }
}
