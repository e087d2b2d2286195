//! Whether choices that are faster alone make whole steps faster: the last word on what a record keeps.
//!
//! A product alone meets a machine that does nothing else; in a step its activations were just written, its neighbours fill the caches, and all wait for the
//! last thread. So steps of a model's first layers, written by the default and by all that was chosen, take turns ([`super::steps`]). If no length of a step is
//! slower twice, all stays. Otherwise choices are added one by one to those that have proved themselves: one stays if it makes a step faster and none slower.
//! What is left in the end is compared with the default as a whole once more, and if that is slower anywhere, the default stays. Deliberately absent: a search
//! for choices, which are those of [`super::search`].

use super::TuneError;
use super::contest::{Ended, Ratio, TURNS, duel, median};
use super::limits::Limits;
use super::products::Product;
use super::search::{Found, STEPS, merged};
use super::steps::Steps;
use super::weights::Weights;
use super::workload::beyond_caches;
use crate::pipeline::BuildError;
use crate::plan::Plan;
use crate::target::machine::{Machine, available_memory};
use crate::target::{CpuLevel, ProductShape, Tuning};
use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::rc::Rc;
use std::time::Instant;

/// Seconds that the longest step may take by the machine's limits: so many layers are in it, one at least.
const STEP_SECONDS: f64 = 0.75;

/// A step that takes so many seconds is long against all disturbances but those that last …
const LONG_SECONDS: f64 = 0.1;

/// … and needs fewer turns.
const LONG_TURNS: RangeInclusive<usize> = 9..=21;

/// Turns of a step that has no rival, and is measured to be known.
const ALONE_TURNS: usize = 5;

/// Plans the first so many layers of a model, with a level for each of some choices.
pub type FirstLayers<'a> = dyn Fn(usize, &[Tuning]) -> Result<Plan, BuildError> + 'a;

/// What a step of so many tokens takes.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct StepTime {
    /// Tokens.
    pub tokens: usize,
    /// Seconds without the record.
    pub default: f64,
    /// Seconds with it.
    pub tuned: f64,
}

/// Whole steps, as measured in the end.
#[derive(Clone, PartialEq, Debug)]
pub struct WholeSteps {
    /// Layers that they went through.
    pub layers: usize,
    /// For each length what it takes.
    pub measured: Vec<StepTime>,
}

/// A choice that stays or goes by itself.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Part {
    /// Of the products of this shape …
    pub shape: ProductShape,
    /// … the kernel of a single token, or all the rest.
    pub single: bool,
}

impl Part {
    /// Whether steps of so many tokens can tell. In short prompts some experts meet a single token.
    fn matters_to(self, tokens: usize) -> bool {
        if self.single { tokens <= 16 } else { tokens > 1 }
    }
}

/// The parts of what was found for `products` that differ from the default.
pub fn parts(products: &[Product], default: &Tuning, found: &BTreeMap<ProductShape, Found>) -> Vec<Part> {
    let mut parts = Vec::new();
    for Product { shape, .. } in products {
        let Some(Found { tuning, .. }) = found.get(shape) else { continue };
        let default = default.product(*shape);
        let differs = |single: &bool| merged(&default, tuning, *single, !single) != default;
        parts.extend([true, false].into_iter().filter(differs).map(|single| Part { shape: *shape, single }));
    }
    parts
}

/// The default with those of the `parts` of what was found that are `taken`.
fn with_parts(default: &Tuning, found: &BTreeMap<ProductShape, Found>, parts: &[Part], taken: &[bool]) -> Tuning {
    let mut tuning = default.clone();
    for (part, _) in parts.iter().zip(taken).filter(|(_, taken)| **taken) {
        let (now, best) = (tuning.product(part.shape), &found[&part.shape].tuning);
        tuning.products.insert(part.shape, merged(&now, best, part.single, !part.single));
    }
    tuning
}

/// Two ways of a step, compared.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Compared {
    /// Seconds of the first.
    pub seconds: f64,
    /// What the second takes of it.
    pub ratio: Ratio,
}

/// What came of a trial.
#[derive(Clone, PartialEq, Debug)]
pub struct Verdict {
    /// For each part whether it stays.
    pub kept: Vec<bool>,
    /// The default and what is kept.
    pub measured: Vec<StepTime>,
}

