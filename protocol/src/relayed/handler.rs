//! One connection's part: opens streams that a lane asks for, and hands over those that the other side opens.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::task::{Context, Poll};

use libp2p::core::UpgradeInfo;
use libp2p::swarm::handler::{ConnectionEvent, DialUpgradeError, FullyNegotiatedInbound, FullyNegotiatedOutbound};
use libp2p::swarm::{ConnectionHandler, ConnectionHandlerEvent, StreamUpgradeError, SubstreamProtocol};
use libp2p::{InboundUpgrade, OutboundUpgrade, Stream, StreamProtocol};

use super::{FRAMES_PROTOCOL, LaneEnds, Opening};

/// The other side has opened its first stream: somebody has to serve this connection.
#[derive(Debug)]
pub(crate) struct FirstStream;

#[derive(Debug)]
pub(crate) struct Handler {
    ends: LaneEnds,
    /// Whether streams of the other side are accepted.
    serves: bool,
    first_stream: First,
}

#[derive(Debug, PartialEq)]
enum First {
    Awaited,
    Arrived,
    Told,
}

impl Handler {
    pub(super) fn new(ends: LaneEnds, serves: bool) -> Self {
        Self { ends, serves, first_stream: First::Awaited }
    }
}

impl ConnectionHandler for Handler {
    type FromBehaviour = Infallible;
    type ToBehaviour = FirstStream;
    type InboundProtocol = FramesUpgrade;
    type OutboundProtocol = FramesUpgrade;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = Opening;

    fn listen_protocol(&self) -> SubstreamProtocol<FramesUpgrade> {
        SubstreamProtocol::new(FramesUpgrade(self.serves.then_some(FRAMES_PROTOCOL)), ())
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ConnectionHandlerEvent<FramesUpgrade, Opening, FirstStream>> {
        if self.first_stream == First::Arrived {
            self.first_stream = First::Told;
            return Poll::Ready(ConnectionHandlerEvent::NotifyBehaviour(FirstStream));
        }
        while let Poll::Ready(Some(opening)) = self.ends.opening.poll_recv(cx) {
            if opening.is_closed() {
                continue;
            }
            let protocol = SubstreamProtocol::new(FramesUpgrade(Some(FRAMES_PROTOCOL)), opening);
            return Poll::Ready(ConnectionHandlerEvent::OutboundSubstreamRequest { protocol });
        }
        Poll::Pending
    }

    fn on_behaviour_event(&mut self, event: Infallible) {
        match event {}
    }

    fn on_connection_event(&mut self, event: ConnectionEvent<'_, FramesUpgrade, FramesUpgrade, (), Opening>) {
        match event {
            ConnectionEvent::FullyNegotiatedInbound(FullyNegotiatedInbound { protocol: stream, .. }) => {
                if self.first_stream == First::Awaited {
                    self.first_stream = First::Arrived;
                }
                // One that nobody takes in time is dropped, and so reset: the caller asks another replica.
                if self.ends.accepted.try_send(stream).is_err() {
                    tracing::debug!("too many streams wait to be served");
                }
            }
            ConnectionEvent::FullyNegotiatedOutbound(FullyNegotiatedOutbound { protocol: stream, info: opening }) => {
                // The asker may have gone; the stream is then dropped.
                let _ = opening.send(Ok(stream));
            }
            ConnectionEvent::DialUpgradeError(DialUpgradeError { info: opening, error }) => {
                let reason = match error {
                    StreamUpgradeError::Timeout => "the stream was not opened in time".to_owned(),
                    StreamUpgradeError::NegotiationFailed => format!("the peer does not speak {FRAMES_PROTOCOL}"),
                    StreamUpgradeError::Io(error) => error.to_string(),
                    StreamUpgradeError::Apply(never) => match never {},
                };
                // As above.
                let _ = opening.send(Err(reason));
            }
            _ => {}
        }
    }
}

/// Negotiates [`FRAMES_PROTOCOL`], or nothing at all.
#[derive(Debug)]
pub(crate) struct FramesUpgrade(Option<StreamProtocol>);

impl UpgradeInfo for FramesUpgrade {
    type Info = StreamProtocol;
    type InfoIter = std::option::IntoIter<StreamProtocol>;

    fn protocol_info(&self) -> Self::InfoIter {
        self.0.clone().into_iter()
    }
}

impl InboundUpgrade<Stream> for FramesUpgrade {
    type Output = Stream;
    type Error = Infallible;
    type Future = Ready<Result<Stream, Infallible>>;

    fn upgrade_inbound(self, stream: Stream, _: StreamProtocol) -> Self::Future {
        ready(Ok(stream))
    }
}

impl OutboundUpgrade<Stream> for FramesUpgrade {
    type Output = Stream;
    type Error = Infallible;
    type Future = Ready<Result<Stream, Infallible>>;

    fn upgrade_outbound(self, stream: Stream, _: StreamProtocol) -> Self::Future {
        ready(Ok(stream))
    }
}
