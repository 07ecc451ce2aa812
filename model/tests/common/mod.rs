//! Reading reference cases. The crate of tests across crates uses this file too.
#![allow(dead_code, missing_docs, missing_debug_implementations, unreachable_pub)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use hanse_model::{
    Checkpoint, Experts, ExpertsError, KvCache, LocalExperts, LogitsWanted, Routing, Segment, Trunk, compute_pool,
};
use safetensors::SafeTensors;
use serde_json::Value;

pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

pub fn fixture(name: &str) -> PathBuf {
    root().join("tests/fixtures").join(name)
}

pub fn tiny_moe() -> PathBuf {
    root().join("examples/models/tiny-moe")
}

/// The cases with what each expert gives, by name.
pub const WITH_EXPERTS: [&str; 9] =
    ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "granitemoe", "deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss"];

/// All reference cases: those with all goldens and the further ones in `extra`.
pub fn fixtures() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = WITH_EXPERTS.iter().map(|name| fixture(name)).collect();
    if let Ok(entries) = std::fs::read_dir(fixture("extra")) {
        let complete = |path: &PathBuf| path.join("golden.safetensors").exists() && path.join("golden.json").exists();
        let mut extra: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).filter(complete).collect();
        extra.sort();
        found.extend(extra);
    }
    found
}

/// Reference cases of dense families.
pub fn dense() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(fixture("dense")).unwrap();
    let mut found: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    found.sort();
    assert!(!found.is_empty(), "there are dense cases");
    found
}

pub fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

pub struct Golden {
    bytes: Vec<u8>,
}

impl Golden {
    pub fn open(dir: &Path) -> Self {
        Self::read(&dir.join("golden.safetensors"))
    }

    pub fn read(path: &Path) -> Self {
        Self { bytes: std::fs::read(path).unwrap() }
    }

    pub fn f32(&self, name: &str) -> Option<Vec<f32>> {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let tensor = tensors.tensor(name).ok()?;
        assert_eq!(tensor.dtype(), safetensors::Dtype::F32, "{name}");
        Some(tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect())
    }

    pub fn ids(&self, name: &str) -> Option<Vec<u32>> {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let tensor = tensors.tensor(name).ok()?;
        assert_eq!(tensor.dtype(), safetensors::Dtype::I64, "{name}");
        let values = tensor.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()));
        Some(values.map(|id| u32::try_from(id).unwrap()).collect())
    }
}

/// A model whose experts are anywhere.
pub struct Model<E> {
    pub checkpoint: Checkpoint,
    pub trunk: Trunk,
    pub experts: Recording<E>,
}

/// A model with all experts in this process.
pub type Local = Model<LocalExperts>;

/// Passes calls on and remembers what the gates chose.
pub struct Recording<E> {
    pub inner: E,
    pub routings: Vec<(usize, Routing)>,
}

impl<E: Experts> Experts for Recording<E> {
    fn forward(&mut self, layer: usize, hidden: &[f32], routing: &Routing) -> Result<Vec<f32>, ExpertsError> {
        self.routings.push((layer, routing.clone()));
        self.inner.forward(layer, hidden, routing)
    }
}

impl Local {
    pub fn open(dir: &Path) -> Self {
        Self::with_threads(dir, 2)
    }

    pub fn with_threads(dir: &Path, threads: usize) -> Self {
        Self::with_experts(dir, threads, |checkpoint, pool| LocalExperts::load(checkpoint, pool).unwrap())
    }
}

impl<E: Experts> Model<E> {
    /// The trunk in this process, and the experts that `experts` gives.
    pub fn with_experts(
        dir: &Path,
        threads: usize,
        experts: impl FnOnce(&Checkpoint, Arc<rayon::ThreadPool>) -> E,
    ) -> Self {
        let checkpoint = Checkpoint::open(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
        let pool = Arc::new(compute_pool(threads).unwrap());
        let trunk = Trunk::load(&checkpoint, pool.clone()).unwrap();
        let experts = Recording { inner: experts(&checkpoint, pool), routings: Vec::new() };
        Self { checkpoint, trunk, experts }
    }

    pub fn forward(&mut self, tokens: &[u32], cache: &mut KvCache, logits: LogitsWanted) -> Vec<f32> {
        let mut segments = [Segment { tokens, cache, logits }];
        self.trunk.forward(&mut segments, &mut self.experts).unwrap().remove(0)
    }

    /// Logits of every position, computed at once.
    pub fn prefill(&mut self, tokens: &[u32]) -> Vec<f32> {
        let mut cache = self.trunk.new_cache();
        self.forward(tokens, &mut cache, LogitsWanted::All)
    }

    pub fn greedy(&mut self, prompt: &[u32], count: usize) -> Vec<u32> {
        let mut cache = self.trunk.new_cache();
        let mut logits = self.forward(prompt, &mut cache, LogitsWanted::Last);
        let mut out = vec![argmax(&logits)];
        while out.len() < count {
            logits = self.forward(&out[out.len() - 1..], &mut cache, LogitsWanted::Last);
            out.push(argmax(&logits));
        }
        out
    }
}

pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = i;
        }
    }
    best as u32
}

pub fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| if a.is_finite() { (a - b).abs() } else { f32::INFINITY }).fold(0.0, f32::max)
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}
