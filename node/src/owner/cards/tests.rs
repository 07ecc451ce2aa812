use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;
const QUIET: Duration = Duration::from_secs(60);
const LIMITS: CardLimits = CardLimits { memory_bytes: 256 * MIB, busy: 0.3, quiet: QUIET };
/// How often a card is looked at here.
const STEP: Duration = Duration::from_millis(250);

fn reading(mib: u64, busy: f64) -> Option<Reading> {
    Some(Reading { others_bytes: mib * MIB, others_busy: Some(busy) })
}

/// A card's rule with a clock.
struct Clocked {
    rule: CardRule,
    now: Instant,
}

impl Clocked {
    /// On a desktop that holds 400 MiB.
    fn desktop() -> Self {
        let now = Instant::now();
        Self { rule: CardRule::new(LIMITS, now, 400 * MIB), now }
    }

    /// Looks for so long, and sees the same all the time; what is said at the end, and how long it took to be said.
    fn sees(&mut self, seconds: u64, reading: Option<Reading>) -> (Option<Taken>, Duration) {
        let begun = self.now;
        let (mut said, mut since) = (self.rule.look(self.now, reading), self.now);
        while self.now - begun < Duration::from_secs(seconds) {
            self.now += STEP;
            let next = self.rule.look(self.now, reading);
            if next != said {
                (said, since) = (next, self.now);
            }
        }
        (said, since - begun)
    }
}

#[test]
fn a_desktop_may_do_what_desktops_do() {
    let mut card = Clocked::desktop();
    // Windows are moved, a film is shown, and a page with pictures is opened.
    for (mib, busy) in [(400, 0.02), (420, 0.25), (480, 0.15), (640, 0.1), (350, 0.0), (600, 0.28)] {
        assert_eq!(card.sees(120, reading(mib, busy)).0, None, "{mib} MiB, {busy}");
    }
}

#[test]
fn a_game_gets_the_card_at_the_first_look_and_keeps_it_until_a_minute_after_its_end() {
    let mut card = Clocked::desktop();
    assert_eq!(card.sees(10, reading(400, 0.02)).0, None);
    let (why, after) = card.sees(300, reading(4400, 0.9));
    assert_eq!((why, after), (Some(Taken::Memory { bytes: 4000 * MIB }), Duration::ZERO));
    // A loading screen, and the menu.
    assert!(card.sees(50, reading(3000, 0.1)).0.is_some());
    assert!(card.sees(50, reading(4400, 0.2)).0.is_some());
    let (why, after) = card.sees(70, reading(420, 0.02));
    assert_eq!((why, after), (None, QUIET));
}

#[test]
fn a_training_job_gets_the_card_by_its_context_or_by_what_it_computes() {
    let mut card = Clocked::desktop();
    // A context takes more than the limit, long before the job asks for what it needs.
    let (why, after) = card.sees(5, reading(400 + 300, 0.0));
    assert_eq!((why, after), (Some(Taken::Memory { bytes: 300 * MIB }), Duration::ZERO));
    let mut card = Clocked::desktop();
    let (why, after) = card.sees(5, reading(500, 0.62));
    assert_eq!((why, after), (Some(Taken::Busy { percent: 62 }), Duration::ZERO));
}

#[test]
fn what_idles_for_ten_minutes_is_part_of_the_machine_and_takes_the_card_again_when_it_computes() {
    let mut card = Clocked::desktop();
    assert!(card.sees(30, reading(9000, 0.8)).0.is_some());
    // A notebook that holds its memory and does nothing.
    let (why, after) = card.sees(900, reading(9000, 0.0));
    assert_eq!(why, None);
    assert!(after >= SETTLED_AFTER + QUIET && after < SETTLED_AFTER + QUIET + 2 * STEP, "{after:?}");
    assert_eq!(card.sees(5, reading(9000, 0.5)), (Some(Taken::Busy { percent: 50 }), Duration::ZERO));
    // Whoever computes a little all the time is not idle, and what it holds is not the machine's.
    let mut card = Clocked::desktop();
    assert!(card.sees(3600, reading(9000, 0.1)).0.is_some());
    // Where it cannot be told who computes, nobody is said to be idle.
    let mut card = Clocked::desktop();
    assert!(card.sees(3600, Some(Reading { others_bytes: 9000 * MIB, others_busy: None })).0.is_some());
}

#[test]
fn a_card_of_which_nothing_is_heard_is_given_away_and_comes_back_when_it_is_seen_and_quiet() {
    let mut card = Clocked::desktop();
    assert_eq!(card.sees(4, None).0, None);
    assert_eq!(card.sees(1, reading(400, 0.0)).0, None);
    let (why, after) = card.sees(20, None);
    assert_eq!(why, Some(Taken::Unseen));
    assert!(after <= UNSEEN_FOR, "{after:?}");
    assert_eq!(card.sees(70, reading(400, 0.0)), (None, QUIET));
}

#[test]
fn a_card_that_could_not_be_opened_is_tried_again_when_others_have_been_quiet_for_another_while() {
    let mut card = Clocked::desktop();
    card.rule.stays_away(card.now);
    let (why, after) = card.sees(59, reading(400, 0.0));
    assert_eq!((why, after), (Some(Taken::NotOpened), Duration::ZERO));
    assert_eq!(card.sees(2, reading(400, 0.0)).0, None);
}

proptest! {
    /// Whatever others do: who is above a limit has the card at once, and who has it keeps it until a whole quiet time without anything near
    /// a limit has passed.
    #[test]
    fn a_card_is_given_at_once_and_taken_back_after_quiet_only(
        steps in prop::collection::vec((0_u64..1000, 0_u32..=100, 1_u64..90), 1..60)
    ) {
        let mut rule = CardRule::new(LIMITS, Instant::now(), 400 * MIB);
        let mut now = rule.seen;
        let (mut was_away, mut near_since) = (false, now);
        for (mib, percent, seconds) in steps {
            let busy = f64::from(percent) / 100.0;
            let is_above = mib > rule.baseline / MIB + 256 || busy > LIMITS.busy;
            let is_near = mib > rule.baseline / MIB + 192 || busy > LIMITS.busy * 0.75;
            let is_away = rule.look(now, reading(mib, busy)).is_some();
            if is_above {
                prop_assert!(is_away);
            } else if was_away && !is_away {
                prop_assert!(!is_near && now - near_since >= QUIET);
            } else if !was_away {
                prop_assert!(!is_away);
            }
            if is_near {
                near_since = now;
            }
            was_away = is_away;
            now += Duration::from_secs(seconds);
        }
    }
}
