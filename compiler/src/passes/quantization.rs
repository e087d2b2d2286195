//! Which layout each role's weights get: the `--quant` option, and its application to a graph's weight table.
//!
//! Not a rewrite: choosing a layout changes the numbers, which no pass may do, so it happens before the first of them.
//! Deliberately absent: which experts are worth the wider of two layouts ([`crate::expert_bits`]), and how codes are chosen and packed ([`crate::plan`]).

use std::fmt;
use std::str::FromStr;

use moec_abi::padded_head_dim;
use moec_ir::graph::{DType, Exception, Graph, Layout, Op, Role, WeightId};

/// The layout of each role's weights.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct QuantConfig {
    layouts: [Layout; Role::ALL.len()],
    by_heat: bool,
}

/// Experts that lie in a wider layout than the others of their layers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HotExperts {
    /// Their layout.
    pub layout: Layout,
    /// Which, for each layer, rising: none, some, or all.
    pub layers: Vec<Vec<usize>>,
}

impl HotExperts {
    /// How many there are.
    pub fn count(&self) -> usize {
        self.layers.iter().map(Vec::len).sum()
    }

    /// Gives the matrices of these experts their layout.
    fn assign(&self, graph: &mut Graph) {
        let found: Vec<_> =
            graph.nodes_by_choice().filter_map(|(node, layer)| graph.op(node).weight().zip(layer)).collect();
        for (id, layer) in found {
            let weight = graph.weight_mut(id);
            let Some(experts) =
                self.layers.get(layer).filter(|_| weight.role == Role::Experts && weight.shape.len() == 3)
            else {
                continue;
            };
            if experts.len() == weight.experts() {
                weight.layout = self.layout;
            } else if !experts.is_empty() {
                weight.exception = Some(Exception { layout: self.layout, experts: experts.clone() });
            }
        }
    }
}

/// What is wrong with a `--quant` option.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum QuantError {
    /// Not a layout.
    #[error("--quant: `{0}` is none of none, f32, bf16, f16, q8, q4")]
    Layout(String),
    /// Bits by heat for what has none.
    #[error(
        "--quant: only experts can be `auto`: bits by how often each is chosen; say experts=auto, e.g. --quant q4,experts=auto --expert-profile FILE --size-budget 24GiB"
    )]
    Auto,
    /// Not a role.
    #[error("--quant: `{0}` is none of the roles {roles}", roles = Role::ALL.map(Role::name).join(", "))]
    Role(String),
    /// A role twice, or two layouts for all.
    #[error("--quant: {0} is given twice")]
    Twice(String),
    /// A layout that this role cannot have.
    #[error("--quant: weights for {role} cannot be {layout}; {allowed}")]
    NotForRole {
        /// The role.
        role: Role,
        /// The layout that was asked for.
        layout: Layout,
        /// What to use instead.
        allowed: &'static str,
    },
}

impl QuantConfig {
    /// Every role in `layout`, as far as that is wise: embedding and router stay as they are stored rather than quantized, norms and biases are
    /// always f32, and with `q4` attention and output are `q8`. These are few weights, on which much depends: on a real Mixtral of 0.7 B parameters
    /// the mean NLL at 4 bits is 5.8 % above that of the stored weights without this exception and 1.6 % with it.
    pub fn all(layout: Layout) -> QuantConfig {
        QuantConfig {
            by_heat: false,
            layouts: Role::ALL.map(|role| match role {
                Role::Norm | Role::Bias => Layout::F32,
                Role::Router => Layout::Stored,
                Role::Embedding if layout.is_quantized() => Layout::Stored,
                Role::Attention | Role::Output if layout == Layout::Q4 => Layout::Q8,
                Role::Embedding | Role::Attention | Role::Experts | Role::Ffn | Role::Output => layout,
            }),
        }
    }

    /// The layout for a role; that of the experts which are not chosen often, when they have bits by heat.
    pub fn layout(&self, role: Role) -> Layout {
        self.layouts[role as usize]
    }

