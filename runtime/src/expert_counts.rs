//! How often each expert is chosen: what a build lays the experts out by.
//!
//! A step leaves the experts that its tokens chose in scratch memory whether anybody reads them or not, so nothing is slower while nobody counts. Deliberately
//! absent: files, and which text it was.

use crate::error::{Error, Result};
use crate::model::Model;
use moec_abi::metadata::ExpertStats;

/// Counts of one model's steps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExpertCounts {
    /// Tokens that chose.
    pub tokens: u64,
    /// For each layer how often each expert was chosen.
    pub layers: Vec<Vec<u64>>,
}

impl ExpertCounts {
    /// None yet.
    pub fn new(layers: usize, experts: usize) -> ExpertCounts {
        ExpertCounts { tokens: 0, layers: vec![vec![0; experts]; layers] }
    }

    /// Adds what tokens chose in `layer`.
    pub(crate) fn add(&mut self, layer: usize, chosen: impl Iterator<Item = u32>) {
        let counts = &mut self.layers[layer];
        for expert in chosen {
            // A program that changes scratch memory under us must not bring us down.
            if let Some(count) = counts.get_mut(expert as usize) {
                *count += 1;
            }
        }
    }
}

impl Model {
    /// Counts the experts that the tokens of all steps choose, from now on.
    ///
    /// # Errors
    /// When the model has no experts.
    pub fn start_expert_counts(&self) -> Result<()> {
        let d = self.descriptor();
        if d.experts == 0 {
            return Err(Error::NoRoutes);
        }
        self.set_expert_counts(ExpertCounts::new(d.layers as usize, d.experts as usize));
        Ok(())
    }

    /// The counts so far, with the model that they are of; `None` when they were not started.
    pub fn expert_stats(&self) -> Option<ExpertStats> {
        let ExpertCounts { tokens, layers } = self.expert_counts()?;
        let (d, metadata) = (self.descriptor(), self.metadata());
        Some(ExpertStats {
            version: ExpertStats::VERSION,
            moec: env!("CARGO_PKG_VERSION").to_string(),
            model: metadata.name.clone(),
            architecture: metadata.architecture.clone(),
            parameters: metadata.parameters,
            experts: d.experts,
            experts_per_token: d.experts_per_token,
            tokens,
            counts: layers,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_that_there_are_not_are_not_counted() {
        let mut counts = ExpertCounts::new(2, 3);
        counts.add(1, [2, 0, 2, 3, u32::MAX].into_iter());
        assert_eq!(counts.layers, [[0, 0, 0], [1, 0, 2]]);
    }
}
