//! The sockets of a gateway: bounded in number, with a deadline for every request's head and every write, and ended politely.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_io_timeout::TimeoutStream;

use super::{GatewayApp, GatewayError};

/// How long a connection may take to send a request's head; also how long it may idle between requests.
const HEAD_TIMEOUT: Duration = Duration::from_secs(20);
/// The most headers that a request may have, and bytes of them.
const MAX_HEADERS: usize = 64;
const MAX_HEAD_BYTES: usize = 64 << 10;
/// How long to wait when the system gives no more sockets.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a server's sockets may cost.
#[derive(Debug, Clone, Copy)]
pub struct SocketLimits {
    /// Connections at a time; more wait to be accepted.
    pub max_connections: usize,
    /// A connection whose other end takes no byte of an answer for so long is closed.
    pub write_timeout: Duration,
    /// How long requests in flight may go on after the server was told to end.
    pub drain_timeout: Duration,
}

impl Default for SocketLimits {
    /// 1024 connections, 60 seconds without a byte taken, 30 seconds to drain.
    fn default() -> Self {
        Self { max_connections: 1024, write_timeout: Duration::from_secs(60), drain_timeout: Duration::from_secs(30) }
    }
}

/// Serves until `ended` completes, then lets requests in flight go on for the configured time.
///
/// # Errors
/// None at present beyond those of the listener's address; an accept that fails is tried again.
pub async fn serve(
    listener: TcpListener,
    app: GatewayApp,
    ended: impl Future<Output = ()>,
) -> Result<(), GatewayError> {
    let limits = app.gateway.config.sockets;
    let ended = async {
        ended.await;
        app.drain();
    };
    serve_routes(listener, app.router.clone(), limits, ended).await
}

/// Serves any routes in the same way, within `limits`.
///
/// # Errors
/// As [`serve`].
pub async fn serve_routes(
    listener: TcpListener,
    routes: Router,
    limits: SocketLimits,
    ended: impl Future<Output = ()>,
) -> Result<(), GatewayError> {
    listener.local_addr()?;
    let places = Arc::new(Semaphore::new(limits.max_connections.max(1)));
    let graceful = GracefulShutdown::new();
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD_BYTES);
    tokio::pin!(ended);
    loop {
        let accepted = async {
            let place = places.clone().acquire_owned().await;
            (place, listener.accept().await)
        };
        let (place, accepted) = tokio::select! {
            () = &mut ended => break,
            accepted = accepted => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // Tokens go out one by one.
        let _ = stream.set_nodelay(true);
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(limits.write_timeout));
        let service = TowerToHyperService::new(routes.clone());
        let connection = graceful.watch(http.serve_connection(TokioIo::new(Box::pin(stream)), service));
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection ended");
            }
            drop(place);
        });
    }
    drop(listener);
    if tokio::time::timeout(limits.drain_timeout, graceful.shutdown()).await.is_err() {
        tracing::warn!("requests in flight did not end in time");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use axum::routing::get;

    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn who_does_not_read_an_answer_gives_its_place_to_another() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        // More than the system's buffers take.
        let routes =
            Router::new().route("/", get(async || vec![b'x'; 64 << 20])).route("/small", get(async || "small"));
        let limits =
            SocketLimits { max_connections: 1, write_timeout: Duration::from_millis(200), ..SocketLimits::default() };
        tokio::spawn(serve_routes(listener, routes, limits, std::future::pending()));
        let asked = tokio::task::spawn_blocking(move || {
            let ask = |path: &str| {
                let mut socket = std::net::TcpStream::connect(address).unwrap();
                write!(socket, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
                socket.set_read_timeout(Some(HEAD_TIMEOUT / 2)).unwrap();
                socket
            };
            let mut stalled = ask("/");
            // It has the only place.
            stalled.read_exact(&mut [0]).unwrap();
            let mut answer = String::new();
            ask("/small").read_to_string(&mut answer).unwrap();
            answer
        });
        assert!(asked.await.unwrap().ends_with("small"));
    }
}
