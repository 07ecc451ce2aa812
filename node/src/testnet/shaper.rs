//! A UDP proxy before one node's data plane, which makes the path to it long, unsteady, lossy or one-way.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use socket2::SockRef;
use tokio::net::UdpSocket;
use tokio::sync::{Notify, mpsc};
use tokio_util::task::AbortOnDropHandle;

use super::alarm::Alarm;
use super::shape::{Counts, Lane, Shape};

/// The longest packet that UDP carries.
const MAX_PACKET: usize = 65_535;
/// Clients served at once; the one that has been silent longest makes room for another.
const MAX_CLIENTS: usize = 256;
/// Packets from the node that wait to be put on their way.
const FROM_NODE_QUEUE: usize = 1024;
/// Packets that are taken at a time, where so many are there.
const BURST: usize = 64;
/// Bytes that the system keeps of what arrives, where it allows so many: what is lost should be lost by the shape, and a call of many rows
/// comes as a burst of more than the usual 208 KiB.
const SOCKET_BUFFER: usize = 4 << 20;

/// A packet and the client that it is from or for.
type Packet = (SocketAddr, Vec<u8>);

/// A running proxy; it ends when dropped.
#[derive(Debug)]
pub struct Shaper {
    address: SocketAddr,
    paths: Arc<Paths>,
    _task: AbortOnDropHandle<()>,
}

/// What the proxy's task and its owner share.
#[derive(Debug)]
struct Paths {
    lanes: Mutex<Lanes>,
    /// Something changed that the task should look at.
    changed: Notify,
}

#[derive(Debug)]
struct Lanes {
    target: Option<SocketAddr>,
    to_node: Lane<Packet>,
    from_node: Lane<Packet>,
}

impl Paths {
    fn lanes(&self) -> MutexGuard<'_, Lanes> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shaper {
    /// Listens on a free loopback port, with the same shape in both directions. Packets are lost until there is a target.
    ///
    /// # Errors
    /// No socket can be opened.
    pub async fn start(shape: Shape, seed: u64) -> io::Result<Self> {
        let socket = bind().await?;
        let address = socket.local_addr()?;
        let alarm = Alarm::new()?;
        let lanes = Lanes {
            target: None,
            to_node: Lane::new(shape, seed),
            from_node: Lane::new(shape, seed.wrapping_add(0x9e37_79b9_7f4a_7c15)),
        };
        let paths = Arc::new(Paths { lanes: Mutex::new(lanes), changed: Notify::new() });
        let task = AbortOnDropHandle::new(tokio::spawn(run(Arc::new(socket), paths.clone(), alarm)));
        Ok(Self { address, paths, _task: task })
    }

    /// Where clients send to.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where the node listens from now on; `None` when it does not run.
    pub fn set_target(&self, target: Option<SocketAddr>) {
        self.paths.lanes().target = target;
    }

    /// What is done to packets on their way to the node and from it.
    #[must_use]
    pub fn shapes(&self) -> (Shape, Shape) {
        let lanes = self.paths.lanes();
        (lanes.to_node.shape(), lanes.from_node.shape())
    }

    /// Changes what is done to packets on their way to the node and from it.
    pub fn set_shapes(&self, to_node: Shape, from_node: Shape) {
        let mut lanes = self.paths.lanes();
        lanes.to_node.set_shape(to_node);
        lanes.from_node.set_shape(from_node);
        drop(lanes);
        self.paths.changed.notify_one();
    }

    /// What became of the packets to the node and from it.
    #[must_use]
    pub fn counts(&self) -> (Counts, Counts) {
        let lanes = self.paths.lanes();
        (lanes.to_node.counts(), lanes.from_node.counts())
    }
}

/// One client's way out to the node: a socket of its own, as a router with address translation has it.
struct Way {
    socket: Arc<UdpSocket>,
    used: Instant,
    _reader: AbortOnDropHandle<()>,
}

