//! `--quiet-hours 22:00-07:00`.

use std::str::FromStr;

/// Hours of the local day, perhaps over midnight. The first minute is in, the last is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuietHours {
    start: u32,
    end: u32,
}

/// Not `HH:MM-HH:MM` with two different times.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a span of the day such as 22:00-07:00")]
pub struct QuietHoursError(String);

impl QuietHours {
    /// Whether a minute of the day, counted from midnight, is in it.
    #[must_use]
    pub fn contains(&self, minute: u32) -> bool {
        if self.start < self.end {
            (self.start..self.end).contains(&minute)
        } else {
            minute >= self.start || minute < self.end
        }
    }
}

impl FromStr for QuietHours {
    type Err = QuietHoursError;

    fn from_str(text: &str) -> Result<Self, QuietHoursError> {
        let wrong = || QuietHoursError(text.to_owned());
        let minute = |text: &str| {
            let (hour, minute) = text.split_once(':')?;
            let number = |text: &str| text.parse().ok().filter(|_| text.len() == 2 && !text.starts_with('+'));
            let (hour, minute): (u32, u32) = (number(hour)?, number(minute)?);
            (hour < 24 && minute < 60).then_some(hour * 60 + minute)
        };
        let (start, end) = text.split_once('-').ok_or_else(wrong)?;
        let hours = Self { start: minute(start).ok_or_else(wrong)?, end: minute(end).ok_or_else(wrong)? };
        if hours.start == hours.end { Err(wrong()) } else { Ok(hours) }
    }
}

impl std::fmt::Display for QuietHours {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [start, end] = [self.start, self.end].map(|minute| (minute / 60, minute % 60));
        write!(f, "{:02}:{:02}-{:02}:{:02}", start.0, start.1, end.0, end.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hours_may_pass_midnight() {
        let night: QuietHours = "22:30-07:00".parse().unwrap();
        let day: QuietHours = "09:00-17:00".parse().unwrap();
        let at = |hour: u32, minute: u32| hour * 60 + minute;
        assert!(night.contains(at(22, 30)) && night.contains(0) && night.contains(at(6, 59)));
        assert!(!night.contains(at(7, 0)) && !night.contains(at(22, 29)));
        assert!(day.contains(at(9, 0)) && !day.contains(at(17, 0)) && !day.contains(0));
        assert_eq!(night.to_string(), "22:30-07:00");
    }

    #[test]
    fn what_is_not_a_span_of_the_day_is_refused() {
        for text in ["", "22:00", "22-07", "24:00-07:00", "22:60-07:00", "7:00-8:00", "08:00-08:00", "+2:00-07:00"] {
            assert!(text.parse::<QuietHours>().is_err(), "{text}");
        }
    }
}
