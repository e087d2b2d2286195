//! `moec build --report`: what was decided, in a page.
//!
//! Deliberately absent: the plan itself, line by line (`moec inspect --plan`).

use indicatif::HumanBytes;
use moec::emit::pack::PackReport;
use moec::plan::Plan;
use moec::plan::layout::Format;
use moec::target::CpuLevel;
use moec_abi::PAGE_TOKENS;
use moec_ir::graph::Role;
use std::fmt;

/// A finished build, to be told about.
pub struct Report<'a> {
    /// What was built.
    pub plan: &'a Plan,
    /// For which CPUs.
    pub levels: &'a [CpuLevel],
    /// What becomes of weights that are stored as codes, a line for each kind.
    pub repacked: &'a [String],
    /// What packing lost; `None` when the weights came from an earlier build.
    pub packed: Option<&'a PackReport>,
    /// Size of all that was written.
    pub bytes: u64,
}

/// The weights of one role and format.
struct Row {
    role: Option<Role>,
    format: Format,
    weights: usize,
    bytes: usize,
}

fn rows(plan: &Plan) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for item in &plan.payload.items {
        let (weights, bytes) = (item.experts * item.rows * item.columns, item.bytes());
        match rows.iter_mut().find(|row| (row.role, row.format) == (item.role, item.format)) {
            Some(row) => (row.weights, row.bytes) = (row.weights + weights, row.bytes + bytes),
            None => rows.push(Row { role: item.role, format: item.format, weights, bytes }),
        }
    }
    rows
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { plan, levels, repacked, packed, bytes } = self;
        for line in *repacked {
            writeln!(f, "{line}")?;
        }
        writeln!(f, "{:<10} {:<6} {:>15} {:>12} {:>6}  relative RMS error", "weights", "as", "number", "size", "bits")?;
        let packed = packed.map(PackReport::by_role);
        for row in rows(plan) {
            let name = row.role.map_or("tables", Role::name);
            let (size, bits) = (HumanBytes(row.bytes as u64).to_string(), 8.0 * row.bytes as f64 / row.weights as f64);
            let found = packed.iter().flatten().find(|sum| (sum.role, sum.format) == (row.role, row.format));
            let error = match found {
                None => "not known: packed by an earlier build".to_string(),
                Some(sum) if sum.error == 0.0 => "none".to_string(),
                Some(sum) => format!("{:.2} %", 100.0 * sum.relative_rms()),
            };
            writeln!(f, "{name:<10} {:<6} {:>15} {size:>12} {bits:>6.2}  {error}", row.format.name(), row.weights)?;
        }
        let costs = &plan.costs;
        let million = |n: usize| format!("{:.1} M", n as f64 / 1e6);
        writeln!(
            f,
            "a token    reads {} of weights; {} multiply-adds, and {} for its logits",
            HumanBytes(costs.decode_weight_bytes as u64),
            million(costs.multiply_adds_per_token),
            million(costs.multiply_adds_per_logit_row)
        )?;
        writeln!(
            f,
            "memory     {} shared and {} for each thread; {} of KV cache for {PAGE_TOKENS} tokens",
            HumanBytes(plan.scratch_bytes as u64),
            HumanBytes(plan.worker_scratch_bytes as u64),
            HumanBytes(plan.page_bytes() as u64)
        )?;
        for (level, programs) in levels.iter().zip(&plan.levels) {
            let told = [("one token", &programs.decode), ("many", &programs.batch)].map(|(what, program)| {
                let barriers = program.stages.iter().filter(|stage| stage.barrier).count();
                format!(
                    "{what} in {} stages, {barriers} barriers, {} kernels",
                    program.stages.len(),
                    program.kernels().len()
                )
            });
            writeln!(f, "code       {}: {}", level.name, told.join("; "))?;
        }
        write!(f, "written    {}", HumanBytes(*bytes))
    }
}
