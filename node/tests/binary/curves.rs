//! `hanse bench --curves`: that everything is measured, predicted and drawn; not how fast anything is.

use serde_json::Value;

use crate::{document, home, run, text};

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is not a number"))
}

#[test]
fn curves_are_measured_predicted_and_drawn() {
    let folder = home();
    let dir = folder.path().join("new").to_str().unwrap().to_owned();
    let args =
        ["bench", "--curves", &dir, "--curve", "context,prefill", "--rounds", "1", "--max-tokens", "4", "--json"];
    let document = document(args);
    let curves = document["curves"].as_array().unwrap();
    assert_eq!(curves.iter().map(|curve| &curve["name"]).collect::<Vec<_>>(), ["context", "prefill"]);
    for curve in curves {
        let series = curve["series"].as_array().unwrap();
        let points: Vec<&Value> = series.iter().flat_map(|series| series["points"].as_array().unwrap()).collect();
        assert_eq!(points.len(), 5, "{curve}");
        for point in &points {
            let [least, median, most] = ["least", "median", "most"].map(|name| number(&point[name]));
            assert!(0.0 < least && least <= median && median <= most, "{point}");
            let (law, difference) = (number(&point["law"]), number(&point["difference"]));
            assert!(law > 0.0 && (difference - (median / law - 1.0)).abs() < 1e-9, "{point}");
        }
        let picture = std::fs::read_to_string(format!("{dir}/{}.svg", curve["name"].as_str().unwrap())).unwrap();
        assert!(picture.starts_with("<svg") && picture.trim_end().ends_with("</svg>"), "{picture}");
        for label in [&curve["title"], &curve["x"]["label"], &curve["y"]["label"]] {
            assert!(picture.contains(label.as_str().unwrap()), "{label} in {picture}");
        }
        assert_eq!(picture.matches("<circle").count(), points.len() + 1, "one in the legend");
    }
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 2, "nothing else");
    // A pass over a prompt waits for a round trip of 20 ms in each of the six layers.
    let prompts = curves[1]["series"][0]["points"].as_array().unwrap();
    assert!(prompts.iter().all(|point| number(&point["least"]) >= 120.0), "{prompts:?}");
    assert_eq!(document["goals"].as_array().unwrap().len(), 2);
}

#[test]
fn curves_need_a_folder() {
    let output = run(["bench", "--curve", "context"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("--curves"), "{}", text(&output.stderr));
}
