//! The bookkeeping under [`super::stages`]: stages, barriers by dependence, places of values, shares of work.
//!
//! A planner appends actions to the current stage. Before it does, it is told which shared buffers they read and write and how the work
//! is divided; when that meets what other workers do in the same stage, the stage is closed with a barrier. The rule is one: two accesses to a shared buffer,
//! one of them a write, may be in one stage only when both divide the work by token, since then each worker meets only its own rows.
//!
//! Deliberately absent: what an operation of the graph means.

use super::buffers::{BufferId, Buffers, Scope};
use super::program::{Action, Expr, Field, PlacedWeight, Program, Stage, StageExperts, StageProduct, Var};
use crate::kernels::Kernel;
use std::collections::HashMap;

/// How the work of some actions is divided among the workers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Split {
    /// Every worker does all of it, into its own memory.
    Everyone,
    /// By token: a worker touches only the rows of its own tokens.
    Tokens,
    /// In any other way.
    Other,
}

/// Where the rows of a value lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// The buffer.
    pub buffer: BufferId,
    /// Bytes from its start to row 0.
    pub offset: usize,
    /// Bytes from one row to the next.
    pub stride: usize,
}

impl Place {
    /// The address of a row.
    pub fn row(self, row: impl Into<Expr>) -> Expr {
        Expr::from(self.buffer) + self.offset + row.into() * self.stride
    }
}

/// A share `from .. to` of something counted.
#[derive(Clone, Debug)]
pub struct Share {
    /// The first.
    pub from: Expr,
    /// One past the last.
    pub to: Expr,
}

#[derive(Debug, Default)]
struct Accesses {
    read: HashMap<BufferId, Split>,
    written: HashMap<BufferId, Split>,
}

/// A program under construction.
#[derive(Debug)]
pub struct Planner {
    program: Program,
    stage: Stage,
    accesses: Accesses,
}

impl Planner {
    /// A planner for a program that reads `weights`.
    pub fn new(weights: Vec<PlacedWeight>) -> Planner {
        let program = Program { weights, ..Program::default() };
        Planner { program, stage: Stage::default(), accesses: Accesses::default() }
    }

    /// The finished program, and the bytes of shared and of each worker's scratch.
    pub fn finish(mut self) -> (Program, usize, usize) {
        self.close(false);
        let (shared, worker) = self.program.buffers.allocate();
        (self.program, shared, worker)
    }

    fn close(&mut self, barrier: bool) {
        if !self.stage.actions.is_empty() {
            self.stage.barrier = barrier;
            self.program.stages.push(std::mem::take(&mut self.stage));
        }
        self.accesses = Accesses::default();
    }

    /// The program's buffers.
    pub fn buffers(&mut self) -> &mut Buffers {
        &mut self.program.buffers
    }

    /// Starts an operation named `title` that reads and writes the given buffers, work divided by `split`; closes the stage when it must.
    pub fn begin(&mut self, title: &str, split: Split, reads: &[BufferId], writes: &[BufferId]) {
        let shared = |b: &BufferId| self.program.buffers.all[b.0].scope == Scope::Shared;
        let clash = |before: &HashMap<BufferId, Split>, now: &[BufferId]| {
            now.iter().filter(|b| shared(b)).any(|b| match before.get(b) {
                None => false,
                Some(other) => !(*other == Split::Tokens && split == Split::Tokens),
            })
        };
        if clash(&self.accesses.written, reads)
            || clash(&self.accesses.written, writes)
            || clash(&self.accesses.read, writes)
        {
            self.close(true);
        }
        let index = self.program.stages.len();
        for (map, buffers) in [(&mut self.accesses.read, reads), (&mut self.accesses.written, writes)] {
            for &buffer in buffers {
                let entry = map.entry(buffer).or_insert(split);
                if *entry != split {
                    *entry = Split::Other;
                }
                self.program.buffers.touch(buffer, index);
            }
        }
        if !self.stage.title.is_empty() {
            self.stage.title.push_str(", ");
        }
        self.stage.title.push_str(title);
    }