async fn run(socket: Arc<UdpSocket>, paths: Arc<Paths>, alarm: Alarm) {
    let start = Instant::now();
    let (sender, mut answers) = mpsc::channel::<Packet>(FROM_NODE_QUEUE);
    let mut ways: HashMap<SocketAddr, Way> = HashMap::new();
    let mut buffer = vec![0; MAX_PACKET];
    loop {
        let due = {
            let lanes = paths.lanes();
            [lanes.to_node.next_due(), lanes.from_node.next_due()].into_iter().flatten().min()
        };
        let coming = async {
            match due {
                Some(due) => alarm.at(start + due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = paths.changed.notified() => {}
            () = coming => {}
            Some((client, packet)) = answers.recv() => {
                let (now, mut lanes) = (start.elapsed(), paths.lanes());
                lanes.from_node.enter(now, packet.len(), (client, packet));
                for _ in 1..BURST {
                    let Ok((client, packet)) = answers.try_recv() else { break };
                    lanes.from_node.enter(now, packet.len(), (client, packet));
                }
            }
            // An error tells of an earlier packet that could not be delivered; that packet is lost.
            received = socket.recv_from(&mut buffer) => if let Ok((length, client)) = received {
                let (now, mut lanes) = (start.elapsed(), paths.lanes());
                let packet = |buffer: &[u8], length| buffer.get(..length).unwrap_or_default().to_vec();
                lanes.to_node.enter(now, length, (client, packet(&buffer, length)));
                for _ in 1..BURST {
                    let Ok((length, client)) = socket.try_recv_from(&mut buffer) else { break };
                    lanes.to_node.enter(now, length, (client, packet(&buffer, length)));
                }
            }
        }
        let now = start.elapsed();
        loop {
            let (target, packet) = {
                let mut lanes = paths.lanes();
                (lanes.target, lanes.to_node.leave(now))
            };
            let Some((client, packet)) = packet else { break };
            let Some(target) = target else { continue };
            if let Some(way) = way_of(client, &mut ways, &sender).await {
                // What the system does not take is lost, as on a real path.
                let _ = way.send_to(&packet, target).await;
            }
        }
        loop {
            let packet = paths.lanes().from_node.leave(now);
            let Some((client, packet)) = packet else { break };
            let _ = socket.send_to(&packet, client).await;
        }
    }
}

/// A socket on a free loopback port.
async fn bind() -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    // As many as there are will do.
    let _ = SockRef::from(&socket).set_recv_buffer_size(SOCKET_BUFFER);
    Ok(socket)
}

async fn way_of(
    client: SocketAddr,
    ways: &mut HashMap<SocketAddr, Way>,
    answers: &mpsc::Sender<Packet>,
) -> Option<Arc<UdpSocket>> {
    if let Some(way) = ways.get_mut(&client) {
        way.used = Instant::now();
        return Some(way.socket.clone());
    }
    if ways.len() >= MAX_CLIENTS {
        let silent = ways.iter().min_by_key(|(_, way)| way.used).map(|(client, _)| *client);
        silent.and_then(|client| ways.remove(&client));
    }
    let socket = Arc::new(bind().await.ok()?);
    let (reading, answers) = (socket.clone(), answers.clone());
    let reader = tokio::spawn(async move {
        let mut buffer = vec![0; MAX_PACKET];
        loop {
            match reading.recv_from(&mut buffer).await {
                Ok((length, _)) => {
                    let packet = buffer.get(..length).unwrap_or_default().to_vec();
                    if answers.send((client, packet)).await.is_err() {
                        return;
                    }
                }
                // The node does not run; a pause, so that a lasting error does not keep a core busy.
                Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        }
    });
    let way = Way { socket: socket.clone(), used: Instant::now(), _reader: AbortOnDropHandle::new(reader) };
    ways.insert(client, way);
    Some(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A node that sends everything back, a shaper before it, and a client.
    async fn echo(shape: Shape) -> (Shaper, UdpSocket, AbortOnDropHandle<()>) {
        let node = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let shaper = Shaper::start(shape, 1).await.unwrap();
        shaper.set_target(Some(node.local_addr().unwrap()));
        let node = AbortOnDropHandle::new(tokio::spawn(async move {
            let mut buffer = [0; 2048];
            while let Ok((length, from)) = node.recv_from(&mut buffer).await {
                node.send_to(&buffer[..length], from).await.unwrap();
            }
        }));
        let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        client.connect(shaper.address()).await.unwrap();
        (shaper, client, node)
    }

    /// A clock that rounds up to milliseconds would be later, each way.
    const LATE: Duration = Duration::from_micros(1800);

    async fn round_trip(client: &UdpSocket, packet: &[u8]) -> Option<Duration> {
        let started = Instant::now();
        client.send(packet).await.unwrap();
        let mut buffer = [0; 2048];
        let answer = tokio::time::timeout(Duration::from_millis(500), client.recv(&mut buffer)).await.ok()?;
        assert_eq!(&buffer[..answer.unwrap()], packet);
        Some(started.elapsed())
    }

    #[tokio::test]
    async fn packets_go_there_and_back_after_the_round_trip() {
        let rtt = Duration::from_millis(40);
        let (shaper, client, _node) = echo(Shape::path(rtt, Duration::ZERO, 0.0)).await;
        // The quickest of many: others may have the cores for a while.
        let (mut quickest, mut packets) = (Duration::MAX, 0);
        while packets < 200 && quickest >= rtt + LATE {
            let took = round_trip(&client, b"hello").await.unwrap();
            assert!(took >= rtt, "{took:?}");
            (quickest, packets) = (quickest.min(took), packets + 1);
        }
        assert!(quickest < rtt + LATE, "{quickest:?}");
        let (to, from) = shaper.counts();
        assert_eq!((to.passed, from.passed), (packets, packets));
    }

    #[tokio::test]
    async fn a_path_that_is_cut_one_way_swallows_the_answers_until_it_is_healed() {
        let (shaper, client, _node) = echo(Shape::default()).await;
        assert!(round_trip(&client, b"one").await.is_some());
        shaper.set_shapes(Shape::default(), Shape { cut: true, ..Shape::default() });
        assert!(round_trip(&client, b"two").await.is_none());
        let (to, from) = shaper.counts();
        assert_eq!((to.passed, from.cut), (2, 1), "it came to the node, the answer did not come back");
        shaper.set_shapes(Shape::default(), Shape::default());
        assert!(round_trip(&client, b"three").await.is_some());
    }

    #[tokio::test]
    async fn clients_are_told_apart() {
        let (shaper, client, _node) = echo(Shape::default()).await;
        let other = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        other.connect(shaper.address()).await.unwrap();
        let (one, two) = tokio::join!(round_trip(&client, b"one"), round_trip(&other, b"two"));
        assert!(one.is_some() && two.is_some());
    }
}
