//! Ports that the home router leads here (UPnP).
//!
//! The data plane's port is led here like the control plane's: with the control plane's alone, clients would send their frames over a
//! connection that carries the DHT too, and whose congestion window starts small.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::Duration;

use igd_next::aio::tokio::{Tokio, search_gateway};
use igd_next::{AddPortError, PortMappingProtocol, SearchOptions};
use libp2p::Multiaddr;
use libp2p::multiaddr::Protocol;
use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::address::is_public_ip;

/// A router forgets a port that is not asked for again in this time, so that one that crashed leaves nothing behind for long.
const LEASE: Duration = Duration::from_secs(20 * 60);
/// Ports are asked for again this often: a router that was started again knows none of them.
const RENEWAL: Duration = Duration::from_secs(5 * 60);
/// Where no router answered, one is looked for again after this, and after twice as long each time.
const FIRST_PAUSE: Duration = Duration::from_secs(30);
const LONGEST_PAUSE: Duration = Duration::from_secs(10 * 60);
/// How long a router may take for one answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long giving the ports back may take in all.
const GIVE_BACK_TIMEOUT: Duration = Duration::from_secs(1);
/// What the router's list of ports says of ours.
const DESCRIPTION: &str = "hanse";

/// A socket of this member. An unspecified address stands for all interfaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Port {
    Tcp(SocketAddrV4),
    Udp(SocketAddrV4),
}

/// Ports by the address of the open internet that leads to them.
pub(super) type Forwarded = BTreeMap<Port, SocketAddr>;

impl Port {
    /// The socket of a listening address, if a router can lead to it.
    pub(super) fn of(address: &Multiaddr) -> Option<Self> {
        let mut parts = address.iter();
        let Some(Protocol::Ip4(ip)) = parts.next() else { return None };
        if ip.is_loopback() {
            return None;
        }
        match parts.next()? {
            Protocol::Tcp(port) => Some(Self::Tcp(SocketAddrV4::new(ip, port))),
            Protocol::Udp(port) => Some(Self::Udp(SocketAddrV4::new(ip, port))),
            _ => None,
        }
    }

    /// The address at which libp2p is reached through `outer`.
    pub(super) fn reached_at(self, outer: SocketAddr) -> Multiaddr {
        let address = Multiaddr::from(outer.ip());
        match self {
            Self::Tcp(_) => address.with(Protocol::Tcp(outer.port())),
            Self::Udp(_) => address.with(Protocol::Udp(outer.port())).with(Protocol::QuicV1),
        }
    }

    fn socket(self) -> SocketAddrV4 {
        let (Self::Tcp(socket) | Self::Udp(socket)) = self;
        socket
    }

    fn protocol(self) -> PortMappingProtocol {
        match self {
            Self::Tcp(_) => PortMappingProtocol::TCP,
            Self::Udp(_) => PortMappingProtocol::UDP,
        }
    }

    /// Whether packets to `local` arrive here.
    fn is_at(self, local: Ipv4Addr) -> bool {
        self.socket().ip().is_unspecified() || *self.socket().ip() == local
    }
}