    /// Notes what a matrix of `bytes` bytes and `multiply_adds` multiply-adds costs the current stage for one token.
    pub fn cost(&mut self, bytes: usize, multiply_adds: usize) {
        self.stage.weight_bytes += bytes;
        self.stage.common_bytes += bytes;
        self.stage.multiply_adds += multiply_adds;
    }

    /// Notes what the matrices of `experts`, of which a token meets those that it chooses, cost the current stage for one token, with
    /// `multiply_adds` multiply-adds altogether.
    pub fn cost_of_experts(&mut self, experts: StageExperts, multiply_adds: usize) {
        let each = experts.bytes.iter().zip(&experts.chances);
        self.stage.weight_bytes += each.map(|(&bytes, chance)| bytes as f64 * chance).sum::<f64>().round() as usize;
        self.stage.multiply_adds += multiply_adds;
        match &mut self.stage.experts {
            None => self.stage.experts = Some(experts),
            Some(before) => {
                assert_eq!(before.layer, experts.layer, "a stage has experts of one choice");
                before.bytes.iter_mut().zip(experts.bytes).for_each(|(sum, bytes)| *sum += bytes);
            }
        }
    }

    /// Notes that the current stage has a product.
    pub fn product(&mut self, product: StageProduct) {
        self.stage.products.push(product);
    }

    /// Notes that the current stage writes buffers of which one worker alone writes each part, and that nothing else reads in this step.
    pub fn touch_kept(&mut self, buffers: &[BufferId]) {
        let index = self.program.stages.len();
        for &buffer in buffers {
            self.program.buffers.touch(buffer, index);
        }
    }

    /// Memory for the current stage: the worker's own, or shared by all, each of which must keep to its own part of it.
    pub fn scratch(&mut self, name: &str, scope: Scope, bytes: usize) -> BufferId {
        let stage = self.program.stages.len();
        let buffer = self.program.buffers.add(format!("s{stage}.{name}"), scope, bytes);
        self.program.buffers.touch(buffer, stage);
        buffer
    }

    /// Appends actions to the current stage.
    pub fn push(&mut self, actions: impl IntoIterator<Item = Action>) {
        self.stage.actions.extend(actions);
    }

    /// A new variable.
    pub fn var(&mut self) -> Var {
        self.program.vars += 1;
        Var(self.program.vars - 1)
    }

    /// Names an expression, so that it is computed once.
    pub fn bind(&mut self, actions: &mut Vec<Action>, expr: Expr) -> Expr {
        match expr {
            Expr::Int(_) | Expr::Var(_) | Expr::Field(_) | Expr::Buffer(_) | Expr::Weight(_) => expr,
            Expr::Arith(..) | Expr::LoadU32(_) | Expr::LoadAddress(_) => {
                let var = self.var();
                actions.push(Action::Let(var, expr));
                var.into()
            }
        }
    }

    /// This worker's share of `count` things, in equal parts.
    pub fn share(&mut self, actions: &mut Vec<Action>, count: impl Into<Expr>) -> Share {
        let count = self.bind(actions, count.into());
        let (worker, workers) = (Expr::from(Field::Worker), Expr::from(Field::Workers));
        let from = self.bind(actions, count.clone() * worker.clone() / workers.clone());
        let to = self.bind(actions, count * (worker + 1i64) / workers);
        Share { from, to }
    }

    /// `for i in from .. to { body(i) }`.
    pub fn each(
        &mut self,
        actions: &mut Vec<Action>,
        share: Share,
        step: i64,
        body: impl FnOnce(&mut Planner, &mut Vec<Action>, Expr),
    ) {
        if let (&Expr::Int(from), &Expr::Int(to)) = (&share.from, &share.to)
            && to - from <= step
        {
            if to > from {
                body(self, actions, share.from);
            }
            return;
        }
        let var = self.var();
        let mut inner = Vec::new();
        body(self, &mut inner, var.into());
        actions.push(Action::Loop { var, from: share.from, to: share.to, step, body: inner });
    }
}

/// A kernel call.
pub fn call(kernel: impl Into<Kernel>, args: impl IntoIterator<Item = Expr>) -> Action {
    Action::Call(kernel.into(), args.into_iter().collect())
}