/// Which of the `parts` stay, out of comparing steps of so many tokens: `compare` gets two selections of parts.
///
/// # Errors
/// When comparing fails.
fn decide<E>(
    parts: &[Part],
    steps: &[usize],
    compare: &mut impl FnMut(&[bool], &[bool], usize) -> Result<Compared, E>,
) -> Result<Verdict, E> {
    let none = vec![false; parts.len()];
    let (all, loses) = against_default(vec![true; parts.len()], steps, false, compare)?;
    if !loses {
        return Ok(all);
    }
    let mut kept = none.clone();
    for (at, part) in parts.iter().enumerate() {
        let mut with = kept.clone();
        with[at] = true;
        if with.iter().all(|taken| *taken) {
            // All have lost together.
            break;
        }
        let (mut wins, mut loses) = (false, false);
        for &tokens in steps.iter().filter(|&&tokens| part.matters_to(tokens)) {
            let ratio = compare(&kept, &with, tokens)?.ratio;
            wins |= ratio.wins();
            loses = ratio.loses();
            if loses {
                break;
            }
        }
        if wins && !loses {
            kept = with;
        }
    }
    let (verdict, loses) = against_default(kept, steps, true, compare)?;
    if !loses {
        return Ok(verdict);
    }
    let measured = verdict.measured.into_iter().map(|step| StepTime { tuned: step.default, ..step }).collect();
    Ok(Verdict { kept: none, measured })
}

/// What `steps` take with the parts that are `kept` and without, and whether one loses: what loses is compared once more, since among many comparisons one is
/// off by chance. With `all` the others are measured even then.
fn against_default<E>(
    kept: Vec<bool>,
    steps: &[usize],
    all: bool,
    compare: &mut impl FnMut(&[bool], &[bool], usize) -> Result<Compared, E>,
) -> Result<(Verdict, bool), E> {
    let none = vec![false; kept.len()];
    let (mut measured, mut loses) = (Vec::new(), false);
    for &tokens in steps {
        let mut compared = compare(&none, &kept, tokens)?;
        if compared.ratio.loses() {
            compared = compare(&none, &kept, tokens)?;
        }
        let Compared { seconds, ratio } = compared;
        measured.push(StepTime { tokens, default: seconds, tuned: seconds * ratio.median });
        loses |= ratio.loses();
        if loses && !all {
            break;
        }
    }
    Ok((Verdict { kept, measured }, loses))
}

/// The layers of `plan` that make a step of the longest prompt take no longer than it should.
pub fn layers(plan: &Plan, limits: &Limits) -> usize {
    let all = plan.model.layers.max(1);
    let tokens = STEPS.map(|tokens| tokens.min(plan.model.max_tokens)).into_iter().max().unwrap_or(1);
    let adds = (plan.costs.multiply_adds_per_token / all * tokens) as f64;
    let one = limits.seconds(plan.costs.integer_dot_products, adds, 0.0);
    ((STEP_SECONDS / one) as usize).clamp(1, all)
}

/// A trial to come.
pub struct Trial<'a> {
    /// Plans the layers.
    pub first_layers: &'a FirstLayers<'a>,
    /// How many of them.
    pub layers: usize,
    /// For which level.
    pub level: CpuLevel,
    /// Threads that work together.
    pub threads: usize,
    /// How kernels are written without the record.
    pub default: &'a Tuning,
    /// What the record has.
    pub found: &'a BTreeMap<ProductShape, Found>,
    /// What of it is on trial.
    pub parts: &'a [Part],
    /// When it must end.
    pub until: Instant,
    /// Told the tokens of the step that is measured, and what share of the trial is behind it at least.
    pub progress: &'a dyn Fn(usize, f64),
}

