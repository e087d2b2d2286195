//! The attributes and operands that operations are written with: their types and their text form.
//!
//! The table in [`super::op`] uses the two traits here to print and parse every operation. Deliberately absent: what an
//! attribute means ([`super::op`]) and which values of it are allowed ([`super::verify`]).

use std::fmt;

use super::types::{ValueId, WeightId};

/// How the tokens reach their experts.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Dispatch {
    /// One (token, slot) after another.
    General,
    /// One token: the rows of its k experts are one range, split over the workers.
    Decode,
    /// (token, slot) pairs in the order of their experts, so that an expert's weights are read once.
    Grouped,
}

impl Dispatch {
    /// All of them.
    pub const ALL: [Dispatch; 3] = [Dispatch::General, Dispatch::Decode, Dispatch::Grouped];

    /// The name in text form.
    pub const fn name(self) -> &'static str {
        match self {
            Dispatch::General => "general",
            Dispatch::Decode => "decode",
            Dispatch::Grouped => "grouped",
        }
    }
}

impl fmt::Display for Dispatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How the k largest are found. Both give the same answer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Selection {
    /// k passes over all.
    Scan,
    /// A fixed network of comparisons that keeps the two best, without branches.
    Network,
}

impl Selection {
    /// All of them.
    pub const ALL: [Selection; 2] = [Selection::Scan, Selection::Network];

    /// The name in text form.
    pub const fn name(self) -> &'static str {
        match self {
            Selection::Scan => "scan",
            Selection::Network => "network",
        }
    }
}

impl fmt::Display for Selection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Over what the scores of the chosen experts are a softmax.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Scores {
    /// Over the chosen ones: they sum up to 1. Left out in text.
    Chosen,
    /// Over all: they sum up to less.
    All,
}

impl Scores {
    /// The name in text form.
    pub const fn name(self) -> &'static str {
        match self {
            Scores::Chosen => "chosen",
            Scores::All => "all",
        }
    }
}

/// What a gate goes through before it multiplies.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Activation {
    /// [`Op::Silu`](super::Op::Silu). Left out in text.
    Silu,
    /// [`Op::Gelu`](super::Op::Gelu).
    Gelu,
}

impl Activation {
    /// The name in text form.
    pub const fn name(self) -> &'static str {
        match self {
            Activation::Silu => "silu",
            Activation::Gelu => "gelu",
        }
    }

    /// Of one number.
    pub fn apply(self, x: f32) -> f32 {
        match self {
            Activation::Silu => crate::math::silu(x),
            Activation::Gelu => crate::math::gelu(x),
        }
    }
}

/// A named attribute: `eps=1e-5`.
pub(super) trait Attribute: Sized {
    /// The text after `=`; `None` when the attribute is left out.
    fn print(&self) -> Option<String>;
    /// From the text after `=`; `None` when it was left out. The error says what was expected.
    fn parse(text: Option<&str>) -> Result<Self, &'static str>;
    /// The value it names, if it is an optional operand.
    fn value(&mut self) -> Option<&mut ValueId> {
        None
    }
}

impl Attribute for usize {
    fn print(&self) -> Option<String> {
        Some(self.to_string())
    }

    fn parse(text: Option<&str>) -> Result<usize, &'static str> {
        text.and_then(|t| t.parse().ok()).ok_or("a number")
    }
}

impl Attribute for f32 {
    fn print(&self) -> Option<String> {
        Some(format!("{self:?}"))
    }

    fn parse(text: Option<&str>) -> Result<f32, &'static str> {
        text.and_then(|t| t.parse().ok()).ok_or("a number such as 1e-5")
    }
}

impl Attribute for Option<f32> {
    fn print(&self) -> Option<String> {
        self.map(|x| format!("{x:?}"))
    }

    fn parse(text: Option<&str>) -> Result<Option<f32>, &'static str> {
        text.map(|t| t.parse().map_err(|_| "a number such as 50.0")).transpose()
    }
}

impl Attribute for Option<usize> {
    fn print(&self) -> Option<String> {
        self.map(|n| n.to_string())
    }

    fn parse(text: Option<&str>) -> Result<Option<usize>, &'static str> {
        text.map(|t| t.parse().map_err(|_| "a number")).transpose()
    }
}

