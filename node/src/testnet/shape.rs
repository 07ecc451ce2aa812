//! What happens to a packet on its way: the pure core of the shaper, without clock and sockets.
//!
//! Time is a [`Duration`] since some start that the caller chose; it must not go back.

use std::collections::VecDeque;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Bytes that may be on the way in one direction; what comes when so many are is lost, as in a full router.
const MAX_QUEUED_BYTES: usize = 8 << 20;
/// Packets that may be on the way in one direction.
const MAX_QUEUED_PACKETS: usize = 8192;

/// What a path does to the packets of one direction.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize)]
pub struct Shape {
    /// How long each packet takes: half the round trip to be added.
    #[serde(serialize_with = "as_millis")]
    pub delay: Duration,
    /// At most so much more, different for each packet. Packets do not overtake each other.
    #[serde(serialize_with = "as_millis")]
    pub jitter: Duration,
    /// Share of the packets that are lost, 0 to 1.
    pub loss: f64,
    /// Nothing comes through.
    pub cut: bool,
}

fn as_millis<S: serde::Serializer>(value: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(value.as_secs_f64() * 1e3)
}

impl Shape {
    /// One direction of a path whose round trip is `rtt` longer and varies by `jitter`, and that loses the share `loss`.
    #[must_use]
    pub fn path(rtt: Duration, jitter: Duration, loss: f64) -> Self {
        Self { delay: rtt / 2, jitter: jitter / 2, loss, cut: false }
    }
}

/// What became of the packets of one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct Counts {
    /// Came out at the other end.
    pub passed: u64,
    /// Bytes in them.
    pub passed_bytes: u64,
    /// Lost by chance.
    pub lost: u64,
    /// Lost in a cut.
    pub cut: u64,
    /// Lost because too much was on the way.
    pub overflowed: u64,
}

/// One direction of a path: packets `P` go in and come out later, in the same order, or not at all.
#[derive(Debug)]
pub struct Lane<P> {
    shape: Shape,
    rng: StdRng,
    /// When each packet comes out, ascending.
    queue: VecDeque<(Duration, usize, P)>,
    queued_bytes: usize,
    counts: Counts,
}

impl<P> Lane<P> {
    /// An empty path. The same seed, shape and packets give the same losses and delays.
    #[must_use]
    pub fn new(shape: Shape, seed: u64) -> Self {
        Self {
            shape,
            rng: StdRng::seed_from_u64(seed),
            queue: VecDeque::new(),
            queued_bytes: 0,
            counts: Counts::default(),
        }
    }

    /// What is done to packets that come from now on.
    #[must_use]
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Changes what is done to packets that come from now on. A cut also loses what is on the way.
    pub fn set_shape(&mut self, shape: Shape) {
        self.shape = shape;
        if shape.cut {
            self.counts.cut += self.queue.len() as u64;
            self.queue.clear();
            self.queued_bytes = 0;
        }
    }

    /// What became of the packets so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// A packet of `bytes` goes in at `now`.
    pub fn enter(&mut self, now: Duration, bytes: usize, packet: P) {
        if self.shape.cut {
            self.counts.cut += 1;
            return;
        }
        // Drawn for every packet, so that a change of the loss does not change the delays.
        let (lost, late) = (self.rng.random::<f64>() < self.shape.loss, self.rng.random::<f64>());
        if lost {
            self.counts.lost += 1;
            return;
        }
        if self.queue.len() >= MAX_QUEUED_PACKETS || self.queued_bytes + bytes > MAX_QUEUED_BYTES {
            self.counts.overflowed += 1;
            return;
        }
        let due = now + self.shape.delay + self.shape.jitter.mul_f64(late);
        let due = self.queue.back().map_or(due, |(last, ..)| due.max(*last));
        self.queued_bytes += bytes;
        self.queue.push_back((due, bytes, packet));
    }

    /// When the next packet comes out.
    #[must_use]
    pub fn next_due(&self) -> Option<Duration> {
        self.queue.front().map(|(due, ..)| *due)
    }

