//! Congestion control for small calls with a large one now and then, over lines that lose packets for other reasons than congestion: Cubic, but
//! a loss counts only where it is more than a bad line's.
//!
//! Calls of a row or two never fill the window, so that it does not grow with them, and each packet lost takes 30 % off: after some dozen
//! losses a window of 256 KiB is down to two packets. And a long prompt over a line that loses 1 % gets a window of 18 KB (Mathis et al., 1997), so
//! that a message of 300 KB takes seventeen round trips.

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory, CubicConfig};
use quinn_proto::RttEstimator;

/// What a new connection may send at once (RFC 9002, section 7.2): the window is never smaller, and a loss does not count where no more
/// was on the way.
const THIN: u64 = 14_720;
/// For so long it counts how much was on the way.
const MEMORY: Duration = Duration::from_secs(1);
/// A loss counts where more than one byte of so many on the way is lost in a round trip. As in BBR (draft-ietf-ccwg-bbr, `BBR.LossThresh`): what
/// overflows a queue is more.
const LOSS_SHARE: u64 = 50;

/// Makes the controller of each connection.
#[derive(Debug)]
pub(super) struct Factory(pub(super) Arc<CubicConfig>);

impl ControllerFactory for Factory {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        let cubic = ControllerFactory::build(self.0.clone(), now, current_mtu);
        Box::new(Tolerant {
            cubic,
            flight: 0,
            most: 0,
            most_at: now,
            lost: 0,
            lost_from: now,
            round_trip: Duration::ZERO,
        })
    }
}

/// Cubic that does not hear of every loss.
struct Tolerant {
    cubic: Box<dyn Controller>,
    /// Bytes on the way, those since the last acknowledgement and some that need none included.
    flight: u64,
    /// The most of late, and when that was.
    most: u64,
    most_at: Instant,
    /// Bytes lost within a round trip from then on.
    lost: u64,
    lost_from: Instant,
    round_trip: Duration,
}

impl Controller for Tolerant {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.flight += bytes;
        if self.flight >= self.most || now.saturating_duration_since(self.most_at) > MEMORY {
            (self.most, self.most_at) = (self.flight, now);
        }
        self.cubic.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: &RttEstimator) {
        self.round_trip = rtt.get();
        self.cubic.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, largest_acked: Option<u64>) {
        self.flight = in_flight;
        self.cubic.on_end_acks(now, in_flight, app_limited, largest_acked);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, is_persistent_congestion: bool, lost_bytes: u64) {
        if now.saturating_duration_since(self.lost_from) > self.round_trip {
            (self.lost, self.lost_from) = (0, now);
        }
        self.lost += lost_bytes;
        // Nothing is lost where a router says that its queue is filling.
        let told = lost_bytes == 0 || is_persistent_congestion;
        if self.most > THIN && (told || self.lost * LOSS_SHARE > self.most) {
            self.cubic.on_congestion_event(now, sent, is_persistent_congestion, lost_bytes);
        }
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.cubic.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        self.cubic.window().max(THIN)
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self { cubic: self.cubic.clone_box(), ..*self })
    }

    fn initial_window(&self) -> u64 {
        self.cubic.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACKET: u64 = 1452;
    const ROUND_TRIP: Duration = Duration::from_millis(20);

    fn controller(now: Instant) -> Box<dyn Controller> {
        let mut cubic = CubicConfig::default();
        cubic.initial_window(256 << 10);
        Arc::new(Factory(Arc::new(cubic))).build(now, PACKET as u16)
    }

    /// Sends so many packets every other round trip, of which some are lost.
    fn lose(controller: &mut dyn Controller, from: Instant, (lost, packets): (u64, u64), times: u32) -> Instant {
        for number in 0..times {
            let now = from + 2 * number * ROUND_TRIP;
            controller.on_sent(now, packets * PACKET, u64::from(number));
            controller.on_congestion_event(now + ROUND_TRIP, now, false, lost * PACKET);
            controller.on_end_acks(now + ROUND_TRIP, 0, true, None);
        }
        from + 2 * times * ROUND_TRIP
    }

    #[test]
    fn losses_of_a_bad_line_leave_the_window_as_it_is() {
        let now = Instant::now();
        let mut controller = controller(now);
        let later = lose(&mut *controller, now, (1, 2), 1000);
        lose(&mut *controller, later, (2, 100), 1000);
        assert_eq!(controller.window(), 256 << 10);
    }

    #[test]
    fn losses_of_a_full_queue_make_it_smaller_but_not_smaller_than_that_of_a_new_connection() {
        let now = Instant::now();
        let mut controller = controller(now);
        let later = lose(&mut *controller, now, (3, 100), 1);
        assert_eq!(controller.window(), (256 << 10) * 7 / 10);
        lose(&mut *controller, later, (3, 100), 100);
        assert_eq!(controller.window(), THIN);
        let copy = controller.clone_box();
        assert_eq!((copy.window(), copy.initial_window()), (THIN, 256 << 10));
    }

    #[test]
    fn a_router_that_tells_of_congestion_is_heard() {
        let now = Instant::now();
        let mut controller = controller(now);
        lose(&mut *controller, now, (0, 100), 1);
        assert_eq!(controller.window(), (256 << 10) * 7 / 10);
    }

    #[test]
    fn what_was_on_the_way_long_ago_does_not_count() {
        let now = Instant::now();
        let mut controller = controller(now);
        let later = lose(&mut *controller, now, (3, 100), 1);
        let after = controller.window();
        lose(&mut *controller, later + 2 * MEMORY, (1, 2), 100);
        assert_eq!(controller.window(), after);
    }
}
