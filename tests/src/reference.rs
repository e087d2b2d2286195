//! The weights of tiny models for the evaluator, and more of what transformers computed for them.

use std::path::Path;

use moec::emit::pack::{Rotation, Stored, float_rows, quantized_rows, rotations};
use moec::import::{self, Model};
use moec::plan::layout::{Format, Scales};
use moec_ir::graph::eval::{Numbers, WeightSource};
use moec_ir::graph::{Layout, Weight};
use safetensors::SafeTensors;

/// Opens a model.
///
/// # Panics
/// When it does not open.
pub fn open(directory: &Path) -> Model {
    import::open(directory).unwrap_or_else(|e| panic!("{}: {e}", directory.display()))
}

/// Inner results of transformers for `full_ids` of [`Golden`](crate::Golden).
#[derive(Debug)]
pub struct GoldenStates {
    /// The hidden states after the final norm, `[T, hidden]`.
    pub hidden: Vec<f32>,
    /// For each layer the weights of the chosen experts of each token, `[T, k]`.
    pub expert_weights: Vec<Vec<f32>>,
}

impl GoldenStates {
    /// Reads `golden.safetensors` of a model.
    ///
    /// # Panics
    /// When it is not there or not as expected.
    pub fn read(model: &Path) -> GoldenStates {
        let bytes = std::fs::read(model.join("golden.safetensors")).expect("golden values beside the model");
        let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
        let all = |prefix: &str| -> Vec<Vec<f32>> {
            (0..).map_while(|i| file.tensor(&format!("{prefix}.{i}")).ok()).map(|tensor| f32s(tensor.data())).collect()
        };
        // Of those before the last layer's there may be none.
        let last = (0..=128).rev().find_map(|i| file.tensor(&format!("hidden_states.{i}")).ok());
        let hidden = f32s(last.expect("hidden states").data());
        GoldenStates { hidden, expert_weights: all("routing_weights") }
    }
}

fn f32s(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
}

/// The weights of a model as the payload has them, for the evaluator.
#[derive(Debug)]
pub struct ModelWeights<'a> {
    model: &'a Model,
    rotations: Vec<Rotation>,
}

impl<'a> ModelWeights<'a> {
    /// Of this model.
    pub fn new(model: &'a Model) -> ModelWeights<'a> {
        let config = &model.config;
        ModelWeights { model, rotations: rotations(&config.rope, config.head_dim, config.context) }
    }
}

impl WeightSource for ModelWeights<'_> {
    fn numbers(&self, weight: &Weight, layout: Layout, heads: Option<usize>) -> Result<Numbers, String> {
        let format = Format::of(layout).ok_or("the layout is not resolved")?;
        let (mut floats, mut codes, mut scales, mut offsets) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for expert in 0..weight.experts() {
            let stored = Stored {
                tensor: &weight.name,
                expert: (weight.shape.len() == 3).then_some(expert),
                rows: 0..weight.rows(),
                columns: weight.columns(),
            };
            if layout.is_quantized() {
                let matrix = quantized_rows(&self.model.tensors, &stored, heads, format).map_err(|e| e.to_string())?;
                let bf16 = format.scales() == Some(Scales::Bf16);
                assert!(!bf16 || matrix.scales.iter().all(|scale| scale.to_bits() & 0xffff == 0), "scales are bf16");
                codes.extend(matrix.codes);
                scales.extend(matrix.scales);
                offsets.extend(matrix.offsets);
            } else {
                floats.extend(float_rows(&self.model.tensors, &stored, format).map_err(|e| e.to_string())?);
            }
        }
        Ok(if layout.is_quantized() { Numbers::Codes { codes, scales, offsets } } else { Numbers::Float(floats) })
    }

    fn rotation(&self, position: usize, cos: &mut [f32], sin: &mut [f32]) {
        for ((cos, sin), rotation) in cos.iter_mut().zip(sin).zip(&self.rotations) {
            (*cos, *sin) = rotation.at(position);
        }
    }
}