impl Attribute for bool {
    fn print(&self) -> Option<String> {
        self.then(|| "true".to_string())
    }

    fn parse(text: Option<&str>) -> Result<bool, &'static str> {
        match text {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(_) => Err("true or false"),
        }
    }
}

impl Attribute for Scores {
    fn print(&self) -> Option<String> {
        match self {
            Scores::Chosen => None,
            Scores::All => Some(self.name().to_string()),
        }
    }

    fn parse(text: Option<&str>) -> Result<Scores, &'static str> {
        match text {
            None | Some("chosen") => Ok(Scores::Chosen),
            Some("all") => Ok(Scores::All),
            Some(_) => Err("chosen or all"),
        }
    }
}

impl Attribute for Activation {
    fn print(&self) -> Option<String> {
        match self {
            Activation::Silu => None,
            Activation::Gelu => Some(self.name().to_string()),
        }
    }

    fn parse(text: Option<&str>) -> Result<Activation, &'static str> {
        match text {
            None | Some("silu") => Ok(Activation::Silu),
            Some("gelu") => Ok(Activation::Gelu),
            Some(_) => Err("silu or gelu"),
        }
    }
}

impl Attribute for Option<ValueId> {
    fn print(&self) -> Option<String> {
        self.map(|v| v.to_string())
    }

    fn parse(text: Option<&str>) -> Result<Option<ValueId>, &'static str> {
        text.map(|t| t.strip_prefix('%').and_then(|n| n.parse().ok()).map(ValueId).ok_or("a value such as %7"))
            .transpose()
    }

    fn value(&mut self) -> Option<&mut ValueId> {
        self.as_mut()
    }
}

impl Attribute for Dispatch {
    fn print(&self) -> Option<String> {
        Some(self.to_string())
    }

    fn parse(text: Option<&str>) -> Result<Dispatch, &'static str> {
        Dispatch::ALL.into_iter().find(|d| text == Some(d.name())).ok_or("general, decode or grouped")
    }
}

impl Attribute for Selection {
    fn print(&self) -> Option<String> {
        Some(self.to_string())
    }

    fn parse(text: Option<&str>) -> Result<Selection, &'static str> {
        Selection::ALL.into_iter().find(|s| text == Some(s.name())).ok_or("scan or network")
    }
}

/// An operand in the order of the text form.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Operand {
    /// `%3`.
    Value(ValueId),
    /// `@layers.0.q`.
    Weight(WeightId),
}

/// A type of operand.
pub(super) trait OperandKind: Copy {
    /// As either kind.
    fn operand(self) -> Operand;
    /// From either kind; `None` when it is the other.
    fn from_operand(operand: Operand) -> Option<Self>;
    /// What the text should have had.
    const EXPECTED: &'static str;
    /// The value it is, if it is one.
    fn value(slot: &mut Self) -> Option<&mut ValueId>;
    /// The weight it is, if it is one.
    fn weight(slot: &mut Self) -> Option<&mut WeightId>;
}

impl OperandKind for ValueId {
    const EXPECTED: &'static str = "a value such as %3";

    fn operand(self) -> Operand {
        Operand::Value(self)
    }

    fn from_operand(operand: Operand) -> Option<ValueId> {
        match operand {
            Operand::Value(v) => Some(v),
            Operand::Weight(_) => None,
        }
    }

    fn value(slot: &mut ValueId) -> Option<&mut ValueId> {
        Some(slot)
    }

    fn weight(_: &mut ValueId) -> Option<&mut WeightId> {
        None
    }
}

impl OperandKind for WeightId {
    const EXPECTED: &'static str = "a weight such as @layers.0.q";

    fn operand(self) -> Operand {
        Operand::Weight(self)
    }

    fn from_operand(operand: Operand) -> Option<WeightId> {
        match operand {
            Operand::Value(_) => None,
            Operand::Weight(w) => Some(w),
        }
    }

    fn value(_: &mut WeightId) -> Option<&mut ValueId> {
        None
    }

    fn weight(slot: &mut WeightId) -> Option<&mut WeightId> {
        Some(slot)
    }
}
