//! A curve: what was measured at some places, over rounds, and what the law says there.

use hanse_router::stats::quantile_of;
use serde::Serialize;

use crate::output::say;

/// How an axis is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Scale {
    Linear,
    /// Powers of two.
    Log2,
    /// Powers of ten.
    Log10,
}

impl Scale {
    /// Where a value lies on the axis.
    pub(super) fn place(self, value: f64) -> f64 {
        match self {
            Self::Linear => value,
            Self::Log2 => value.log2(),
            Self::Log10 => value.log10(),
        }
    }

    /// The value at a place.
    pub(super) fn value(self, place: f64) -> f64 {
        match self {
            Self::Linear => place,
            Self::Log2 => place.exp2(),
            Self::Log10 => 10f64.powf(place),
        }
    }
}

#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Axis {
    /// With its unit.
    pub(super) label: &'static str,
    pub(super) scale: Scale,
}

impl Axis {
    pub(super) fn linear(label: &'static str) -> Self {
        Self { label, scale: Scale::Linear }
    }
}

/// Everything that is drawn into one picture.
#[derive(Debug, Serialize)]
pub(super) struct Curve {
    /// The picture's name, without `.svg`.
    pub(super) name: &'static str,
    pub(super) title: &'static str,
    pub(super) x: Axis,
    pub(super) y: Axis,
    pub(super) series: Vec<Series>,
}

#[derive(Debug, Serialize)]
pub(super) struct Series {
    pub(super) name: String,
    pub(super) points: Vec<Point>,
}

/// What was measured at one place and what the law says, with the rounds' least and most.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Point {
    pub(super) x: f64,
    pub(super) least: f64,
    pub(super) median: f64,
    pub(super) most: f64,
    /// Median of the rounds' predictions.
    pub(super) law: f64,
    /// Median of the rounds' differences: measured over predicted, less one, as a share.
    pub(super) difference: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) parts: Option<Parts>,
}

/// Where the time of a step goes, in milliseconds: measured and by the law. Medians over the rounds, of one pass each.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Parts {
    /// In the calls of all layers, as the trace of a pass tells.
    pub(super) calls: f64,
    pub(super) calls_law: f64,
    /// The rest of the step: the trunk.
    pub(super) rest: f64,
    pub(super) rest_law: f64,
}

impl Point {
    /// Of what was `(measured, predicted)` in each round.
    pub(super) fn of(x: f64, rounds: &[(f64, f64)]) -> Self {
        let quantile = |of: fn(&(f64, f64)) -> f64, quantile| quantile_of(rounds.iter().map(of).collect(), quantile);
        Self {
            x,
            least: quantile(|(measured, _)| *measured, 0.0),
            median: quantile(|(measured, _)| *measured, 0.5),
            most: quantile(|(measured, _)| *measured, 1.0),
            law: quantile(|(_, law)| *law, 0.5),
            difference: quantile(|(measured, law)| measured / law - 1.0, 0.5),
            parts: None,
        }
    }
}

impl Parts {
    fn of(rounds: &[Self]) -> Option<Self> {
        let median = |part: fn(&Self) -> f64| quantile_of(rounds.iter().map(part).collect(), 0.5);
        (!rounds.is_empty()).then(|| Self {
            calls: median(|parts| parts.calls),
            calls_law: median(|parts| parts.calls_law),
            rest: median(|parts| parts.rest),
            rest_law: median(|parts| parts.rest_law),
        })
    }
}

/// Rounds of one series, place by place.
#[derive(Debug, Default)]
pub(super) struct Rounds(Vec<Place>);

#[derive(Debug)]
struct Place {
    x: f64,
    /// Measured and predicted.
    rounds: Vec<(f64, f64)>,
    parts: Vec<Parts>,
}

impl Rounds {
    fn at(&mut self, x: f64) -> &mut Place {
        let index = self.0.iter().position(|place| place.x == x).unwrap_or(self.0.len());
        if index == self.0.len() {
            self.0.push(Place { x, rounds: Vec::new(), parts: Vec::new() });
        }
        &mut self.0[index]
    }

    /// Notes what a round measured at `x` and what the law says of that round.
    pub(super) fn add(&mut self, x: f64, measured: f64, law: f64) {
        self.at(x).rounds.push((measured, law));
    }

    /// Notes where the time of a pass at `x` went, if one was written down.
    pub(super) fn explain(&mut self, x: f64, parts: Option<Parts>) {
        self.at(x).parts.extend(parts);
    }