impl Trial<'_> {
    /// Decides.
    ///
    /// # Errors
    /// When the time ends before, or the steps cannot be run.
    pub fn run(&self) -> Result<Verdict, Ended<TuneError>> {
        let first = self.plan(std::slice::from_ref(self.default))?;
        let steps: Vec<usize> = STEPS.into_iter().filter(|&tokens| tokens <= first.model.max_tokens).collect();
        let weights = Rc::new(Weights::new(&first.payload, available_memory(), beyond_caches(&Machine::this()))?);
        drop(first);
        let at_most = 2 * steps.len() + self.parts.iter().map(|part| of_part(*part, &steps)).sum::<usize>();
        let mut done = 0;
        let mut ready: Option<(Vec<bool>, Vec<bool>, Steps)> = None;
        let mut compare = |ours: &[bool], others: &[bool], tokens: usize| {
            (self.progress)(tokens, (done as f64 / at_most as f64).min(1.0));
            done += 1;
            let steps = match &mut ready {
                Some((first, second, steps)) if first == ours && second == others => steps,
                _ => {
                    let both = [ours, others].map(|taken| with_parts(self.default, self.found, self.parts, taken));
                    let steps = Steps::new(self.plan(&both)?, self.level, self.threads, weights.clone())?;
                    &mut ready.insert((ours.to_vec(), others.to_vec(), steps)).2
                }
            };
            self.compare(steps, tokens, ours == others)
        };
        decide(self.parts, &steps, &mut compare)
    }

    /// The layers, written in each of these ways.
    fn plan(&self, tunings: &[Tuning]) -> Result<Plan, TuneError> {
        (self.first_layers)(self.layers, tunings).map_err(|error| TuneError::Plan(Box::new(error)))
    }

    /// Compares the two ways of `steps`; when they are the `same`, one is measured.
    fn compare(&self, steps: &mut Steps, tokens: usize, same: bool) -> Result<Compared, Ended<TuneError>> {
        let mut times = Vec::new();
        if same {
            for _ in 0..ALONE_TURNS {
                if Instant::now() >= self.until {
                    return Err(Ended::Time);
                }
                times.push(steps.run(0, tokens).as_secs_f64());
            }
            return Ok(Compared { seconds: median(&mut times), ratio: Ratio { median: 1.0, error: 0.0 } });
        }
        if Instant::now() >= self.until {
            return Err(Ended::Time);
        }
        let long = steps.run(0, tokens).as_secs_f64() >= LONG_SECONDS;
        let mut run = |way: usize| {
            let took = steps.run(way, tokens);
            if way == 0 {
                times.push(took.as_secs_f64());
            }
            Ok::<_, TuneError>(took)
        };
        let ratio = duel(1, if long { LONG_TURNS } else { TURNS }, self.until, &mut run)?;
        Ok(Compared { seconds: median(&mut times), ratio })
    }
}

/// How many of `steps` a part matters to.
fn of_part(part: Part, steps: &[usize]) -> usize {
    steps.iter().filter(|&&tokens| part.matters_to(tokens)).count()
}

