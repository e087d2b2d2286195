//! What every worker does in a step: stages of actions, with barriers between them.
//!
//! A [`Program`] is the plan's last form and the lowering's input. Every worker runs all of it (SPMD): it finds its own share from
//! [`Expr::Worker`] and [`Expr::Workers`], calls kernels on it, and meets the others at the barrier after a stage that says so. Addresses are
//! expressions over the step's fields. The program prints as text (`moec inspect --plan`), is lowered to Cranelift IR by
//! [`crate::lower::step`], and can be run by the tile evaluator.
//!
//! Deliberately absent: decisions. Which kernel, which share and which buffer is settled in [`super::stages`].

use super::buffers::{BufferId, Buffers, Scope};
use crate::kernels::Kernel;
use crate::target::ProductShape;
use std::fmt;

/// A loop variable or a named intermediate value of a [`Program`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Var(pub u32);

impl fmt::Display for Var {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "i{}", self.0)
    }
}

/// A field of the step, or what follows from it at once.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Field {
    /// Index of this worker.
    Worker,
    /// Number of workers.
    Workers,
    /// Tokens in the step.
    Tokens,
    /// Rows of logits wanted.
    LogitCount,
    /// Address of the payload.
    Payload,
    /// Address of the shared scratch memory.
    Scratch,
    /// Address of this worker's own scratch memory.
    WorkerScratch,
    /// Address of the token ids.
    TokenIds,
    /// Address of the positions.
    Positions,
    /// Address of the array of page tables.
    PageTables,
    /// Address of the indices of the rows that need logits.
    LogitRows,
    /// Address of the logits.
    Logits,
}

impl Field {
    /// The name in text form.
    pub const fn name(self) -> &'static str {
        match self {
            Field::Worker => "worker",
            Field::Workers => "workers",
            Field::Tokens => "tokens",
            Field::LogitCount => "logit_count",
            Field::Payload => "payload",
            Field::Scratch => "scratch",
            Field::WorkerScratch => "own",
            Field::TokenIds => "token_ids",
            Field::Positions => "positions",
            Field::PageTables => "page_tables",
            Field::LogitRows => "logit_rows",
            Field::Logits => "logits",
        }
    }
}

/// Two-operand integer arithmetic. Division is unsigned and its divisor is never zero; the others wrap; `Min` and `Max` are signed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Arith {
    /// Sum.
    Add,
    /// Difference.
    Sub,
    /// Product.
    Mul,
    /// Quotient, rounded down.
    Div,
    /// The lesser.
    Min,
    /// The greater.
    Max,
}

/// An integer or an address.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Expr {
    /// A constant.
    Int(i64),
    /// A variable in scope.
    Var(Var),
    /// Something the step says.
    Field(Field),
    /// The address of a buffer.
    Buffer(BufferId),
    /// The address of a weight, by its index in [`Program::weights`].
    Weight(usize),
    /// Arithmetic.
    Arith(Arith, Box<Expr>, Box<Expr>),
    /// The unsigned 32-bit integer at an address.
    LoadU32(Box<Expr>),
    /// The address (or 64-bit integer) at an address.
    LoadAddress(Box<Expr>),
}

impl From<Field> for Expr {
    fn from(f: Field) -> Expr {
        Expr::Field(f)
    }
}

impl From<BufferId> for Expr {
    fn from(id: BufferId) -> Expr {
        Expr::Buffer(id)
    }
}

impl From<Var> for Expr {
    fn from(v: Var) -> Expr {
        Expr::Var(v)
    }
}

impl From<i64> for Expr {
    fn from(n: i64) -> Expr {
        Expr::Int(n)
    }
}

impl From<usize> for Expr {
    fn from(n: usize) -> Expr {
        Expr::Int(i64::try_from(n).expect("sizes fit 63 bits"))
    }
}

fn arith(op: Arith, a: Expr, b: Expr) -> Expr {
    use Arith::{Add, Div, Max, Min, Mul, Sub};
    match (op, &a, &b) {
        (_, &Expr::Int(x), &Expr::Int(y)) => Expr::Int(match op {
            Add => x + y,
            Sub => x - y,
            Mul => x * y,
            Div => x / y,
            Min => x.min(y),
            Max => x.max(y),
        }),
        (Add | Sub, _, Expr::Int(0)) | (Mul | Div, _, Expr::Int(1)) => a,
        (Add, Expr::Int(0), _) | (Mul, Expr::Int(1), _) => b,
        (Mul, _, Expr::Int(0)) | (Mul, Expr::Int(0), _) => Expr::Int(0),
        _ => Expr::Arith(op, Box::new(a), Box::new(b)),
    }
}