    pub(super) fn series(&self, name: impl Into<String>) -> Series {
        let point = |place: &Place| Point { parts: Parts::of(&place.parts), ..Point::of(place.x, &place.rounds) };
        Series { name: name.into(), points: self.0.iter().map(point).collect() }
    }
}

/// What a curve is meant to reach.
#[derive(Debug, Serialize)]
pub(super) struct Goal {
    pub(super) what: String,
    pub(super) measured: f64,
    pub(super) wanted: f64,
    /// Whether less is better.
    pub(super) at_most: bool,
}

impl Curve {
    /// A Markdown table.
    pub(super) fn print(&self) -> anyhow::Result<()> {
        say!("\n### {}\n\n![{}]({}.svg)\n", self.title, self.title, self.name);
        let explained = self.series.iter().flat_map(|series| &series.points).any(|point| point.parts.is_some());
        let (more, line) = match explained {
            true => (" calls, ms: one pass (the law) | the rest of the step, ms (the law) |", "---|---|"),
            false => ("", ""),
        };
        say!("| {} | {}: median (least to most) | the law | difference |{more}", self.x.label, self.y.label);
        say!("|---|---|---|---|{line}");
        let several = self.series.len() > 1;
        for series in &self.series {
            for point in &series.points {
                let of = if several { format!(", {}", series.name) } else { String::new() };
                let [median, least, most, law] = [point.median, point.least, point.most, point.law].map(digits);
                let difference = point.difference * 100.0;
                let parts = point.parts.map_or_else(String::new, |parts| {
                    let [calls, calls_law] = [parts.calls, parts.calls_law].map(digits);
                    let [rest, rest_law] = [parts.rest, parts.rest_law].map(digits);
                    format!(" {calls} ({calls_law}) | {rest} ({rest_law}) |")
                });
                say!("| {}{of} | {median} ({least} to {most}) | {law} | {difference:+.1} % |{parts}", digits(point.x));
            }
        }
        Ok(())
    }
}

impl Goal {
    pub(super) fn print(&self) -> anyhow::Result<()> {
        let Self { what, measured, wanted, at_most } = self;
        let (rule, reached) = if *at_most { ("at most", measured <= wanted) } else { ("at least", measured >= wanted) };
        say!("{what}: {measured:.2}, {rule} {wanted:.2} wanted: {}", if reached { "reached" } else { "missed" });
        Ok(())
    }
}

/// Three digits that say something.
pub(super) fn digits(value: f64) -> String {
    let whole = value.abs();
    // What was computed with logarithms is not quite whole.
    let is_whole = (value - value.round()).abs() <= 1e-9 * whole.max(1.0);
    let places = if is_whole || whole >= 100.0 { 0 } else { 2 - whole.max(1.0).log10() as usize };
    format!("{value:.places$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_has_the_spread_of_its_rounds_and_the_median_of_their_differences() {
        let mut rounds = Rounds::default();
        for (measured, law) in [(10.0, 10.0), (30.0, 20.0), (22.0, 20.0)] {
            rounds.add(4.0, measured, law);
        }
        rounds.add(8.0, 1.0, 1.0);
        rounds.explain(4.0, None);
        for calls in [3.0, 1.0, 2.0] {
            rounds.explain(4.0, Some(Parts { calls, calls_law: 2.0, rest: 1.0, rest_law: 1.0 }));
        }
        let series = rounds.series("f32");
        let [first, second] = series.points.as_slice() else { panic!("{series:?}") };
        assert_eq!((first.x, first.least, first.median, first.most, first.law), (4.0, 10.0, 22.0, 30.0, 20.0));
        assert!((first.difference - 0.1).abs() < 1e-9, "of 0 %, 50 % and 10 %");
        assert_eq!(first.parts.map(|parts| parts.calls), Some(2.0));
        assert_eq!((second.x, second.difference, second.parts), (8.0, 0.0, None));
    }

    #[test]
    fn values_have_three_digits() {
        assert_eq!(digits(10f64.powf(20f64.log10())), "20");
        assert_eq!([1234.5, 56.78, 7.891, 0.1234, 16.0].map(digits), ["1234", "56.8", "7.89", "0.12", "16"]);
    }

    #[test]
    fn scales_go_there_and_back() {
        for scale in [Scale::Linear, Scale::Log2, Scale::Log10] {
            assert!((scale.value(scale.place(48.0)) - 48.0).abs() < 1e-9);
        }
    }
}