    /// The next packet that has come out by `now`.
    pub fn leave(&mut self, now: Duration) -> Option<P> {
        self.queue.front().filter(|(due, ..)| *due <= now)?;
        let (_, bytes, packet) = self.queue.pop_front()?;
        self.queued_bytes -= bytes;
        self.counts.passed += 1;
        self.counts.passed_bytes += bytes as u64;
        Some(packet)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn all(lane: &mut Lane<u32>) -> Vec<(Duration, u32)> {
        let mut out = Vec::new();
        while let Some(due) = lane.next_due() {
            assert!(
                due == Duration::ZERO || lane.leave(due - Duration::from_nanos(1)).is_none(),
                "nothing comes early"
            );
            out.push((due, lane.leave(due).unwrap()));
        }
        out
    }

    #[test]
    fn a_packet_takes_half_the_round_trip_each_way() {
        let mut lane = Lane::new(Shape::path(20 * MS, Duration::ZERO, 0.0), 1);
        lane.enter(3 * MS, 100, 7);
        assert_eq!(all(&mut lane), [(13 * MS, 7)]);
        assert_eq!((lane.counts().passed, lane.counts().passed_bytes), (1, 100));
    }

    #[test]
    fn jitter_delays_within_its_bound_and_keeps_the_order() {
        let mut lane = Lane::new(Shape { delay: 10 * MS, jitter: 5 * MS, ..Shape::default() }, 2);
        (0..500).for_each(|i| lane.enter(MS * i / 10, 100, i));
        let out = all(&mut lane);
        assert!(out.is_sorted());
        assert!(out.iter().map(|(_, packet)| *packet).eq(0..500), "in the order they came");
        let took: Vec<Duration> = out.iter().map(|(due, i)| *due - MS * *i / 10).collect();
        assert!(took.iter().all(|t| (10 * MS..=15 * MS).contains(t)));
        assert!(took.iter().max().unwrap().saturating_sub(*took.iter().min().unwrap()) > 2 * MS, "it varies");
    }

    #[test]
    fn the_stated_share_is_lost_and_the_same_seed_loses_the_same() {
        let run = |seed| {
            let mut lane = Lane::new(Shape { loss: 0.1, ..Shape::default() }, seed);
            for i in 0..5000 {
                lane.enter(Duration::ZERO, 1, i);
                lane.leave(Duration::ZERO);
            }
            lane.counts()
        };
        let counts = run(3);
        assert!((400..=600).contains(&counts.lost), "{counts:?}");
        assert_eq!(counts.passed + counts.lost, 5000);
        assert_eq!(run(3), counts);
        assert_ne!(run(4), counts);
    }

    #[test]
    fn a_cut_path_loses_what_is_on_it_and_a_healed_one_delivers_again() {
        let mut lane = Lane::new(Shape { delay: 10 * MS, ..Shape::default() }, 4);
        lane.enter(Duration::ZERO, 1, 1);
        lane.set_shape(Shape { cut: true, ..lane.shape() });
        lane.enter(MS, 1, 2);
        assert_eq!(lane.next_due(), None);
        assert_eq!(lane.counts().cut, 2);
        lane.set_shape(Shape { cut: false, ..lane.shape() });
        lane.enter(2 * MS, 1, 3);
        assert_eq!(all(&mut lane), [(12 * MS, 3)]);
    }

    #[test]
    fn what_does_not_fit_on_the_way_is_lost() {
        let mut lane = Lane::new(Shape { delay: MS, ..Shape::default() }, 5);
        (0..MAX_QUEUED_PACKETS as u32 + 3).for_each(|i| lane.enter(Duration::ZERO, 1, i));
        assert_eq!(lane.counts().overflowed, 3);
        let mut lane = Lane::new(Shape { delay: MS, ..Shape::default() }, 6);
        (0..3).for_each(|i| lane.enter(Duration::ZERO, MAX_QUEUED_BYTES / 2, i));
        assert_eq!(lane.counts().overflowed, 1);
        assert_eq!(all(&mut lane).len(), 2);
    }

    #[test]
    fn a_shorter_delay_does_not_let_packets_overtake() {
        let mut lane = Lane::new(Shape { delay: 10 * MS, ..Shape::default() }, 7);
        lane.enter(Duration::ZERO, 1, 1);
        lane.set_shape(Shape::default());
        lane.enter(MS, 1, 2);
        assert_eq!(all(&mut lane), [(10 * MS, 1), (10 * MS, 2)]);
    }
}
