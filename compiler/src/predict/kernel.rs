//! What a call of a kernel is expected to take: its tile IR gone through without data.
//!
//! Loops are counted, not run: integers that follow from the arguments are known, all else is not. A block of code takes as long as the busiest of its
//! resources, or as its longest chain of operations that wait for each other, whichever is more; a loop takes that many times what the next iteration
//! must wait for. The unit is the *slot*: the time in which one thread does one f32 multiply-add of 16 lanes when nothing is waited for.
//! Deliberately absent: memory beyond the first cache ([`super`] knows what is read from it).

use moec_abi::LANES;
use moec_ir::tile::eval::{binary_int, shift_int};
use moec_ir::tile::{Binary, Function, Inst, Loop, Memory, Op, Reduce, Type, Value};
use std::collections::HashMap;

use crate::tune::limits::Limits;

/// Scalar operations that fit into a slot beside vectors.
const SCALARS: f64 = 4.0;

/// What operations cost on a machine, in slots.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Rates {
    /// A dot product of 16 × 4 bytes.
    pub dot: f64,
    /// Any operation on vectors, beside the limits of its own kind.
    pub op: f64,
    /// Until the result of a multiply-add is there.
    pub latency: f64,
}

impl Rates {
    /// Of a machine.
    pub fn of(limits: &Limits, threads: usize) -> Rates {
        let slot = slot_seconds(limits, threads);
        Rates {
            dot: limits.fmas / LANES as f64 / (limits.dots / (4 * LANES) as f64),
            op: limits.fmas / LANES as f64 / limits.ops,
            latency: limits.latency / slot,
        }
    }
}

/// Seconds of a slot.
pub fn slot_seconds(limits: &Limits, threads: usize) -> f64 {
    threads as f64 * LANES as f64 / limits.fmas
}

/// A kernel whose calls are looked at.
pub struct Analyzed {
    function: Function,
    /// The parameters that decide how often loops run.
    decisive: Vec<usize>,
    /// How much longer it takes than its operations do.
    longer: f64,
    /// What calls with these decisive arguments take.
    known: HashMap<Vec<i64>, f64>,
}

impl Analyzed {
    /// Finds out what decides about loops; calls take `longer` times what the operations do.
    pub fn new(function: Function, longer: f64) -> Analyzed {
        let mut from = vec![0u64; function.types.len()];
        for (i, (value, _)) in function.params.iter().enumerate() {
            from[value.0 as usize] = 1 << i;
        }
        let mut bounds = 0;
        // Carried values may depend on what comes after them: twice is enough for a chain through one, and so on.
        for _ in 0..4 {
            depend(&function.body, &mut from, &mut bounds);
        }
        let decisive = (0..function.params.len()).filter(|i| bounds >> i & 1 == 1).collect();
        Analyzed { function, decisive, longer, known: HashMap::new() }
    }

    /// Slots of a call; `None` when a loop depends on an argument that is not known.
    pub fn slots(&mut self, arguments: &[Option<i64>], rates: &Rates) -> Option<f64> {
        let key: Vec<i64> = self.decisive.iter().map(|&i| arguments[i]).collect::<Option<_>>()?;
        if let Some(&slots) = self.known.get(&key) {
            return Some(slots);
        }
        let mut run = Run {
            rates,
            types: &self.function.types,
            ints: vec![None; self.function.types.len()],
            ready: vec![0.0; self.function.types.len()],
        };
        for (&i, &argument) in self.decisive.iter().zip(&key) {
            run.ints[self.function.params[i].0.0 as usize] = Some(argument);
        }
        let time = run.block(&self.function.body).ok()?;
        let slots = self.longer * time.busy().max(time.finish);
        self.known.insert(key, slots);
        Some(slots)
    }
}

