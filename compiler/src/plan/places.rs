//! Where the matrices of a layer's experts lie: in which order, and in one format or in two.
//!
//! A weight whose experts lie in two formats ([`Exception`]) is two items of the payload, each with matrices of one format: the exception's first, under the weight's name with
//! the layout's behind it, then the others. A table of the payload gives each expert its *place* in its layer: those of the exception have the
//! first places, so that a place says which of the items a matrix is in and where. In each item the experts that are chosen most come first, when a
//! profile says which these are. Where a stage does not know the expert before it runs, it switches by place: [`by_format`] has a case for each format, with
//! kernels and tuning of their own. Both formats meet the same rows, quantized once. Models without such weights have no table, no switch and
//! the plans that they would have without this file.
//!
//! Deliberately absent: which experts are to have which format ([`crate::expert_bits`]), and the products themselves ([`super::products`]).

use super::layout::Format;
use super::payload::PayloadItem;
use super::planner::Planner;
use super::products::Product;
use super::program::{Action, Expr, StageExperts};
use super::stages::WORD;
use super::{ModelShape, PlanError};
use moec_ir::graph::{Exception, Graph, Weight};

/// For each layer its experts in the order of their places; `None` when that is their own everywhere.
///
/// # Errors
/// When the weights of a layer differ in which experts are exceptions.
pub(super) fn order(graph: &Graph, shape: &ModelShape) -> Result<Option<Vec<Vec<usize>>>, PlanError> {
    let mut layers: Vec<Option<&[usize]>> = Vec::new();
    for (node, choice) in graph.nodes_by_choice() {
        let Some(choice) = choice else { continue };
        if layers.len() <= choice {
            layers.push(None);
        }
        let weight = graph.op(node).weight().map(|id| graph.weight(id));
        let Some(weight) = weight.filter(|weight| weight.experts() > 1) else { continue };
        let layer = &mut layers[choice];
        let own = weight.exception.as_ref().map_or(&[][..], |exception| &exception.experts);
        if *layer.get_or_insert(own) != own {
            let what = format!("experts of one layer that lie in two formats in @{} only", weight.name);
            return Err(PlanError::Unsupported(what));
        }
    }
    let mixed = layers.iter().any(|layer| layer.is_some_and(|experts| !experts.is_empty()));
    if shape.heat.is_none() && !mixed {
        return Ok(None);
    }
    let of_layer = |(layer, first): (usize, Option<&[usize]>)| {
        let mut order = match &shape.heat {
            Some(heat) => heat.order(layer),
            None => (0..shape.experts).collect(),
        };
        // Stable, so that both parts stay in order.
        order.sort_by_key(|expert| !first.is_some_and(|first| first.contains(expert)));
        order
    };
    Ok(Some(layers.into_iter().enumerate().map(of_layer).collect()))
}

/// The items that a weight becomes whose experts would all lie in `item`.
pub(super) fn divide(item: PayloadItem, weight: &Weight) -> Vec<PayloadItem> {
    let Some(Exception { layout, experts }) = &weight.exception else { return vec![item] };
    let (first, rest): (Vec<usize>, Vec<usize>) = item.members().into_iter().partition(|e| experts.contains(e));
    let name = format!("{}.{layout}", item.name);
    let format = Format::of(*layout).expect("the layout of an exception is resolved");
    let first = PayloadItem { name, format, experts: first.len(), order: Some(first), ..item.clone() };
    vec![first, PayloadItem { experts: rest.len(), order: Some(rest), ..item }]
}

/// How many of an item's matrices a token meets, on average.
pub(super) fn matrices_of_a_token(item: &PayloadItem, shape: &ModelShape) -> f64 {
    match item.router {
        None => 1.0,
        Some(layer) => item.members().into_iter().map(|expert| shape.chance(layer, expert)).sum(),
    }
}

/// What the experts of `items`, all those of a weight, cost a stage.
pub(super) fn of_stage(items: &[&PayloadItem], shape: &ModelShape) -> StageExperts {
    let layer = items[0].router.expect("a weight with experts");
    let count = items.iter().map(|item| item.experts).sum();
    let mut bytes = vec![0; count];
    for item in items {
        let matrix = item.padded_rows() / moec_abi::LANES * item.tile_bytes();
        item.members().into_iter().for_each(|expert| bytes[expert] = matrix);
    }
    let of_item = |item: &&PayloadItem| matrices_of_a_token(item, shape);
    let first_share = (items.len() > 1).then(|| of_item(&items[0]) / items.iter().map(of_item).sum::<f64>());
    StageExperts { layer, bytes, chances: (0..count).map(|e| shape.chance(layer, e)).collect(), first_share }
}

/// Where an expert's matrix lies.
pub(super) struct Matrix {
    /// Which of the products it is in; constant when there is one.
    pub product: Expr,
    /// Its address, were it in the first, the second, …
    pub address: Vec<Expr>,
}

/// The matrix of an expert in the products with a weight, by the layer's table of `places` if there is one.
pub(super) fn matrix(
    planner: &mut Planner,
    actions: &mut Vec<Action>,
    products: &[Product],
    places: Option<&Expr>,
    expert: Expr,
) -> Matrix {
    let place = match places {
        None => expert,
        Some(table) => (table.clone() + expert * WORD).load_u32(),
    };
    let [first, second] = products else {
        return Matrix { product: Expr::Int(0), address: vec![products[0].matrix(place)] };
    };
    let place = planner.bind(actions, place);
    let product = (place.clone().max(first.experts - 1) - (first.experts - 1)).min(1i64);
    Matrix { product, address: vec![first.matrix(place.clone()), second.matrix(place - first.experts)] }
}

/// Does the one of `cases` that is for the product that a matrix is in.
pub(super) fn by_format(actions: &mut Vec<Action>, product: Expr, mut cases: Vec<Vec<Action>>) {
    if cases.len() == 1 {
        actions.append(&mut cases[0]);
    } else {
        actions.push(Action::Switch { on: product, cases });
    }
}