    /// Whether experts have bits by heat (`experts=auto`): those that are chosen often are [`QuantConfig::HOT`], the others [`QuantConfig::COLD`].
    pub fn by_heat(&self) -> bool {
        self.by_heat
    }

    /// The layout of experts that are worth it.
    pub const HOT: Layout = Layout::Q8;

    /// The layout of the other experts.
    pub const COLD: Layout = Layout::Q4;

    /// Sets the layout for a role.
    pub fn set(&mut self, role: Role, layout: Layout) -> Result<(), QuantError> {
        let allowed = match role {
            Role::Norm | Role::Bias if !matches!(layout, Layout::Stored | Layout::F32) => {
                "norms and biases are always f32"
            }
            Role::Embedding | Role::Router if layout.is_quantized() => "use none, f32, bf16 or f16",
            _ => {
                let vector = matches!(role, Role::Norm | Role::Bias);
                self.by_heat &= role != Role::Experts;
                self.layouts[role as usize] = if vector { Layout::F32 } else { layout };
                return Ok(());
            }
        };
        Err(QuantError::NotForRole { role, layout, allowed })
    }

    /// Gives every weight of `graph` its role's layout, and `hot` experts theirs.
    pub fn assign_with(&self, graph: &mut Graph, hot: Option<&HotExperts>) {
        self.assign(graph);
        if let Some(hot) = hot {
            hot.assign(graph);
        }
    }

    /// Gives every weight of `graph` its role's layout.
    pub fn assign(&self, graph: &mut Graph) {
        let spread = spread(graph);
        let all: Vec<_> = graph.weights().map(|(id, weight)| (id, weight.role, weight.stored)).collect();
        for (id, role, stored) in all {
            let vector = matches!(role, Role::Norm | Role::Bias | Role::Router);
            graph.weight_mut(id).layout = match (self.layout(role), stored) {
                (Layout::Stored, DType::Codes(exact)) if !vector && !spread.contains(&id) => exact,
                (Layout::Stored, DType::Codes(_) | DType::Packed) => nearest(role),
                (layout, _) => layout,
            };
        }
    }
}

/// Weights whose columns are heads that are padded in memory: their blocks do not stay together, so no layout keeps them.
fn spread(graph: &Graph) -> Vec<WeightId> {
    let padded = |node| {
        let op = graph.op(node);
        let &Op::Attention { head_dim, .. } = graph.definition(*op.values().first()?) else { return None };
        op.weight().filter(|_| padded_head_dim(head_dim) != head_dim)
    };
    graph.nodes().filter_map(padded).collect()
}

/// The layout for a weight that is to stay as it is stored, but is stored in a format that no kernel computes with: the next wider one.
fn nearest(role: Role) -> Layout {
    match role {
        Role::Embedding | Role::Norm | Role::Bias | Role::Router => Layout::F32,
        Role::Attention | Role::Experts | Role::Ffn | Role::Output => Layout::Q8,
    }
}

impl Default for QuantConfig {
    fn default() -> QuantConfig {
        QuantConfig::all(Layout::Q8)
    }
}

fn layout(text: &str) -> Result<Layout, QuantError> {
    if text == AUTO {
        return Err(QuantError::Auto);
    }
    let found = match text {
        "none" => Some(Layout::Stored),
        "stored" => None,
        _ => Layout::from_name(text).filter(|layout| !layout.is_exact()),
    };
    found.ok_or_else(|| QuantError::Layout(text.into()))
}

/// What experts with bits by heat are called.
const AUTO: &str = "auto";

impl FromStr for QuantConfig {
    type Err = QuantError;

