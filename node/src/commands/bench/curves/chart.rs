//! A curve as a picture: an SVG with text as text, on white, so that it can be read on pages of any colour.

use std::ops::Range;

use anyhow::anyhow;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};
use plotters::prelude::*;

use super::curve::{Curve, Scale, digits};

const SIZE: (u32, u32) = (860, 440);
/// The part of it to the left of the legend.
const CHART_WIDTH: u32 = 660;
/// Of the legend, in pixels.
const LINE_HEIGHT: i32 = 24;
/// Told apart by people who see few colours, and in print.
const COLOURS: [RGBColor; 5] =
    [RGBColor(0, 90, 181), RGBColor(204, 85, 0), RGBColor(0, 130, 90), RGBColor(150, 60, 150), RGBColor(90, 90, 90)];
const TEXT: (&str, i32) = ("sans-serif", 17);
/// The most marks of a linear axis.
const TICKS: f64 = 10.0;
/// Between two powers of ten.
const ROUND: [f64; 3] = [1.0, 2.0, 5.0];
/// Half the width of the ends of a measured spread, in pixels.
const CAP: i32 = 4;

/// The picture of `curve`.
pub(super) fn svg(curve: &Curve) -> anyhow::Result<String> {
    let mut text = String::new();
    draw(curve, SVGBackend::with_string(&mut text, SIZE)).map_err(|e| anyhow!("cannot draw {}: {e}", curve.name))?;
    Ok(text)
}

/// From the least to the most of `values`, with a little room; from zero where the scale has one.
fn range(scale: Scale, values: impl Iterator<Item = f64> + Clone) -> Range<f64> {
    let places = values.map(|value| scale.place(value)).filter(|place| place.is_finite());
    let most = places.clone().fold(f64::MIN, f64::max);
    let least = if scale == Scale::Linear { 0.0 } else { places.fold(f64::MAX, f64::min) };
    let room = ((most - least) * 0.06).max(0.05);
    let first = if scale == Scale::Linear { 0.0 } else { least - room };
    first..most + room
}

fn draw(curve: &Curve, backend: SVGBackend<'_>) -> Result<(), Box<dyn std::error::Error>> {
    let root = backend.into_drawing_area();
    root.fill(&WHITE)?;
    let points = || curve.series.iter().flat_map(|series| &series.points);
    let (x_scale, y_scale) = (curve.x.scale, curve.y.scale);
    let across = range(x_scale, points().map(|point| point.x));
    let up = range(y_scale, points().flat_map(|point| [point.least, point.most, point.law]));
    let (left, right) = root.split_horizontally(CHART_WIDTH);
    let mut chart = ChartBuilder::on(&left)
        .caption(curve.title, ("sans-serif", 21))
        .margin(12)
        .x_label_area_size(48)
        .y_label_area_size(70)
        .build_cartesian_2d(Places::new(x_scale, across), Places::new(y_scale, up))?;
    chart
        .configure_mesh()
        .x_desc(curve.x.label)
        .y_desc(curve.y.label)
        .x_label_formatter(&|place| digits(x_scale.value(*place)))
        .y_label_formatter(&|place| digits(y_scale.value(*place)))
        .max_light_lines(0)
        .axis_desc_style(TEXT)
        .label_style(("sans-serif", 15))
        .bold_line_style(RGBColor(225, 225, 225))
        .draw()?;
    for (series, colour) in curve.series.iter().zip(COLOURS.iter().cycle()) {
        let at = |x: f64, y: f64| (x_scale.place(x), y_scale.place(y));
        let law = series.points.iter().map(|point| at(point.x, point.law));
        chart.draw_series(LineSeries::new(law, colour.stroke_width(2)))?;
        let spread = series.points.iter().map(|point| {
            let place = |y| y_scale.place(y) - y_scale.place(point.median);
            // In the backend's pixels there is no place for values, so the spread is drawn in values and its ends in pixels.
            (at(point.x, point.median), place(point.least), place(point.most))
        });
        for ((x, y), down, up) in spread {
            chart.draw_series([PathElement::new([(x, y + down), (x, y + up)], colour.stroke_width(1))])?;
            let cap = |y| EmptyElement::at((x, y)) + PathElement::new([(-CAP, 0), (CAP, 0)], colour.stroke_width(1));
            chart.draw_series([cap(y + down), cap(y + up)])?;
        }
        let measured = series.points.iter().map(|point| Circle::new(at(point.x, point.median), 4, colour.filled()));
        chart.draw_series(measured)?;
    }
    legend(curve, &right)?;
    root.present()?;
    Ok(())
}