/// Notes on which parameters each value depends, and on which ones the bounds of loops do.
fn depend(body: &[Inst], from: &mut [u64], bounds: &mut u64) {
    for inst in body {
        match &inst.op {
            Op::For(l) => {
                let Loop { start, end, index, initial, carried, body, next, .. } = &**l;
                *bounds |= from[start.0 as usize] | from[end.0 as usize];
                from[index.0 as usize] |= from[start.0 as usize] | from[end.0 as usize];
                for (i, c) in initial.iter().zip(carried) {
                    from[c.0 as usize] |= from[i.0 as usize];
                }
                depend(body, from, bounds);
                for ((n, c), r) in next.iter().zip(carried).zip(&inst.results) {
                    from[c.0 as usize] |= from[n.0 as usize];
                    from[r.0 as usize] |= from[c.0 as usize];
                }
            }
            Op::Binary(_, a, b) => set(inst, from, &[*a, *b]),
            Op::Compare(_, a, b) => set(inst, from, &[*a, *b]),
            Op::Select(c, a, b) => set(inst, from, &[*c, *a, *b]),
            Op::Shift(_, a, _) => set(inst, from, &[*a]),
            // What is loaded is not known whatever the address.
            _ => {}
        }
    }
}

fn set(inst: &Inst, from: &mut [u64], operands: &[Value]) {
    let all = operands.iter().fold(0, |all, v| all | from[v.0 as usize]);
    for result in &inst.results {
        from[result.0 as usize] |= all;
    }
}

/// What a block of code keeps busy, in slots.
#[derive(Clone, Copy, Default, Debug)]
struct Time {
    /// Multiply-adds and dot products.
    arithmetic: f64,
    /// Other operations on vectors, each of [`Rates::op`].
    others: f64,
    /// Loads and stores.
    accesses: f64,
    /// Operations on scalars.
    scalars: f64,
    /// All of the loops in it.
    loops: f64,
    /// Until the last result is there, if it begins at 0.
    finish: f64,
}

impl Time {
    fn busy(&self) -> f64 {
        self.arithmetic.max(self.others).max(self.accesses).max(self.scalars / SCALARS) + self.loops
    }
}

/// A loop's bounds are not known here.
#[derive(Debug)]
struct Unknown;

struct Run<'a> {
    rates: &'a Rates,
    types: &'a [Type],
    /// What is known of each value.
    ints: Vec<Option<i64>>,
    /// When each value is there, from the start of its block.
    ready: Vec<f64>,
}