/// Gives up what was `found` of the `parts` that are not `kept`: the default takes its place, and what it is worth is nothing more. How many parts these were.
pub fn give_up(found: &mut BTreeMap<ProductShape, Found>, default: &Tuning, parts: &[Part], kept: &[bool]) -> usize {
    let gone = || parts.iter().zip(kept).filter(|(_, kept)| !**kept).map(|(part, _)| part);
    for part in gone() {
        let found = found.get_mut(&part.shape).expect("parts are of what was found");
        // What stays is the other part.
        found.tuning = merged(&default.product(part.shape), &found.tuning, !part.single, part.single);
        for measured in found.measured.iter_mut().filter(|m| (m.step == 1) == part.single) {
            measured.tuned_share = measured.default_share;
        }
    }
    gone().count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Epilogue;
    use crate::plan::layout::Format;
    use rand::{Rng, SeedableRng};
    use rand_xoshiro::Xoshiro256PlusPlus;
    use std::convert::Infallible;
    use std::time::Duration;

    const fn shape(k: usize) -> ProductShape {
        ProductShape { format: Format::Q4, k, epilogue: Epilogue::Store }
    }

    const SHAPES: [ProductShape; 2] = [shape(64), shape(128)];

    fn all_parts() -> Vec<Part> {
        SHAPES.into_iter().flat_map(|shape| [true, false].map(|single| Part { shape, single })).collect()
    }

    /// What is decided where a step of 10 ms takes `factor` (of part and tokens) times as long with each part, on a machine with jitter of 2 % and stretches
    /// that are slower by up to 30 %.
    fn decided(factor: impl Fn(usize, usize) -> f64, seed: u64) -> Verdict {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
        let (mut slow, mut left) = (1.0, 0);
        let mut compare = |ours: &[bool], others: &[bool], tokens: usize| {
            let time = |taken: &[bool]| {
                taken
                    .iter()
                    .enumerate()
                    .filter(|(_, taken)| **taken)
                    .map(|(part, _)| factor(part, tokens))
                    .product::<f64>()
            };
            let both = [time(ours), time(others)];
            let mut run = |way: usize| {
                if left == 0 {
                    (slow, left) = (random.random_range(1.0..1.3), random.random_range(5..40));
                }
                left -= 1;
                let jitter: f64 = random.random_range(0.98..1.02);
                Ok::<_, Infallible>(Duration::from_secs_f64(0.01 * both[way] * slow * jitter))
            };
            let ratio = match ours == others {
                true => Ratio { median: 1.0, error: 0.0 },
                false => duel(1, TURNS, Instant::now() + Duration::from_secs(60), &mut run).expect("there is time"),
            };
            Ok::<_, Infallible>(Compared { seconds: 0.01 * both[0], ratio })
        };
        decide(&all_parts(), &STEPS, &mut compare).unwrap_or_else(|never| match never {})
    }

    #[test]
    fn what_is_slower_in_no_step_stays_at_once() {
        for seed in 0..20 {
            let verdict = decided(|part, tokens| if part == 0 && tokens == 1 { 0.9 } else { 1.0 }, seed);
            // Gone through one by one, those that win nowhere would not stay.
            assert_eq!(verdict.kept, [true; 4], "seed {seed}");
            let StepTime { tokens, default, tuned } = verdict.measured[0];
            assert_eq!((tokens, default), (1, 0.01));
            assert!((tuned / default - 0.9).abs() < 0.02, "{tuned}");
        }
    }

    #[test]
    fn a_choice_that_loses_in_whole_steps_is_given_up() {
        for seed in 0..20 {
            // The rest of the first shape is faster in long prompts and slower in short ones; that of the second is faster in all.
            let factor = |part: usize, tokens: usize| match (part, tokens) {
                (0, 1) => 0.95,
                (1, 64) => 1.12,
                (1, 512) => 0.9,
                (3, 16..) => 0.95,
                _ => 1.0,
            };
            let verdict = decided(factor, seed);
            assert_eq!(verdict.kept, [true, false, false, true], "seed {seed}");
            assert!(verdict.measured.iter().all(|step| step.tuned < 1.01 * step.default), "{:?}", verdict.measured);
        }
    }

    #[test]
    fn what_helps_nowhere_is_not_kept_beside_a_loser() {
        let verdict = decided(|part, tokens| if part == 2 && tokens == 1 { 1.1 } else { 1.0 }, 0);
        assert_eq!(verdict.kept, [false; 4]);
        assert!(verdict.measured.iter().all(|step| step.tuned == step.default), "{:?}", verdict.measured);
    }

    #[test]
    fn parts_that_only_lose_together_leave_the_default() {
        let parts = all_parts();
        let ratio = |median| Ratio { median, error: 0.001 };
        // Each is faster beside what was accepted before it, and all that were accepted are slower than nothing.
        let mut compare = |ours: &[bool], others: &[bool], _: usize| {
            let taken = |of: &[bool]| of.iter().filter(|taken| **taken).count();
            let median = if taken(others) > taken(ours) + 1 { 1.1 } else { 0.9 };
            Ok::<_, Infallible>(Compared { seconds: 0.01, ratio: ratio(median) })
        };
        let verdict = decide(&parts, &STEPS, &mut compare).unwrap_or_else(|never| match never {});
        assert_eq!(verdict.kept, [false; 4]);
        assert!(verdict.measured.iter().all(|step| step.tuned == step.default), "{:?}", verdict.measured);
    }

    #[test]
    fn choices_are_taken_and_given_up_in_parts() {
        use crate::kernels::MatmulTuning;
        use crate::target::ProductTuning;
        use crate::tune::search::Measured;
        let default = Tuning::NARROW;
        let single = MatmulTuning { tiles: 8, ..MatmulTuning::plain(Format::Q4) };
        let tuning = ProductTuning { kernels: vec![single; 3], block: 9, ..default.product(SHAPES[0]) };
        let measured = |step| Measured { step, tokens: step, default_share: 0.5, tuned_share: 0.6 };
        let before = Found { tuning: tuning.clone(), measured: vec![measured(1), measured(16)] };
        let found: BTreeMap<ProductShape, Found> = [(SHAPES[0], before)].into();
        let parts = [true, false].map(|single| Part { shape: SHAPES[0], single });
        assert_eq!(with_parts(&default, &found, &parts, &[true, true]).product(SHAPES[0]), tuning);
        assert_eq!(with_parts(&default, &found, &parts, &[false, false]), default);
        for (at, part) in parts.iter().enumerate() {
            let taken = [at == 0, at == 1];
            let mut kept = found.clone();
            assert_eq!(give_up(&mut kept, &default, &parts, &taken), 1);
            let kept = &kept[&SHAPES[0]];
            assert_eq!(with_parts(&default, &found, &parts, &taken).product(SHAPES[0]), kept.tuning);
            assert_eq!(kept.tuning.kernels[0] == single, part.single);
            assert_eq!(kept.tuning.block == 9, !part.single);
            let shares: Vec<f64> = kept.measured.iter().map(|m| m.tuned_share).collect();
            assert_eq!(shares, if part.single { [0.6, 0.5] } else { [0.5, 0.6] });
        }
    }
}
