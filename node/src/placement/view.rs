//! What the adverts say together: replicas of every expert, and how wanted it is.

use std::sync::Arc;

use hanse_protocol::{Advert, HostedExperts, rows_per_minute};

use super::{ExpertTable, Move};

/// Rows a minute that are added to every expert's measured ones, so that a handful of calls is not taken for a trend.
const NOISE_ROWS: f64 = 8.0;
/// Demand is counted between a quarter of the average and four times it: no expert is ever given up for being unpopular, and
/// nobody can draw the whole network to one expert.
const DEMAND_RANGE: (f64, f64) = (0.25, 4.0);

/// The network's experts as one member sees them, its own included.
#[derive(Debug, Clone)]
pub struct View {
    table: Arc<ExpertTable>,
    /// Members that host an expert now.
    hosted: Vec<u32>,
    /// Members that are about to.
    coming: Vec<u32>,
    /// Rows a minute, over all members.
    rows: Vec<f64>,
    members: usize,
}

impl View {
    /// An empty network.
    #[must_use]
    pub fn new(table: Arc<ExpertTable>) -> Self {
        let len = table.len();
        Self { table, hosted: vec![0; len], coming: vec![0; len], rows: vec![0.0; len], members: 0 }
    }

    /// The members whose adverts count at `now_unix_ms`: not those that leave or pause, nor those whose time is over.
    #[must_use]
    pub fn of<'a>(table: Arc<ExpertTable>, adverts: impl IntoIterator<Item = &'a Advert>, now_unix_ms: u64) -> Self {
        let mut view = Self::new(table);
        for advert in adverts {
            if advert.draining.is_none() && advert.expires_unix_ms > now_unix_ms {
                view.add(&advert.hosted, &advert.popularity, &advert.loading);
            }
        }
        view
    }

    /// Adds a member; `popularity` is as in [`Advert::popularity`].
    pub fn add(&mut self, hosted: &HostedExperts, popularity: &[u8], loading: &HostedExperts) {
        self.members += 1;
        self.count(hosted, popularity, loading, 1);
    }

    /// Takes a member out that was added with the same arguments.
    pub fn remove(&mut self, hosted: &HostedExperts, popularity: &[u8], loading: &HostedExperts) {
        self.members = self.members.saturating_sub(1);
        self.count(hosted, popularity, loading, -1);
    }

    fn count(&mut self, hosted: &HostedExperts, popularity: &[u8], loading: &HostedExperts, by: i32) {
        let steps = popularity.iter().copied().chain(std::iter::repeat(0));
        for ((layer, expert), step) in hosted.iter().zip(steps) {
            if let Some(index) = self.table.index(layer, expert) {
                self.hosted[index] = self.hosted[index].saturating_add_signed(by);
                self.rows[index] = (self.rows[index] + f64::from(by) * rows_per_minute(step)).max(0.0);
            }
        }
        for (layer, expert) in loading.iter().filter(|(layer, expert)| !hosted.contains(*layer, *expert)) {
            if let Some(index) = self.table.index(layer, expert) {
                self.coming[index] = self.coming[index].saturating_add_signed(by);
            }
        }
    }

    /// The network after a move of a member that hosts what is marked in `mine`, which is changed alike.
    pub(super) fn exchange(&mut self, mine: &mut [bool], made: &Move) {
        for (pairs, hosts) in [(&made.take, true), (&made.give, false)] {
            for index in pairs.iter().filter_map(|(layer, expert)| self.table.index(*layer, *expert)) {
                self.hosted[index] = self.hosted[index].saturating_add_signed(if hosts { 1 } else { -1 });
                mine[index] = hosts;
            }
        }
    }

    /// The model's experts.
    #[must_use]
    pub fn table(&self) -> &Arc<ExpertTable> {
        &self.table
    }

    /// Members counted.
    #[must_use]
    pub fn members(&self) -> usize {
        self.members
    }

    /// Members that host the expert now.
    #[must_use]
    pub fn replicas(&self, layer: u32, expert: u32) -> u32 {
        self.table.index(layer, expert).map_or(0, |index| self.hosted[index])
    }

    /// Replicas of every expert, ascending by layer and number.
    #[must_use]
    pub fn all_replicas(&self) -> &[u32] {
        &self.hosted
    }

    pub(super) fn hosted(&self) -> &[u32] {
        &self.hosted
    }

    pub(super) fn coming(&self) -> &[u32] {
        &self.coming
    }

    /// Each expert's demand as a multiple of the average.
    pub(super) fn demand(&self) -> Vec<f64> {
        let mean = self.rows.iter().sum::<f64>() / self.rows.len().max(1) as f64 + NOISE_ROWS;
        let (least, most) = DEMAND_RANGE;
        self.rows.iter().map(|rows| ((rows + NOISE_ROWS) / mean).clamp(least, most)).collect()
    }
}
