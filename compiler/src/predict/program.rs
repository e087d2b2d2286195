//! What a worker does in each stage of a step, in slots: the program gone through without data.
//!
//! Loops, shares and counts are the program's own; positions, counts of tokens and workers are those of the step that is asked about. Experts that are
//! gone through in turn are taken to have equally many tokens; of those that lie in two formats, one that is not known is in either as often as a profile
//! of the model says. Loops that do the same each time are gone through once. Deliberately absent: what a kernel takes ([`super::kernel`]) and what is read from
//! memory ([`super`]).

use super::kernel::{Analyzed, Rates};
use crate::kernels::Kernel;
use crate::lower::backend::KernelBackend;
use crate::plan::EXPERT_PLACES;
use crate::plan::payload::{Arrangement, PayloadMap};
use crate::plan::program::{Action, Arith, Expr, Field, Program, Stage};
use crate::tune::cost::hot_loop;
use std::collections::HashMap;

/// Where the table of places of experts begins.
const PLACES: i64 = 1 << 58;
/// Where addresses of the step's arrays begin: apart from each other and from small numbers.
const POSITIONS: i64 = 1 << 60;
/// Where the addresses of page tables begin, and what they are.
const PAGE_TABLES: i64 = 1 << 61;
const PAGE_TABLE: i64 = 1 << 57;
/// Where the first buffer begins.
const BUFFERS: i64 = 1 << 59;
/// From one buffer to the next.
const BUFFER: i64 = 1 << 40;

/// The step that is asked about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Step {
    /// Tokens.
    pub tokens: usize,
    /// Tokens of the sequence before them.
    pub depth: usize,
    /// Rows of logits.
    pub logits: usize,
    /// Workers.
    pub workers: usize,
}

/// What a worker does in a stage.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Work {
    /// Slots that it computes.
    pub slots: f64,
    /// The first key that attention sees, and the one after the last.
    pub keys: (i64, i64),
}

/// Something depends on data, which nobody knows.
#[derive(Debug)]
struct Unknown;

/// Goes through programs; remembers what kernels take.
pub struct Walker {
    rates: Rates,
    backend: KernelBackend,
    kernels: HashMap<Kernel, usize>,
    analyzed: Vec<Analyzed>,
}

impl Walker {
    /// For a machine, with kernels by `backend`.
    pub fn new(rates: Rates, backend: KernelBackend) -> Walker {
        Walker { rates, backend, kernels: HashMap::new(), analyzed: Vec::new() }
    }

    /// Each stage of a program that reads weights of `payload` as it is for the worker that has most to do; `None` for a stage that depends on what is
    /// not known.
    pub fn stages(&mut self, payload: &PayloadMap, program: &Program, step: Step) -> Vec<Option<Work>> {
        // Shares are equal but for one; the first and the last worker have the least and the most of whatever is divided.
        let first = self.worker(payload, program, step, 0);
        if step.workers == 1 {
            return first;
        }
        let last = self.worker(payload, program, step, step.workers - 1);
        let more = |(a, b): (Option<Work>, Option<Work>)| {
            let (a, b) = (a?, b?);
            Some(Work { slots: a.slots.max(b.slots), keys: union(a.keys, b.keys) })
        };
        first.into_iter().zip(last).map(more).collect()
    }

    fn worker(&mut self, payload: &PayloadMap, program: &Program, step: Step, worker: usize) -> Vec<Option<Work>> {
        let mut walk = Walk {
            walker: self,
            step,
            worker,
            vars: vec![None; program.vars as usize],
            sorted: Vec::new(),
            sites: HashMap::new(),
            places: payload.find(EXPERT_PLACES).map(|index| (index, &payload.items[index].arrangement)),
            first_share: None,
            keys: (0, 0),
        };
        let stage = |stage: &Stage| {
            walk.keys = (0, 0);
            walk.first_share = stage.experts.as_ref().and_then(|experts| experts.first_share);
            let slots = walk.actions(&stage.actions).ok()?;
            Some(Work { slots, keys: walk.keys })
        };
        program.stages.iter().map(stage).collect()
    }

    /// The number of a kernel among those that were looked at.
    fn kernel(&mut self, kernel: &Kernel) -> usize {
        if let Some(&index) = self.kernels.get(kernel) {
            return index;
        }
        let function = kernel.generate();
        // Where registers are short, moves are a part of the loop as good as any.
        let longer = match self.backend {
            KernelBackend::Wide(cpu) => {
                hot_loop(&function, cpu).map_or(1.0, |(all, moves)| 1.0 + moves as f64 / all as f64)
            }
            KernelBackend::Cranelift => 1.0,
        };
        self.analyzed.push(Analyzed::new(function, longer));
        self.kernels.insert(kernel.clone(), self.analyzed.len() - 1);
        self.analyzed.len() - 1
    }
}

/// The least range that covers both; an empty one adds nothing.
fn union(a: (i64, i64), b: (i64, i64)) -> (i64, i64) {
    match (a.0 < a.1, b.0 < b.1) {
        (true, true) => (a.0.min(b.0), a.1.max(b.1)),
        (true, false) => a,
        (false, _) => b,
    }
}

/// Where one kernel of sorting leaves the first token of each expert.
#[derive(Clone, Copy)]
struct Sorted {
    at: i64,
    experts: i64,
    pairs: i64,
}

struct Walk<'a> {
    walker: &'a mut Walker,
    step: Step,
    worker: usize,
    vars: Vec<Option<i64>>,
    /// The latest last.
    sorted: Vec<Sorted>,
    /// The kernels of actions, by where these lie.
    sites: HashMap<*const Kernel, usize>,
    /// Which weight is the table of places of experts, and what it says.
    places: Option<(usize, &'a Arrangement)>,
    /// How often the first case of a switch by format is done in this stage.
    first_share: Option<f64>,
    /// The keys that attention has seen in this stage.
    keys: (i64, i64),
}