/// Looks for a router in the background, has the wanted ports led here, and keeps it so. Nothing waits for it.
#[derive(Debug)]
pub(super) struct Gateway {
    wanted: watch::Sender<BTreeSet<Port>>,
    forwarded: watch::Receiver<Forwarded>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Gateway {
    pub(super) fn start() -> Self {
        let (wanted, asked) = watch::channel(BTreeSet::new());
        let (report, forwarded) = watch::channel(Forwarded::new());
        let stop = CancellationToken::new();
        let task = tokio::spawn(run(asked, report, stop.clone()));
        Self { wanted, forwarded, stop, task }
    }

    pub(super) fn want(&self, port: Port) {
        self.wanted.send_if_modified(|wanted| wanted.insert(port));
    }

    pub(super) fn give_back(&self, port: Port) {
        self.wanted.send_if_modified(|wanted| wanted.remove(&port));
    }

    /// The ports that are led here, as soon as that has changed. A dropped future loses nothing.
    pub(super) async fn changed(&mut self) -> Forwarded {
        if self.forwarded.changed().await.is_err() {
            // The task has ended, and says no more.
            std::future::pending::<()>().await;
        }
        self.forwarded.borrow_and_update().clone()
    }

    /// Gives all ports back.
    pub(super) async fn end(mut self) {
        self.stop.cancel();
        // One that does not answer forgets the ports by itself.
        let _ = tokio::time::timeout(GIVE_BACK_TIMEOUT, &mut self.task).await;
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn run(mut wanted: watch::Receiver<BTreeSet<Port>>, report: watch::Sender<Forwarded>, stop: CancellationToken) {
    let mut pause = FIRST_PAUSE;
    loop {
        if !wanted.borrow_and_update().is_empty() {
            let found = tokio::select! {
                () = stop.cancelled() => return,
                found = Router::find() => found,
            };
            let reason = match found {
                Ok(mut router) => {
                    pause = FIRST_PAUSE;
                    tokio::select! {
                        () = stop.cancelled() => return router.give_back_all().await,
                        reason = router.lead(&mut wanted, &report) => reason,
                    }
                }
                Err(reason) => reason,
            };
            tracing::debug!(%reason, "no router leads here");
            report.send_if_modified(|forwarded| !std::mem::take(forwarded).is_empty());
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(pause) => pause = (pause * 2).min(LONGEST_PAUSE),
            // Perhaps another network.
            Ok(()) = wanted.changed() => pause = FIRST_PAUSE,
        }
    }
}

/// A router that takes orders.
struct Router {
    device: igd_next::aio::Gateway<Tokio>,
    /// This machine, as the router sees it.
    local: Ipv4Addr,
    /// The outer port by which it leads to each of ours.
    held: HashMap<Port, u16>,
}

impl Router {
    async fn find() -> Result<Self, String> {
        let device = search_gateway(SearchOptions::default()).await.map_err(|e| e.to_string())?;
        let local = local_ip(device.addr).await.map_err(|e| format!("the way to {}: {e}", device.addr))?;
        Ok(Self { device, local, held: HashMap::new() })
    }

    /// Has the wanted ports led here and says which are, again and again, until the router no longer answers: why.
    async fn lead(
        &mut self,
        wanted: &mut watch::Receiver<BTreeSet<Port>>,
        report: &watch::Sender<Forwarded>,
    ) -> String {
        loop {
            let ports = wanted.borrow_and_update().clone();
            let ip = match answer(self.device.get_external_ip()).await {
                Ok(ip) if is_public_ip(ip) => ip,
                Ok(ip) => return format!("{} has no address of the open internet itself, but {ip}", self.device.addr),
                Err(reason) => return reason,
            };
            let gone: Vec<Port> = self.held.keys().filter(|port| !ports.contains(port)).copied().collect();
            for port in gone {
                self.give_back(port).await;
            }
            let mut forwarded = Forwarded::new();
            let local = self.local;
            for port in ports.into_iter().filter(|port| port.is_at(local)) {
                match self.ask(port).await {
                    Ok(outer) => _ = forwarded.insert(port, SocketAddr::new(ip, outer)),
                    Err(reason) => tracing::debug!(?port, %reason, "the router does not lead here"),
                }
            }
            report.send_if_modified(|known| {
                let news = *known != forwarded;
                *known = forwarded;
                news
            });
            tokio::select! {
                () = tokio::time::sleep(RENEWAL) => {}
                Ok(()) = wanted.changed() => {}
            }
        }
    }

    /// Asks for `port`; the outer port that leads to it. That is the same one, unless another machine has it.
    async fn ask(&mut self, port: Port) -> Result<u16, String> {
        let local = SocketAddr::from((self.local, port.socket().port()));
        let outer = self.held.get(&port).copied().unwrap_or(local.port());
        let lease = u32::try_from(LEASE.as_secs()).unwrap_or(0);
        let (device, protocol) = (&self.device, port.protocol());
        let add = |lease| device.add_port(protocol, outer, local, lease, DESCRIPTION);
        let within = |outcome: Result<Result<(), AddPortError>, _>| outcome.map_err(|_| too_slow());
        let mut outcome = within(tokio::time::timeout(ANSWER_TIMEOUT, add(lease)).await)?;
        if let Err(AddPortError::OnlyPermanentLeasesSupported) = outcome {
            outcome = within(tokio::time::timeout(ANSWER_TIMEOUT, add(0)).await)?;
        }
        let outer = match outcome {
            Ok(()) => outer,
            Err(AddPortError::PortInUse) => answer(device.add_any_port(protocol, local, lease, DESCRIPTION)).await?,
            Err(error) => return Err(error.to_string()),
        };
        self.held.insert(port, outer);
        Ok(outer)
    }

    async fn give_back(&mut self, port: Port) {
        let Some(outer) = self.held.remove(&port) else { return };
        if let Err(reason) = answer(self.device.remove_port(port.protocol(), outer)).await {
            tracing::debug!(?port, %reason, "port not given back");
        }
    }

    async fn give_back_all(&mut self) {
        let ports: Vec<Port> = self.held.keys().copied().collect();
        for port in ports {
            self.give_back(port).await;
        }
    }
}

fn too_slow() -> String {
    format!("no answer within {ANSWER_TIMEOUT:?}")
}

async fn answer<T, E: std::fmt::Display>(asked: impl Future<Output = Result<T, E>>) -> Result<T, String> {
    let outcome = tokio::time::timeout(ANSWER_TIMEOUT, asked).await.map_err(|_| too_slow())?;
    outcome.map_err(|error| error.to_string())
}

/// The address from which this machine talks to `router`.
async fn local_ip(router: SocketAddr) -> std::io::Result<Ipv4Addr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
    // Nothing is sent: this only looks the way up.
    socket.connect(router).await?;
    match socket.local_addr()?.ip() {
        IpAddr::V4(ip) => Ok(ip),
        IpAddr::V6(_) => Err(std::io::ErrorKind::Unsupported.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sockets_that_a_router_can_lead_to_are_asked_for() {
        let of = |address: &str| Port::of(&address.parse().unwrap());
        let socket = |text: &str| text.parse().unwrap();
        assert_eq!(of("/ip4/10.1.1.2/udp/4001/quic-v1"), Some(Port::Udp(socket("10.1.1.2:4001"))));
        assert_eq!(of("/ip4/10.1.1.2/tcp/4001"), Some(Port::Tcp(socket("10.1.1.2:4001"))));
        assert_eq!(of("/ip4/127.0.0.1/tcp/4001"), None);
        assert_eq!(of("/ip6/fe80::1/tcp/4001"), None);
        let local = Ipv4Addr::new(10, 1, 1, 2);
        assert!(Port::Udp(socket("0.0.0.0:4001")).is_at(local) && Port::Udp(socket("10.1.1.2:4001")).is_at(local));
        assert!(!Port::Udp(socket("10.9.9.9:4001")).is_at(local), "the socket of another interface");
    }

    #[tokio::test]
    async fn without_a_router_nothing_waits_for_one() {
        let gateway = Gateway::start();
        gateway.want(Port::Udp(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 4001)));
        tokio::task::yield_now().await;
        tokio::time::timeout(Duration::from_secs(5), gateway.end()).await.expect("it stops in the middle of a search");
    }
}
