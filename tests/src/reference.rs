//! Reference models: tiny random models with what transformers computed for them in f32, and their weights for the evaluator.
//!
//! They lie in `tests/data/models`. `golden.safetensors` beside each model has the prompt (`input_ids`), its greedy continuation, and for both
//! together logits, hidden states and, of Mixtral models, the chosen experts. `MOEC_MODELS` names another directory of such models.

use std::path::{Path, PathBuf};

use half::bf16;
use moec::emit::pack::{Stored, float_rows, frequencies, quantized_rows};
use moec::import::{self, Model};
use moec::plan::layout::Format;
use moec_ir::graph::eval::{Numbers, WeightSource};
use moec_ir::graph::{Layout, Weight};
use safetensors::{Dtype, SafeTensors};

/// The directories of all reference models, sorted.
///
/// # Panics
/// When there are none.
pub fn models() -> Vec<PathBuf> {
    let directory = match std::env::var_os("MOEC_MODELS") {
        Some(directory) => PathBuf::from(directory),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("data/models"),
    };
    let entries = std::fs::read_dir(&directory).unwrap_or_else(|e| panic!("{}: {e}", directory.display()));
    let mut models: Vec<PathBuf> = entries
        .map(|entry| entry.unwrap_or_else(|e| panic!("{}: {e}", directory.display())).path())
        .filter(|path| path.join("golden.safetensors").exists())
        .collect();
    models.sort();
    assert!(!models.is_empty(), "no models in {}", directory.display());
    models
}

/// Opens a reference model.
///
/// # Panics
/// When it does not open.
pub fn open(directory: &Path) -> Model {
    import::open(directory).unwrap_or_else(|e| panic!("{}: {e}", directory.display()))
}

/// What transformers computed.
#[derive(Clone, Debug)]
pub struct Golden {
    /// The prompt.
    pub input_ids: Vec<u32>,
    /// Its greedy continuation.
    pub greedy_ids: Vec<u32>,
    /// Both.
    pub full_ids: Vec<u32>,
    /// For each token of `full_ids` a row of logits, one after another.
    pub full_logits: Vec<f32>,
    /// For each token of `full_ids` the final hidden state after the norm, one after another.
    pub hidden: Vec<f32>,
    /// By layer and token of `full_ids` the experts, falling by weight. No layers for dense models.
    pub experts: Vec<Vec<Vec<usize>>>,
    /// The weights of these experts.
    pub expert_weights: Vec<Vec<Vec<f32>>>,
}

impl Golden {
    /// Reads `golden.safetensors` of a model directory.
    ///
    /// # Panics
    /// When it is not there or not as expected.
    pub fn read(model: &Path) -> Golden {
        let path = model.join("golden.safetensors");
        let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let tensors = SafeTensors::deserialize(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let ids = |name: &str| integers(&tensors, name).into_iter().map(|id| id as u32).collect::<Vec<u32>>();
        let layers = (0..).take_while(|layer| tensors.tensor(&format!("hidden_states.{}", layer + 1)).is_ok()).count();
        let (mut experts, mut expert_weights) = (Vec::new(), Vec::new());
        let routed = |layer: &usize| tensors.tensor(&format!("selected_experts.{layer}")).is_ok();
        for layer in (0..layers).take_while(routed) {
            let name = format!("selected_experts.{layer}");
            let k = tensors.tensor(&name).unwrap_or_else(|e| panic!("{name}: {e}")).shape()[1];
            let chosen: Vec<usize> = integers(&tensors, &name).into_iter().map(|e| e as usize).collect();
            experts.push(chosen.chunks(k).map(<[usize]>::to_vec).collect());
            let weights = floats(&tensors, &format!("routing_weights.{layer}"));
            expert_weights.push(weights.chunks(k).map(<[f32]>::to_vec).collect());
        }
        Golden {
            input_ids: ids("input_ids"),
            greedy_ids: ids("greedy_ids"),
            full_ids: ids("full_ids"),
            full_logits: floats(&tensors, "full_logits"),
            hidden: floats(&tensors, &format!("hidden_states.{layers}")),
            experts,
            expert_weights,
        }
    }

    /// Logits of one row.
    pub fn vocab(&self) -> usize {
        self.full_logits.len() / self.full_ids.len()
    }

    /// The largest magnitude of a logit.
    pub fn largest_logit(&self) -> f32 {
        self.full_logits.iter().fold(0.0, |max, x| x.abs().max(max))
    }
}

fn integers(tensors: &SafeTensors, name: &str) -> Vec<i64> {
    let tensor = tensors.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert_eq!(tensor.dtype(), Dtype::I64, "{name}");
    tensor.data().as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect()
}

fn floats(tensors: &SafeTensors, name: &str) -> Vec<f32> {
    let tensor = tensors.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert_eq!(tensor.dtype(), Dtype::F32, "{name}");
    tensor.data().as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
}

/// The weights of a model as the payload has them, for the evaluator.
pub struct ModelWeights<'a> {
    model: &'a Model,
    frequencies: Vec<f64>,
}

impl<'a> ModelWeights<'a> {
    /// Of this model.
    pub fn new(model: &'a Model) -> ModelWeights<'a> {
        ModelWeights { model, frequencies: frequencies(&model.config.rope, model.config.head_dim) }
    }
}

impl WeightSource for ModelWeights<'_> {
    fn numbers(&self, weight: &Weight, layout: Layout, heads: Option<usize>) -> Result<Numbers, String> {
        let format = match layout {
            Layout::F32 => Format::F32,
            Layout::Bf16 => Format::Bf16,
            Layout::F16 => Format::F16,
            Layout::Q8 => Format::Q8,
            Layout::Q4 => Format::Q4,
            Layout::Stored => return Err("the layout is not resolved".into()),
        };
        let (mut floats, mut codes, mut scales) = (Vec::new(), Vec::new(), Vec::new());
        for expert in 0..weight.experts() {
            let stored = Stored {
                tensor: &weight.name,
                expert: (weight.shape.len() == 3).then_some(expert),
                rows: 0..weight.rows(),
                columns: weight.columns(),
            };
            if layout.is_quantized() {
                let matrix = quantized_rows(&self.model.tensors, &stored, heads, format).map_err(|e| e.to_string())?;
                debug_assert!(matrix.scales.iter().all(|&scale| bf16::from_f32(scale).to_f32() == scale));
                codes.extend(matrix.codes);
                scales.extend(matrix.scales);
            } else {
                floats.extend(float_rows(&self.model.tensors, &stored, format).map_err(|e| e.to_string())?);
            }
        }
        Ok(if layout.is_quantized() { Numbers::Codes { codes, scales } } else { Numbers::Float(floats) })
    }

    fn rotation(&self, position: usize, cos: &mut [f32], sin: &mut [f32]) {
        for ((cos, sin), frequency) in cos.iter_mut().zip(sin).zip(&self.frequencies) {
            let angle = position as f64 * frequency;
            *cos = angle.cos() as f32;
            *sin = angle.sin() as f32;
        }
    }
}