impl Walk<'_> {
    /// Slots of some actions.
    fn actions(&mut self, actions: &[Action]) -> Result<f64, Unknown> {
        let mut slots = 0.0;
        for action in actions {
            slots += match action {
                Action::Let(var, value) => {
                    self.vars[var.0 as usize] = self.value(value);
                    0.0
                }
                Action::Call(kernel, arguments) => self.call(kernel, arguments)?,
                Action::Loop { var, from, to, step, body } => {
                    let (from, to) = (self.value(from).ok_or(Unknown)?, self.value(to).ok_or(Unknown)?);
                    let times = if to <= from { 0 } else { (to - from + step - 1) / step };
                    self.repeat(var.0 as usize, from, *step, times, body)?
                }
                Action::Switch { on, cases } => match (self.value(on), self.first_share, &cases[..]) {
                    (Some(on), ..) => match usize::try_from(on).ok().and_then(|on| cases.get(on)) {
                        Some(case) => self.actions(case)?,
                        None => 0.0,
                    },
                    (None, Some(share), [first, second]) => {
                        share * self.actions(first)? + (1.0 - share) * self.actions(second)?
                    }
                    (None, ..) => return Err(Unknown),
                },
            };
        }
        Ok(slots)
    }

    fn repeat(&mut self, var: usize, from: i64, step: i64, times: i64, body: &[Action]) -> Result<f64, Unknown> {
        if times == 0 {
            return Ok(0.0);
        }
        self.vars[var] = None;
        if let Ok(slots) = self.actions(body) {
            return Ok(times as f64 * slots);
        }
        let mut slots = 0.0;
        for i in 0..times {
            self.vars[var] = Some(from + i * step);
            slots += self.actions(body)?;
        }
        Ok(slots)
    }

    fn call(&mut self, kernel: &Kernel, arguments: &[Expr]) -> Result<f64, Unknown> {
        let values: Vec<Option<i64>> = arguments.iter().map(|a| self.value(a)).collect();
        if let Kernel::SortByExpert(sort) = kernel {
            let [_, Some(tokens), Some(at), ..] = values[..] else { return Err(Unknown) };
            self.sorted.push(Sorted { at, experts: sort.experts as i64, pairs: tokens * sort.k as i64 });
        }
        if let (Kernel::Attention(attention), &[_, _, _, _, Some(lo), Some(hi), ..]) = (kernel, &values[..]) {
            self.keys = union(self.keys, (lo.max(0), hi + attention.tokens() as i64 - 1));
        }
        let index = match self.sites.get(&std::ptr::from_ref(kernel)) {
            Some(&index) => index,
            None => {
                let index = self.walker.kernel(kernel);
                self.sites.insert(std::ptr::from_ref(kernel), index);
                index
            }
        };
        let rates = self.walker.rates;
        self.walker.analyzed[index].slots(&values, &rates).ok_or(Unknown)
    }

    /// What is known of an expression.
    fn value(&self, expr: &Expr) -> Option<i64> {
        match expr {
            Expr::Int(n) => Some(*n),
            Expr::Var(v) => self.vars[v.0 as usize],
            Expr::Field(field) => match field {
                Field::Worker => Some(self.worker as i64),
                Field::Workers => Some(self.step.workers as i64),
                Field::Tokens => Some(self.step.tokens as i64),
                Field::LogitCount => Some(self.step.logits as i64),
                Field::Positions => Some(POSITIONS),
                Field::PageTables => Some(PAGE_TABLES),
                Field::Payload
                | Field::Scratch
                | Field::WorkerScratch
                | Field::TokenIds
                | Field::LogitRows
                | Field::Logits => None,
            },
            Expr::Buffer(id) => Some(BUFFERS + id.0 as i64 * BUFFER),
            Expr::Weight(index) => self.places.filter(|(places, _)| places == index).map(|_| PLACES),
            // All tokens are of one sequence, which has one page table.
            Expr::LoadAddress(at) => self.value(at).filter(|&at| at >= PAGE_TABLES).map(|_| PAGE_TABLE),
            Expr::Arith(op, a, b) => {
                let (a, b) = (self.value(a)?, self.value(b)?);
                Some(match op {
                    Arith::Add => a.wrapping_add(b),
                    Arith::Sub => a.wrapping_sub(b),
                    Arith::Mul => a.wrapping_mul(b),
                    Arith::Div => (a as u64).checked_div(b as u64)? as i64,
                    Arith::Min => a.min(b),
                    Arith::Max => a.max(b),
                })
            }
            Expr::LoadU32(at) => self.loaded(self.value(at)?),
        }
    }

    /// The integer at an address, if it is a position, or where an expert's tokens begin.
    fn loaded(&self, at: i64) -> Option<i64> {
        if (POSITIONS..PAGE_TABLES).contains(&at) {
            return Some(self.step.depth as i64 + (at - POSITIONS) / 4);
        }
        if let (PLACES..BUFFERS, Some((_, Arrangement::ExpertPlaces { places }))) = (at, self.places) {
            return places.iter().flatten().nth(((at - PLACES) / 4) as usize).map(|&place| i64::from(place));
        }
        let within = |sorted: &&Sorted| (0..=4 * sorted.experts).contains(&(at - sorted.at));
        let sorted = self.sorted.iter().rev().find(within)?;
        Some((at - sorted.at) / 4 * sorted.pairs / sorted.experts)
    }
}