impl Expr {
    /// The lesser of two.
    pub fn min(self, other: impl Into<Expr>) -> Expr {
        arith(Arith::Min, self, other.into())
    }

    /// The greater of two.
    pub fn max(self, other: impl Into<Expr>) -> Expr {
        arith(Arith::Max, self, other.into())
    }

    /// The unsigned 32-bit integer at this address.
    pub fn load_u32(self) -> Expr {
        Expr::LoadU32(Box::new(self))
    }

    /// The address at this address.
    pub fn load_address(self) -> Expr {
        Expr::LoadAddress(Box::new(self))
    }
}

macro_rules! operator {
    ($trait:ident, $method:ident, $op:ident) => {
        impl<T: Into<Expr>> std::ops::$trait<T> for Expr {
            type Output = Expr;
            fn $method(self, other: T) -> Expr {
                arith(Arith::$op, self, other.into())
            }
        }
    };
}
operator!(Add, add, Add);
operator!(Sub, sub, Sub);
operator!(Mul, mul, Mul);
operator!(Div, div, Div);

/// An expression with the program that names its buffers and weights.
struct Shown<'a>(&'a Program, &'a Expr);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shown(program, expr) = *self;
        let show = |e| Shown(program, e);
        let factor = |e| Factor(program, e);
        match expr {
            Expr::Int(n) => write!(f, "{n}"),
            Expr::Var(v) => write!(f, "{v}"),
            Expr::Field(field) => f.write_str(field.name()),
            Expr::Buffer(id) => f.write_str(&program.buffers.all[id.0].name),
            Expr::Weight(i) => write!(f, "@{}", program.weights[*i].name),
            Expr::Arith(op, a, b) => match op {
                Arith::Add => write!(f, "{} + {}", show(a), show(b)),
                Arith::Sub => write!(f, "{} - {}", show(a), factor(b)),
                Arith::Mul => write!(f, "{}·{}", factor(a), factor(b)),
                Arith::Div => write!(f, "{}/{}", factor(a), factor(b)),
                Arith::Min => write!(f, "min({}, {})", show(a), show(b)),
                Arith::Max => write!(f, "max({}, {})", show(a), show(b)),
            },
            Expr::LoadU32(at) => write!(f, "u32[{}]", show(at)),
            Expr::LoadAddress(at) => write!(f, "address[{}]", show(at)),
        }
    }
}

/// An expression in a place where a sum needs parentheses.
struct Factor<'a>(&'a Program, &'a Expr);

impl fmt::Display for Factor<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = Shown(self.0, self.1);
        match self.1 {
            Expr::Arith(Arith::Add | Arith::Sub | Arith::Mul | Arith::Div, ..) => write!(f, "({shown})"),
            Expr::Arith(Arith::Min | Arith::Max, ..)
            | Expr::Int(_)
            | Expr::Var(_)
            | Expr::Field(_)
            | Expr::Buffer(_)
            | Expr::Weight(_)
            | Expr::LoadU32(_)
            | Expr::LoadAddress(_) => write!(f, "{shown}"),
        }
    }
}

/// One thing a worker does.
#[derive(Clone, PartialEq, Debug)]
pub enum Action {
    /// Names a value for the actions after it in the same block.
    Let(Var, Expr),
    /// Runs a kernel.
    Call(Kernel, Vec<Expr>),
    /// `for var in (from..to).step_by(step)`; nothing when `to <= from` (signed).
    Loop {
        /// The loop's variable.
        var: Var,
        /// Its first value.
        from: Expr,
        /// The value before which the loop ends.
        to: Expr,
        /// What is added each time.
        step: i64,
        /// What is done each time.
        body: Vec<Action>,
    },
    /// Does the block whose index `on` is; nothing when there is none.
    Switch {
        /// The index.
        on: Expr,
        /// The blocks.
        cases: Vec<Vec<Action>>,
    },
}

/// A run of work without a barrier in it.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Stage {
    /// What it computes, for people: the nodes of the graph.
    pub title: String,
    /// What every worker does.
    pub actions: Vec<Action>,
    /// Whether all workers meet after it. The last stage has none: the step's return is its barrier.
    pub barrier: bool,
    /// Bytes of weights that it reads for one token: on average, where experts are not of one size.
    pub weight_bytes: usize,
    /// Those that it reads whatever experts the token chooses.
    pub common_bytes: usize,
    /// The experts of which it reads those that are chosen.
    pub experts: Option<StageExperts>,
    /// Multiply-adds with weights for one token, as laid out.
    pub multiply_adds: usize,
    /// The products with weights in it.
    pub products: Vec<StageProduct>,
}

