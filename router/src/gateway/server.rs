//! The sockets of a gateway: bounded in number, with a deadline for every request's head, and ended politely.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use super::{GatewayApp, GatewayError};

/// How long a connection may take to send a request's head; also how long it may idle between requests.
const HEAD_TIMEOUT: Duration = Duration::from_secs(20);
/// The most headers that a request may have, and bytes of them.
const MAX_HEADERS: usize = 64;
const MAX_HEAD_BYTES: usize = 64 << 10;
/// How long to wait when the system gives no more sockets.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until `ended` completes, then lets requests in flight go on for the configured time.
///
/// # Errors
/// None at present beyond those of the listener's address; an accept that fails is tried again.
pub async fn serve(
    listener: TcpListener,
    app: GatewayApp,
    ended: impl Future<Output = ()>,
) -> Result<(), GatewayError> {
    let (max_connections, drain_timeout) = (app.gateway.config.max_connections, app.gateway.config.drain_timeout);
    let ended = async {
        ended.await;
        app.drain();
    };
    serve_routes(listener, app.router.clone(), max_connections, drain_timeout, ended).await
}

/// Serves any routes in the same way: so many connections at a time until `ended` completes, and for `drain_timeout` those that have
/// a request in flight.
///
/// # Errors
/// As [`serve`].
pub async fn serve_routes(
    listener: TcpListener,
    routes: Router,
    max_connections: usize,
    drain_timeout: Duration,
    ended: impl Future<Output = ()>,
) -> Result<(), GatewayError> {
    listener.local_addr()?;
    let places = Arc::new(Semaphore::new(max_connections.max(1)));
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
        let service = TowerToHyperService::new(routes.clone());
        let connection = graceful.watch(http.serve_connection(TokioIo::new(stream), service));
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection ended");
            }
            drop(place);
        });
    }
    drop(listener);
    if tokio::time::timeout(drain_timeout, graceful.shutdown()).await.is_err() {
        tracing::warn!("requests in flight did not end in time");
    }
    Ok(())
}
