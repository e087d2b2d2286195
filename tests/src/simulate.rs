//! A plan's programs on the tile IR's evaluator: a whole model without any machine code.
//!
//! One worker, whose barriers have nothing to wait for. Memory is the evaluator's, so every access of every kernel is checked against the
//! bounds of the payload, the scratch memory, the KV pages and the inputs.

use moec::emit::pack::Packing;
use moec::import::Model;
use moec::kernels::Kernel;
use moec::pipeline::Compiled;
use moec::plan::Plan;
use moec::plan::buffers::Scope;
use moec::plan::program::{Action, Arith, Expr, Field, Program};
use moec_abi::{LANES, PAGE_TOKENS, round_up};
use moec_ir::tile::Function;
use moec_ir::tile::eval::{Memory, run};
use std::collections::HashMap;
use std::io::Read;
use std::sync::atomic::AtomicBool;

/// A compiled model that is simulated.
pub struct Simulation<'a> {
    plan: &'a Plan,
    memory: Memory,
    kernels: HashMap<Kernel, Function>,
    payload: i64,
    scratch: i64,
    page_table: i64,
    position: usize,
}

/// What the expressions of one step see.
struct Step<'a> {
    program: &'a Program,
    vars: Vec<i64>,
    fields: HashMap<Field, i64>,
}

impl<'a> Simulation<'a> {
    /// Packs the weights; `tokens` is the longest sequence that will be run.
    pub fn new(model: &Model, compiled: &'a Compiled, tokens: usize) -> Simulation<'a> {
        let plan = &compiled.plan;
        let packing = Packing {
            items: &plan.payload.items,
            source: &model.tensors,
            rope: model.config.rope.clone(),
            head_dim: model.config.head_dim,
            threads: 1,
            progress: &|_, _| {},
            cancel: &AtomicBool::new(false),
        };
        let mut file = tempfile::tempfile().expect("a temporary file");
        packing.write(&file, 0).expect("the weights are packed");
        file.set_len(plan.payload.weights_end as u64).expect("writable");
        let mut payload = Vec::new();
        file.read_to_end(&mut payload).expect("readable");

        let mut memory = Memory::new();
        let payload = memory.add(payload);
        let scratch = memory.add(vec![0xa5; plan.scratch_bytes + plan.worker_scratch_bytes]);
        let pages: Vec<i64> =
            (0..tokens.div_ceil(PAGE_TOKENS)).map(|_| memory.add(vec![0; plan.page_bytes()])).collect();
        let page_table = memory.add(pages.iter().flat_map(|p| p.to_le_bytes()).collect::<Vec<u8>>());
        Simulation { plan, memory, kernels: HashMap::new(), payload, scratch, page_table, position: 0 }
    }

    /// Runs tokens (at most the plan's `max_tokens`) through the batch program, or one through the decode program; returns the bits
    /// of all their logits.
    pub fn step(&mut self, ids: &[u32], decode: bool) -> Vec<u32> {
        let plan = self.plan;
        let programs = &plan.levels[0];
        let program = if decode { &programs.decode } else { &programs.batch };
        let words = |words: Vec<u32>| words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
        let count = ids.len();
        assert!(count <= plan.model.max_tokens, "{count} tokens in a step");
        let first = self.position as u32;
        let stride = round_up(plan.model.vocab, LANES);
        let logits = self.memory.add(vec![0; 4 * stride * count]);
        let fields = HashMap::from([
            (Field::Worker, 0),
            (Field::Workers, 1),
            (Field::Tokens, count as i64),
            (Field::LogitCount, count as i64),
            (Field::Payload, self.payload),
            (Field::Scratch, self.scratch),
            (Field::WorkerScratch, self.scratch + plan.scratch_bytes as i64),
            (Field::TokenIds, self.memory.add(words(ids.to_vec()))),
            (Field::Positions, self.memory.add(words((first..first + count as u32).collect()))),
            (Field::PageTables, self.memory.add(self.page_table.to_le_bytes().repeat(count))),
            (Field::LogitRows, self.memory.add(words((0..count as u32).collect()))),
            (Field::Logits, logits),
        ]);
        let mut step = Step { program, vars: vec![0; program.vars as usize], fields };
        for stage in &program.stages {
            self.actions(&mut step, &stage.actions);
        }
        self.position += count;
        let bytes = self.memory.read(logits, 4 * stride * count).expect("the logits").to_vec();
        let rows = bytes.chunks(4 * stride).map(|row| &row[..4 * plan.model.vocab]);
        rows.flat_map(|row| row.chunks(4)).map(|b| u32::from_le_bytes(b.try_into().expect("4 bytes"))).collect()
    }

    fn actions(&mut self, step: &mut Step<'_>, actions: &[Action]) {
        for action in actions {
            match action {
                Action::Let(var, expr) => step.vars[var.0 as usize] = self.expr(step, expr),
                Action::Call(kernel, args) => {
                    let args: Vec<i64> = args.iter().map(|a| self.expr(step, a)).collect();
                    let function = self.kernels.entry(kernel.clone()).or_insert_with(|| kernel.generate());
                    if let Err(error) = run(function, &args, &mut self.memory) {
                        panic!("{}{args:?}: {error}", kernel.name());
                    }
                }
                Action::Loop { var, from, to, step: by, body } => {
                    let (mut at, to) = (self.expr(step, from), self.expr(step, to));
                    while at < to {
                        step.vars[var.0 as usize] = at;
                        self.actions(step, body);
                        at += by;
                    }
                }
                Action::Switch { on, cases } => {
                    let on = self.expr(step, on);
                    if let Some(case) = usize::try_from(on).ok().and_then(|on| cases.get(on)) {
                        self.actions(step, case);
                    }
                }
            }
        }
    }

    fn expr(&self, step: &Step<'_>, expr: &Expr) -> i64 {
        match expr {
            Expr::Int(n) => *n,
            Expr::Var(v) => step.vars[v.0 as usize],
            Expr::Field(field) => step.fields[field],
            Expr::Buffer(id) => {
                let buffer = &step.program.buffers.all[id.0];
                let base = match buffer.scope {
                    Scope::Shared => Field::Scratch,
                    Scope::Worker => Field::WorkerScratch,
                };
                step.fields[&base] + buffer.offset as i64
            }
            Expr::Weight(i) => self.payload + step.program.weights[*i].offset as i64,
            Expr::LoadU32(at) => {
                let bytes = self.memory.read(self.expr(step, at), 4).expect("within bounds");
                i64::from(u32::from_le_bytes(bytes.try_into().expect("4 bytes")))
            }
            Expr::LoadAddress(at) => {
                let bytes = self.memory.read(self.expr(step, at), 8).expect("within bounds");
                i64::from_le_bytes(bytes.try_into().expect("8 bytes"))
            }
            Expr::Arith(op, a, b) => {
                let (a, b) = (self.expr(step, a), self.expr(step, b));
                match op {
                    Arith::Add => a.wrapping_add(b),
                    Arith::Sub => a.wrapping_sub(b),
                    Arith::Mul => a.wrapping_mul(b),
                    Arith::Div => (a as u64 / b as u64) as i64,
                    Arith::Min => a.min(b),
                    Arith::Max => a.max(b),
                }
            }
        }
    }
}
