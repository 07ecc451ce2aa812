//! How much of the machine other programs want.

use std::time::{Duration, Instant};

/// Linux averages its load over this time, exponentially; this process's own share is averaged the same way.
const AVERAGED_OVER: Duration = Duration::from_secs(60);

/// Cores kept busy by others: the system's load average less what this process adds to it.
#[derive(Debug, Clone)]
pub struct OthersLoad {
    at: Instant,
    cpu: Duration,
    own: f64,
}

impl OthersLoad {
    /// Begins at `now`, when this process has used `cpu` of processor time.
    #[must_use]
    pub fn new(now: Instant, cpu: Duration) -> Self {
        Self { at: now, cpu, own: 0.0 }
    }

    /// The load of others, given the system's load average and this process's processor time so far.
    pub fn update(&mut self, now: Instant, cpu: Duration, load_average: f64) -> f64 {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        if passed > 0.0 {
            let busy = cpu.saturating_sub(self.cpu).as_secs_f64() / passed;
            let kept = (-passed / AVERAGED_OVER.as_secs_f64()).exp();
            self.own = self.own * kept + busy * (1.0 - kept);
            (self.at, self.cpu) = (now, cpu);
        }
        (load_average - self.own).max(0.0)
    }
}

/// The system's load average over one minute; `None` where there is no `/proc`.
#[must_use]
pub fn load_average() -> Option<f64> {
    std::fs::read_to_string("/proc/loadavg").ok()?.split_whitespace().next()?.parse().ok()
}

/// Processor time of this process; `None` where there is no `/proc`.
#[must_use]
pub fn cpu_time() -> Option<Duration> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    parse_cpu_time(&stat)
}

fn parse_cpu_time(stat: &str) -> Option<Duration> {
    // The second field is the program's name in parentheses and may hold anything; the 14th and 15th are times in ticks, which
    // programs see as hundredths of a second on every architecture that this is built for.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some(Duration::from_millis(user.checked_add(system)?.checked_mul(10)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_work_is_not_counted_as_others() {
        let start = Instant::now();
        let mut load = OthersLoad::new(start, Duration::ZERO);
        // Four own threads compute for ten minutes: the load average is 4, of others there is nothing.
        let mut others = 4.0;
        for second in 1..=600 {
            others = load.update(start + Duration::from_secs(second), Duration::from_secs(4 * second), 4.0);
        }
        assert!(others < 0.01, "{others}");
        let others = load.update(start + Duration::from_secs(601), Duration::from_secs(2404), 6.5);
        assert!((2.4..2.6).contains(&others), "{others}");
    }

    #[test]
    fn processor_time_is_read_past_any_name() {
        let stat = "7 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 150 50 0 0";
        assert_eq!(parse_cpu_time(stat), Some(Duration::from_secs(2)));
        assert_eq!(parse_cpu_time("7 (a"), None);
    }
}
