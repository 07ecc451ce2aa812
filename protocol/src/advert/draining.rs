//! Why a member takes no calls.

use std::fmt;

/// Why a member takes no calls at present.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Draining {
    /// It is leaving.
    Leaving,
    /// Its owner said so.
    Asked,
    /// Its owner named hours for that.
    QuietHours,
    /// Other programs want the machine.
    Load,
    /// Other programs have its cards.
    Cards,
}

impl Draining {
    /// All reasons, in the order of their codes.
    pub const ALL: [Self; 5] = [Self::Leaving, Self::Asked, Self::QuietHours, Self::Load, Self::Cards];

    /// As an advert has it; 0 stands for a member that takes calls.
    #[must_use]
    pub fn code(self) -> u8 {
        self as u8 + 1
    }

    /// The reason with this code.
    #[must_use]
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.code() == code)
    }

    /// In a word or two, for tables.
    #[must_use]
    pub fn short(self) -> &'static str {
        match self {
            Self::Leaving => "leaving",
            Self::Asked => "paused",
            Self::QuietHours => "quiet hours",
            Self::Load => "gives way",
            Self::Cards => "card in use",
        }
    }
}

impl fmt::Display for Draining {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Leaving => "it is leaving",
            Self::Asked => "its owner paused it",
            Self::QuietHours => "its owner's quiet hours",
            Self::Load => "other programs want the machine",
            Self::Cards => "other programs use its cards",
        })
    }
}