/// What the marks mean, and whose they are.
fn legend(
    curve: &Curve,
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
) -> Result<(), Box<dyn std::error::Error>> {
    let text = |line: i32, text: &str| Text::new(text.to_owned(), (34, line * LINE_HEIGHT + 44), ("sans-serif", 15));
    let place = |line: i32| line * LINE_HEIGHT + 50;
    let grey = RGBColor(90, 90, 90);
    area.draw(&PathElement::new([(4, place(0)), (26, place(0))], grey.stroke_width(2)))?;
    area.draw(&text(0, "the law"))?;
    area.draw(&Circle::new((15, place(1)), 4, grey.filled()))?;
    area.draw(&text(1, "measured"))?;
    let named = curve.series.iter().zip(COLOURS.iter().cycle()).filter(|(series, _)| !series.name.is_empty());
    for ((series, colour), line) in named.zip(3..) {
        area.draw(&Rectangle::new([(8, place(line) - 6), (22, place(line) + 6)], colour.filled()))?;
        area.draw(&text(line, &series.name))?;
    }
    Ok(())
}

/// An axis in places, with marks of our own.
struct Places {
    range: Range<f64>,
    marks: Vec<f64>,
}

impl Places {
    fn new(scale: Scale, range: Range<f64>) -> Self {
        Self { marks: ticks(scale, &range), range }
    }
}

impl Ranged for Places {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, place: &f64, (first, last): (i32, i32)) -> i32 {
        let part = (place - self.range.start) / (self.range.end - self.range.start);
        first + (part * f64::from(last - first)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.marks.clone()
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

/// Places of round values within `range`: steps of 1, 2 or 5 times a power of ten, powers of two, or 1, 2 and 5 times powers of ten.
fn ticks(scale: Scale, range: &Range<f64>) -> Vec<f64> {
    let powers = |most: i32| (-most..=most).flat_map(move |power| ROUND.map(|round| round * 10f64.powi(power)));
    let places: Vec<f64> = match scale {
        Scale::Linear => {
            let wide = range.end - range.start;
            let step = powers(12).find(|step| wide / step <= TICKS).unwrap_or(wide);
            (0..).map(|i| f64::from(i) * step).take_while(|place| *place <= range.end).collect()
        }
        Scale::Log2 => (-30..=30).map(f64::from).collect(),
        Scale::Log10 => powers(12).map(f64::log10).collect(),
    };
    places.into_iter().filter(|place| range.contains(place)).collect()
}

#[cfg(test)]
mod tests {
    use super::super::curve::{Axis, Rounds};
    use super::*;

    #[test]
    fn axes_have_round_values() {
        let values = |scale: Scale, range| -> Vec<String> {
            ticks(scale, &range).into_iter().map(|place| digits(scale.value(place))).collect()
        };
        assert_eq!(values(Scale::Linear, 0.0..106.0), ["0", "20", "40", "60", "80", "100"]);
        assert_eq!(values(Scale::Log2, -0.2..4.2), ["1", "2", "4", "8", "16"]);
        assert_eq!(values(Scale::Log10, 0.2..2.8), ["2", "5", "10", "20", "50", "100", "200", "500"]);
    }

    #[test]
    fn a_picture_has_its_text_as_text_and_a_mark_for_every_point() {
        let mut rounds = Rounds::default();
        for x in [1.0, 2.0, 16.0] {
            rounds.add(x, 100.0 / x, 90.0 / x);
            rounds.add(x, 110.0 / x, 90.0 / x);
        }
        for scale in [Scale::Linear, Scale::Log10] {
            let curve = Curve {
                name: "peers",
                title: "Tokens per second",
                x: Axis { label: "peers", scale: Scale::Log2 },
                y: Axis { label: "tokens/s", scale },
                series: vec![rounds.series("20 ms")],
            };
            let picture = svg(&curve).unwrap();
            for text in ["Tokens per second", "peers", "tokens/s", "the law", "measured", "20 ms", "16"] {
                assert!(picture.contains(&format!("\n{text}\n")), "{text} in {picture}");
            }
            assert!(picture.contains("<text"));
            assert_eq!(picture.matches("<circle").count(), 3 + 1, "and one in the legend");
            assert!(picture.contains("fill=\"#FFFFFF\""), "a background of its own");
        }
    }
}
