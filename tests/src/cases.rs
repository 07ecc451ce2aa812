//! The reference cases in one form: the fixtures' and the bundled model's.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::reference::{Golden, dense, fixtures, json, tiny_moe};

/// A checkpoint with what another implementation computes for it.
#[derive(Debug)]
pub struct Case {
    /// The folder's name.
    pub name: String,
    /// A model folder.
    pub dir: PathBuf,
    /// Standard deviation of the reference's logits: the unit of differences.
    pub logit_std: f32,
    /// At least one.
    pub prompts: Vec<Prompt>,
}

/// What is known of one prompt of `T` tokens.
#[derive(Debug)]
pub struct Prompt {
    /// `[T]`
    pub input: Vec<u32>,
    /// `[T, vocab]`
    pub logits: Vec<f32>,
    /// What greedy decoding adds, whatever the end-of-sequence tokens.
    pub greedy: Vec<u32>,
    /// By MoE layer: the chosen experts, ascending, `[T, top_k]`.
    pub experts: BTreeMap<usize, Vec<u32>>,
    /// By MoE layer: their weights in the same order; absent for a case that does not state them.
    pub weights: BTreeMap<usize, Vec<f32>>,
}

/// Families with experts that have cases.
pub const MOE_FAMILIES: [&str; 17] = [
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "dots1",
    "ernie4_5_moe",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt_oss",
    "granitemoe",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "kimi_k2",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
];

/// Dense families that have cases.
pub const DENSE_FAMILIES: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];

/// All cases whose folder's name begins with `family` and no longer family's name.
#[must_use]
pub fn cases_of(family: &str) -> Vec<Case> {
    fixtures().iter().chain(&dense()).filter(|dir| family_of(dir) == family).map(|dir| fixture_case(dir)).collect()
}

/// The cases of dense families, which are of use on a network once they are carved.
#[must_use]
pub fn dense_cases() -> Vec<Case> {
    dense().iter().map(|dir| fixture_case(dir)).collect()
}

/// A fixture folder's name up to what tells its cases apart.
#[must_use]
pub fn family_of(dir: &Path) -> &'static str {
    let name = name_of(dir);
    let found = MOE_FAMILIES.into_iter().chain(DENSE_FAMILIES).filter(|family| name.starts_with(family));
    // Some begin like others.
    let found = found.max_by_key(|family| family.len());
    found.unwrap_or_else(|| panic!("{name} is of no family that is tested"))
}

fn name_of(dir: &Path) -> String {
    dir.file_name().unwrap().to_string_lossy().into_owned()
}

fn fixture_case(dir: &Path) -> Case {
    let golden = Golden::open(dir);
    let about = json(&dir.join("golden.json"));
    let moe_layers: Vec<usize> = numbers(&about["moe_layers"]).into_iter().map(|layer| layer as usize).collect();
    let prompt = |n: usize| {
        let input = golden.ids(&format!("p{n}.input_ids"))?;
        let experts = |&layer: &usize| (layer, golden.ids(&format!("p{n}.layer{layer}.topk_ids")).unwrap());
        let weights = |&layer: &usize| (layer, golden.f32(&format!("p{n}.layer{layer}.topk_weights")).unwrap());
        Some(Prompt {
            input,
            logits: golden.f32(&format!("p{n}.logits")).unwrap(),
            greedy: golden.ids(&format!("p{n}.greedy_ids")).unwrap(),
            experts: moe_layers.iter().map(experts).collect(),
            weights: moe_layers.iter().map(weights).collect(),
        })
    };
    let prompts: Vec<Prompt> = (0..).map_while(prompt).collect();
    assert!(!prompts.is_empty(), "{} has prompts", dir.display());
    let logit_std = about["logit_std"].as_f64().unwrap() as f32;
    Case { name: name_of(dir), dir: dir.to_owned(), logit_std, prompts }
}

/// The bundled model's case.
#[must_use]
pub fn tiny_moe_case() -> Case {
    let dir = tiny_moe();
    let golden = Golden::open(&dir);
    let about = json(&dir.join("golden.json"));
    let prompts = about["prompts"].as_array().unwrap();
    let prompts: Vec<Prompt> = prompts
        .iter()
        .enumerate()
        .map(|(n, prompt)| {
            let experts = |(layer, rows): (usize, &Value)| {
                let mut chosen = Vec::new();
                for row in rows.as_array().unwrap() {
                    // Best first in the file.
                    let mut row = numbers(row);
                    row.sort_unstable();
                    chosen.extend(row);
                }
                (layer, chosen)
            };
            Prompt {
                input: numbers(&prompt["input_ids"]),
                logits: golden.f32(&format!("{n}.logits")).unwrap(),
                greedy: numbers(&prompt["greedy_ids"]),
                experts: prompt["experts"].as_array().unwrap().iter().enumerate().map(experts).collect(),
                weights: BTreeMap::new(),
            }
        })
        .collect();
    let logits: Vec<f32> = prompts.iter().flat_map(|prompt| prompt.logits.iter().copied()).collect();
    Case { name: "tiny-moe".to_owned(), dir, logit_std: std_of(&logits), prompts }
}

/// Standard deviation.
#[must_use]
pub fn std_of(values: &[f32]) -> f32 {
    let mean = values.iter().sum::<f32>() / values.len() as f32;
    (values.iter().map(|v| (v - mean) * (v - mean)).sum::<f32>() / values.len() as f32).sqrt()
}

fn numbers(list: &Value) -> Vec<u32> {
    list.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}