    /// `q4`, `experts=q4,attention=q8`, or `q4,output=q8`: one layout for all roles that are not named, q8 without one. `experts=auto` is bits by
    /// heat.
    fn from_str(text: &str) -> Result<QuantConfig, QuantError> {
        let mut base = None;
        let mut roles = Vec::new();
        for item in text.split(',').map(str::trim) {
            match item.split_once('=') {
                None if base.is_some() => return Err(QuantError::Twice("the layout for all".into())),
                None => base = Some(layout(item)?),
                Some((name, value)) => {
                    let (name, value) = (name.trim(), value.trim());
                    let role = Role::from_name(name).ok_or_else(|| QuantError::Role(name.into()))?;
                    let value = match (role, value) {
                        (Role::Experts, AUTO) => None,
                        _ => Some(layout(value)?),
                    };
                    if roles.iter().any(|(other, _)| *other == role) {
                        return Err(QuantError::Twice(role.to_string()));
                    }
                    roles.push((role, value));
                }
            }
        }
        let mut config = QuantConfig::all(base.unwrap_or(Layout::Q8));
        for (role, layout) in roles {
            config.set(role, layout.unwrap_or(QuantConfig::COLD))?;
            config.by_heat |= layout.is_none();
        }
        Ok(config)
    }
}

impl fmt::Display for QuantConfig {
    /// `embedding=none,norm=f32,…`: parses back to the same.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, role) in Role::ALL.into_iter().enumerate() {
            let layout = match self.layout(role) {
                _ if role == Role::Experts && self.by_heat => AUTO,
                Layout::Stored => "none",
                layout => layout.name(),
            };
            write!(f, "{}{role}={layout}", if i == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<QuantConfig, String> {
        text.parse().map_err(|e: QuantError| e.to_string())
    }

    #[test]
    fn one_word_is_for_all_that_can_have_it() {
        let q4 = parse("q4").unwrap();
        assert_eq!(
            q4.to_string(),
            "embedding=none,norm=f32,bias=f32,attention=q8,router=none,experts=q4,ffn=q4,output=q8"
        );
        let bf16 = parse("bf16").unwrap();
        assert_eq!(
            bf16.to_string(),
            "embedding=bf16,norm=f32,bias=f32,attention=bf16,router=none,experts=bf16,ffn=bf16,output=bf16"
        );
        assert_eq!(parse("none").unwrap().layout(Role::Experts), Layout::Stored);
    }

    #[test]
    fn roles_override_it_and_it_prints_back() {
        let mixed = parse("experts=q4, attention=f16").unwrap();
        assert_eq!(mixed.layout(Role::Experts), Layout::Q4);
        assert_eq!(mixed.layout(Role::Attention), Layout::F16);
        assert_eq!(mixed.layout(Role::Output), Layout::Q8);
        assert_eq!(parse(&mixed.to_string()).unwrap(), mixed);
        assert_eq!(parse("output=q8,q4").unwrap().layout(Role::Ffn), Layout::Q4);
        let auto = parse("experts=auto,q4").unwrap();
        assert!(auto.by_heat() && !mixed.by_heat());
        assert_eq!((auto.layout(Role::Experts), auto.layout(Role::Output)), (Layout::Q4, Layout::Q8));
        assert_eq!(parse(&auto.to_string()).unwrap(), auto);
    }

    #[test]
    fn mistakes_are_named() {
        assert_eq!(parse("q5").unwrap_err(), "--quant: `q5` is none of none, f32, bf16, f16, q8, q4");
        assert_eq!(parse("q4_0").unwrap_err(), "--quant: `q4_0` is none of none, f32, bf16, f16, q8, q4");
        assert_eq!(parse("").unwrap_err(), "--quant: `` is none of none, f32, bf16, f16, q8, q4");
        assert!(parse("expert=q4").unwrap_err().contains("`expert` is none of the roles embedding, norm"));
        for text in ["auto", "q4,ffn=auto"] {
            assert!(parse(text).unwrap_err().starts_with("--quant: only experts can be `auto`"), "{text}");
        }
        assert_eq!(parse("experts=q4,experts=q8").unwrap_err(), "--quant: experts is given twice");
        assert_eq!(parse("q4,q8").unwrap_err(), "--quant: the layout for all is given twice");
        assert!(parse("router=q8").unwrap_err().contains("weights for router cannot be q8; use none"));
        assert!(parse("norm=f16").unwrap_err().contains("norms and biases are always f32"));
    }
}