impl Run<'_> {
    fn int(&self, v: Value) -> Option<i64> {
        self.ints[v.0 as usize]
    }

    fn ready(&self, values: &[Value]) -> f64 {
        values.iter().map(|v| self.ready[v.0 as usize]).fold(0.0, f64::max)
    }

    /// The time of a block whose inputs are set.
    fn block(&mut self, body: &[Inst]) -> Result<Time, Unknown> {
        let mut time = Time::default();
        // A processor does not look ahead over a whole loop.
        let mut last_loop = 0f64;
        for inst in body {
            let end = match &inst.op {
                Op::For(l) => {
                    let begin = self.ready(&l.initial).max(last_loop);
                    let slots = self.run_loop(l, &inst.results)?;
                    time.loops += slots;
                    last_loop = begin + slots;
                    last_loop
                }
                op => {
                    let (operands, latency) = self.count(op, &mut time);
                    self.evaluate(inst);
                    self.ready(&operands) + latency
                }
            };
            for result in &inst.results {
                self.ready[result.0 as usize] = end;
            }
            time.finish = time.finish.max(end);
        }
        Ok(time)
    }

    /// The time of a loop.
    fn run_loop(&mut self, l: &Loop, results: &[Value]) -> Result<f64, Unknown> {
        let (Some(start), Some(end)) = (self.int(l.start), self.int(l.end)) else { return Err(Unknown) };
        let times = if end <= start { 0 } else { ((end - start) as u64).div_ceil(l.step as u64) };
        let initial: Vec<Option<i64>> = l.initial.iter().map(|&v| self.int(v)).collect();
        for result in results {
            self.ints[result.0 as usize] = None;
        }
        if times == 0 {
            for (result, value) in results.iter().zip(initial) {
                self.ints[result.0 as usize] = value;
            }
            return Ok(0.0);
        }
        let begin = |run: &mut Self, index: Option<i64>, carried: &[Option<i64>]| {
            run.ints[l.index.0 as usize] = index;
            for (c, value) in l.carried.iter().zip(carried) {
                run.ints[c.0 as usize] = *value;
            }
        };
        // Most loops do the same each time, whatever the index is.
        begin(self, None, &vec![None; l.carried.len()]);
        let known = self.chain(l, |run| run.block(&l.body));
        if let Ok((busy, chain, finish)) = known {
            return Ok((times - 1) as f64 * busy.max(chain) + busy.max(finish));
        }
        let (mut carried, mut all, mut rest) = (initial, 0.0, 0.0);
        for i in 0..times {
            let (busy, chain, finish) = self.chain(l, |run| {
                begin(run, Some(start + i as i64 * l.step), &carried);
                run.block(&l.body)
            })?;
            all += busy.max(chain);
            rest = (finish - busy.max(chain)).max(0.0);
            carried = l.next.iter().map(|&v| self.int(v)).collect();
        }
        for (result, value) in results.iter().zip(carried) {
            self.ints[result.0 as usize] = value;
        }
        Ok(all + rest)
    }

    /// How busy an iteration is, how long the next one waits for it, and when its last result is there.
    fn chain(
        &mut self,
        l: &Loop,
        body: impl Fn(&mut Self) -> Result<Time, Unknown>,
    ) -> Result<(f64, f64, f64), Unknown> {
        self.ready[l.index.0 as usize] = 0.0;
        l.carried.iter().for_each(|c| self.ready[c.0 as usize] = 0.0);
        let first = body(self)?;
        let once: Vec<f64> = l.next.iter().map(|n| self.ready[n.0 as usize]).collect();
        l.carried.iter().zip(&once).for_each(|(c, &ready)| self.ready[c.0 as usize] = ready);
        body(self)?;
        let twice = l.next.iter().map(|n| self.ready[n.0 as usize]);
        let chain = twice.zip(&once).map(|(b, a)| b - a).fold(0.0, f64::max);
        // Operations that a chain does not pass through begin at once in each iteration, and loops in it take their time anyway.
        Ok((first.busy(), chain.min(first.finish), first.finish))
    }

    /// Adds what an operation keeps busy; gives its operands, and the slots until its result is there.
    fn count(&self, op: &Op, time: &mut Time) -> (Vec<Value>, f64) {
        let Rates { dot, op: simple, latency } = *self.rates;
        let vector = |v: &Value| self.types[v.0 as usize].is_vector();
        let float = |v: &Value| matches!(self.types[v.0 as usize], Type::F32 | Type::VecF32);
        // Simple integer operations take one cycle where a multiply-add takes four.
        let quick = latency / 4.0;
        let other = |time: &mut Time, n: f64| time.others += n * simple;
        match op {
            Op::Int(_) | Op::F32(_) | Op::Lanes(_) => (vec![], 0.0),
            Op::Binary(binary, a, b) => {
                let slow = match binary {
                    Binary::Div => 8.0,
                    Binary::Mul => 1.0,
                    _ => 0.0,
                };
                if vector(a) || float(a) {
                    other(time, 1.0);
                    time.arithmetic += slow;
                } else {
                    time.scalars += 1.0;
                }
                let waits = match binary {
                    Binary::Div => 4.0 * latency,
                    _ if float(a) => latency,
                    _ => quick,
                };
                (vec![*a, *b], waits)
            }
            Op::Fma(a, b, c) => {
                other(time, 1.0);
                time.arithmetic += 1.0;
                (vec![*a, *b, *c], latency)
            }
            Op::DotU8S8(a, w, x) | Op::DotS8S8(a, w, x) => {
                // Signed bytes are for CPUs that multiply them by four operations of the kind that all else is.
                other(time, if matches!(op, Op::DotS8S8(..)) { 4.0 } else { 1.0 });
                time.arithmetic += dot;
                (vec![*a, *w, *x], latency * dot.max(1.0))
            }
            Op::Sqrt(a) => {
                other(time, 1.0);
                time.arithmetic += 8.0;
                (vec![*a], 4.0 * latency)
            }
            Op::Shift(_, a, _) if !vector(a) => {
                time.scalars += 1.0;
                (vec![*a], quick)
            }
            Op::Shift(_, a, _) | Op::Abs(a) | Op::NibbleLow(a) => {
                other(time, 1.0);
                (vec![*a], quick)
            }
            Op::NibbleHigh(a) => {
                other(time, 2.0);
                (vec![*a], 2.0 * quick)
            }
            Op::Lookup(_, a) | Op::Splat(a) => {
                other(time, 1.0);
                (vec![*a], latency / 2.0)
            }
            Op::Round(a) | Op::IntToFloat(a) | Op::FloatToInt(a) => {
                other(time, 1.0);
                (vec![*a], latency)
            }
            Op::Bitcast(_, a) => (vec![*a], 0.0),
            Op::Compare(_, a, b) => {
                if vector(a) {
                    other(time, 1.0)
                } else {
                    time.scalars += 1.0
                }
                (vec![*a, *b], quick)
            }
            Op::Select(c, a, b) => {
                if vector(a) {
                    other(time, 1.0)
                } else {
                    time.scalars += 1.0
                }
                (vec![*c, *a, *b], quick)
            }
            // Four halvings, each a move of lanes and an operation.
            Op::Reduce(Reduce::Add | Reduce::Max, a) => {
                other(time, 8.0);
                (vec![*a], 6.0 * latency)
            }
            Op::Load(memory, at) => {
                time.accesses += 1.0;
                other(time, widening(*memory));
                (vec![at.base], 1.5 * latency)
            }
            Op::LoadSplat(memory, at) => {
                time.accesses += 1.0;
                other(time, widening(*memory));
                (vec![at.base], 1.5 * latency)
            }
            Op::LoadBytes(at) | Op::LoadSplatBytes(at) => {
                time.accesses += 1.0;
                (vec![at.base], 1.5 * latency)
            }
            Op::LoadScalar(_, at) | Op::LoadInt(at) | Op::LoadU32(at) => {
                time.accesses += 0.5;
                (vec![at.base], latency)
            }
            Op::Store(_, v, at) => {
                time.accesses += 1.0;
                (vec![*v, at.base], 0.0)
            }
            // Sixteen lanes taken out and stored one by one.
            Op::StoreStrided(_, v, at, _) => {
                time.accesses += LANES as f64;
                other(time, LANES as f64);
                (vec![*v, at.base], 0.0)
            }
            Op::StoreScalar(_, v, at) => {
                time.accesses += 0.5;
                (vec![*v, at.base], 0.0)
            }
            Op::Prefetch(at) => {
                time.accesses += 0.5;
                (vec![at.base], 0.0)
            }
            Op::For(_) => unreachable!("loops are not counted as operations"),
        }
    }

    /// What is known of the integer that an operation gives.
    fn evaluate(&mut self, inst: &Inst) {
        let &[result] = &inst.results[..] else { return };
        let value = match inst.op {
            Op::Int(n) => Some(n),
            Op::Binary(op, a, b) if self.types[a.0 as usize] == Type::Int => {
                self.int(a).zip(self.int(b)).map(|(a, b)| binary_int(op, a, b))
            }
            Op::Shift(op, a, by) if self.types[a.0 as usize] == Type::Int => self.int(a).map(|a| shift_int(op, a, by)),
            _ => None,
        };
        self.ints[result.0 as usize] = value;
    }
}

/// Operations that make 16 lanes of what is loaded.
const fn widening(memory: Memory) -> f64 {
    match memory {
        Memory::F32 | Memory::I32 => 0.0,
        Memory::I8 => 1.0,
        Memory::Bf16 | Memory::F16 => 2.0,
    }
}