/// The experts of a stage.
#[derive(Clone, PartialEq, Debug)]
pub struct StageExperts {
    /// Which choice is among them: the number of the layer.
    pub layer: usize,
    /// Bytes of the weights of each.
    pub bytes: Vec<usize>,
    /// How often a token chooses each, from 0 to 1.
    pub chances: Vec<f64>,
    /// Where they lie in two formats: the share of the choices that meet the one whose matrices lie first.
    pub first_share: Option<f64>,
}

/// A product with a weight in a stage.
#[derive(Clone, PartialEq, Debug)]
pub struct StageProduct {
    /// The weight, by its index in [`Program::weights`].
    pub weight: usize,
    /// What it is tuned by.
    pub shape: ProductShape,
    /// Matrices that one token meets, on average: more than one where the weight has experts.
    pub matrices: f64,
    /// Bytes from a token's row of results to the next.
    pub stride: usize,
}

/// All that a worker does in one step.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Program {
    /// The stages in order.
    pub stages: Vec<Stage>,
    /// Number of variables used.
    pub vars: u32,
    /// Scratch memory.
    pub buffers: Buffers,
    /// The weights that it reads.
    pub weights: Vec<PlacedWeight>,
}

/// A weight that a program reads.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PlacedWeight {
    /// For people.
    pub name: String,
    /// Bytes from the payload's start.
    pub offset: usize,
}

impl Program {
    /// Every kernel called, in order of first use, each once.
    pub fn kernels(&self) -> Vec<Kernel> {
        let mut seen = Vec::new();
        self.stages.iter().for_each(|stage| collect(&stage.actions, &mut seen));
        seen
    }
}

impl Stage {
    /// Every kernel called, in order of first use, each once.
    pub fn kernels(&self) -> Vec<Kernel> {
        let mut seen = Vec::new();
        collect(&self.actions, &mut seen);
        seen
    }
}

/// Adds the kernels that `actions` call and that were not seen.
fn collect(actions: &[Action], seen: &mut Vec<Kernel>) {
    for action in actions {
        match action {
            Action::Let(..) => {}
            Action::Call(kernel, _) => {
                if !seen.contains(kernel) {
                    seen.push(kernel.clone());
                }
            }
            Action::Loop { body, .. } => collect(body, seen),
            Action::Switch { cases, .. } => cases.iter().for_each(|c| collect(c, seen)),
        }
    }
}

fn write_actions(f: &mut fmt::Formatter<'_>, program: &Program, actions: &[Action], depth: usize) -> fmt::Result {
    let show = |e| Shown(program, e);
    let pad = "  ".repeat(depth);
    for action in actions {
        match action {
            Action::Let(v, e) => writeln!(f, "{pad}{v} = {}", show(e))?,
            Action::Call(kernel, args) => {
                write!(f, "{pad}{}(", kernel.name())?;
                for (i, a) in args.iter().enumerate() {
                    write!(f, "{}{}", if i == 0 { "" } else { ", " }, show(a))?;
                }
                writeln!(f, ")")?;
            }
            Action::Loop { var, from, to, step, body } => {
                write!(f, "{pad}for {var} in {} .. {}", show(from), show(to))?;
                if *step != 1 {
                    write!(f, " step {step}")?;
                }
                writeln!(f, " {{")?;
                write_actions(f, program, body, depth + 1)?;
                writeln!(f, "{pad}}}")?;
            }
            Action::Switch { on, cases } => {
                writeln!(f, "{pad}switch {} {{", show(on))?;
                for (i, case) in cases.iter().enumerate().filter(|(_, c)| !c.is_empty()) {
                    writeln!(f, "{pad}  {i}:")?;
                    write_actions(f, program, case, depth + 2)?;
                }
                writeln!(f, "{pad}}}")?;
            }
        }
    }
    Ok(())
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for buffer in &self.buffers.all {
            let (scope, life) = match (buffer.scope, buffer.life) {
                (Scope::Shared, Some((a, b))) => ("shared", format!("stages {a}..={b}")),
                (Scope::Worker, Some((a, b))) => ("own", format!("stages {a}..={b}")),
                (_, None) => ("unused", String::new()),
            };
            let pinned = if buffer.pinned { ", kept" } else { "" };
            writeln!(
                f,
                "buffer {}: {} bytes at {scope} + {}, {life}{pinned}",
                buffer.name, buffer.bytes, buffer.offset
            )?;
        }
        for (i, stage) in self.stages.iter().enumerate() {
            writeln!(f, "stage {i}: {}", stage.title)?;
            write_actions(f, self, &stage.actions, 1)?;
            if stage.barrier {
                writeln!(f, "barrier")?;
            }
        }
        Ok(())
    }
}
