//! A report as sections of words, tables and bars: what Markdown and HTML have in common.
//!
//! Deliberately absent: marks of either language.

use super::experts;
use super::measured::{Compared, Comparison, Phase};
use super::units::{bytes, count, percent, plural, seconds};
use super::{Kind, Level, Program, Report};

/// How a column is set.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Align {
    /// Words.
    Left,
    /// Numbers.
    Right,
}

/// Rows of cells.
pub struct Table {
    /// What it is.
    pub caption: String,
    /// Names of columns.
    pub columns: Vec<(&'static str, Align)>,
    /// A cell for each column.
    pub rows: Vec<Vec<String>>,
    /// Whether the last row is the sum of those before it.
    pub sum: bool,
}

/// A bar of parts.
pub struct Bar {
    /// What it is.
    pub label: String,
    /// The whole, for people.
    pub whole: String,
    /// Names and sizes.
    pub parts: Vec<(String, f64)>,
}

impl Bar {
    /// The size of all parts.
    pub fn size(&self) -> f64 {
        self.parts.iter().map(|(_, size)| size).sum()
    }
}

/// Bars that are drawn under each other, to one scale.
pub struct Chart {
    /// What is drawn.
    pub bars: Vec<Bar>,
    /// How sizes are written.
    pub unit: fn(f64) -> String,
}

/// A field for each of many numbers, the darker the larger.
pub struct Map {
    /// What it is.
    pub caption: String,
    /// Names of the rows, and their fields.
    pub rows: Vec<(String, Vec<Field>)>,
}

/// A number in a map.
pub struct Field {
    /// From 0 to 1, the largest of the map.
    pub share: f64,
    /// Whether it has a frame.
    pub framed: bool,
    /// What it says to whom points at it.
    pub words: String,
}

/// A part of the page.
#[derive(Default)]
pub struct Section {
    /// Its heading.
    pub title: String,
    /// Sentences.
    pub words: Vec<String>,
    /// Pictures.
    pub charts: Vec<Chart>,
    /// Pictures of many numbers.
    pub maps: Vec<Map>,
    /// Tables.
    pub tables: Vec<Table>,
}

/// A number that matters most.
pub struct Figure {
    /// What it is.
    pub name: &'static str,
    /// The number.
    pub value: String,
    /// More about it.
    pub note: String,
}

/// The heading of the page.
pub fn title(report: &Report) -> String {
    format!("{} by moec {}", report.model.name, report.moec)
}

/// What it is, in a line.
pub fn subtitle(report: &Report) -> String {
    let m = &report.model;
    let experts = match m.experts {
        0 => format!("FFN of {}", m.ffn),
        n => format!("{} of {n} experts of {}", m.experts_per_token, m.ffn),
    };
    format!(
        "{}, {} parameters: {}, {} wide, {experts}, {} heads over {} of keys and values, vocabulary of {}",
        m.architecture,
        count(m.parameters as f64),
        plural(m.layers, "layer"),
        m.hidden,
        m.heads,
        m.kv_heads,
        m.vocab
    )
}

/// The most important numbers.
pub fn figures(report: &Report) -> Vec<Figure> {
    let mut figures = Vec::new();
    if let Some(output) = &report.output {
        let note = if output.copied { "weights of an earlier build" } else { "weights packed anew" };
        figures.push(Figure { name: "Written", value: bytes(output.bytes as f64), note: note.to_string() });
    }
    let level = report.measured.as_ref().map_or(0, |m| m.level);
    for (name, decode) in [("Decode", true), ("Prefill", false)] {
        let Some(level) = report.levels.get(level) else { continue };
        let program = if decode { &level.decode } else { &level.batch };
        let Some(step) = program.step else { continue };
        let rate = |seconds: f64| format!("{:.1} tokens/s", step.tokens as f64 / seconds);
        let what = if decode { format!("after {} tokens", step.depth) } else { plural(step.tokens, "token") };
        let phase = report.measured.as_ref().map(|m| if decode { &m.decode } else { &m.prefill });
        figures.push(match phase {
            Some(phase) => Figure {
                name: if decode { "Decode, measured" } else { "Prefill, measured" },
                value: rate(phase.measured),
                note: format!("{what}; predicted {}", rate(phase.predicted)),
            },
            None => Figure { name, value: rate(step.seconds), note: format!("{what}, predicted for {}", level.name) },
        });
    }
    let token = &report.token;
    figures.push(Figure {
        name: "A token reads",
        value: bytes(token.weight_bytes as f64),
        note: format!("{} multiply-adds", count((token.multiply_adds + token.multiply_adds_per_logit_row) as f64)),
    });
    figures.push(Figure {
        name: "Keys and values",
        value: bytes(report.memory.kv_per_token as f64),
        note: format!("a token; {} at {} tokens", bytes(report.memory.kv_at_context as f64), report.model.context),
    });
    figures
}

/// All sections.
pub fn sections(report: &Report) -> Vec<Section> {
    let mut all = Vec::new();
    if let Some(comparison) = &report.measured {
        all.push(measured(report, comparison));
    }
    let predicted = report.levels.iter().filter(|level| level.machine.is_some());
    all.extend(predicted.map(|level| expected(level, report.experts.is_some())));
    all.push(weights(report));
    all.extend(report.experts.as_ref().map(|found| experts::experts(found, report.model.experts_per_token)));
    all.extend(report.scores.as_ref().map(experts::scores));
    all.push(memory(report));
    all.extend(report.levels.iter().map(code));
    all.push(passes(report));
    all
}

/// How measured and predicted were made comparable, in a sentence.
pub fn told(report: &Report, comparison: &Comparison) -> String {
    let Comparison { source, level, read, read_scale, compute_scale, .. } = comparison;
    let rest = match report.levels.get(*level).and_then(|level| level.machine.as_ref()) {
        Some(machine) if machine.full => format!("and multiplied {} as fast", times(*compute_scale)),
        _ => "and is taken to multiply as fast, since the benchmark's peak is of other instructions".to_string(),
    };
    format!(
        "{source}: the machine read {:.1} GB/s in that run, {} as fast as when the prediction was made, {rest}; predictions are scaled by that.",
        read / 1e9,
        times(*read_scale)
    )
}

fn times(scale: f64) -> String {
    format!("{scale:.2} times")
}

/// Predicted and measured of one phase.
pub fn compared(phase: &Phase, what: &str) -> Table {
    let row = |name: &str, predicted: f64, measured: f64, ratio: f64| {
        let much = predicted >= 0.01 * phase.predicted || measured >= 0.01 * phase.measured;
        let ratio = if much { format!("{ratio:.2}") } else { "–".to_string() };
        vec![name.to_string(), seconds(predicted), seconds(measured), ratio]
    };
    let mut rows: Vec<Vec<String>> =
        phase.kinds.iter().map(|kind| row(&kind.operations, kind.predicted, kind.measured, kind.ratio())).collect();
    rows.push(row("all together", phase.predicted, phase.measured, phase.ratio()));
    Table {
        caption: format!("{what} of {}", plural(phase.tokens, "token")),
        columns: vec![
            ("operations", Align::Left),
            ("predicted", Align::Right),
            ("measured", Align::Right),
            ("ratio", Align::Right),
        ],
        rows,
        sum: true,
    }
}

fn measured(report: &Report, comparison: &Comparison) -> Section {
    let [decode, prefill] = [("Decode", &comparison.decode), ("Prefill", &comparison.prefill)];
    let charts = [decode, prefill].into_iter().filter(|(_, phase)| !phase.kinds.is_empty()).map(|(what, phase)| {
        let bar = |name: &str, whole: f64, pick: fn(&Compared) -> f64| Bar {
            label: format!("{what}, {name}"),
            whole: seconds(whole),
            parts: phase.kinds.iter().map(|kind| (kind.operations.clone(), pick(kind))).collect(),
        };
        let predicted = bar("predicted", phase.predicted, |kind| kind.predicted);
        let measured = bar("measured", phase.measured, |kind| kind.measured);
        Chart { bars: vec![predicted, measured], unit: seconds }
    });
    Section {
        title: "Predicted and measured".to_string(),
        words: vec![
            told(report, comparison),
            "Ratios are measured over predicted, where a kind of stages has at least a hundredth of the time. Stages were timed in a run of their own, which the first \
             one begins by waking the threads; the last row is the median of the other runs."
                .to_string(),
        ],
        charts: charts.collect(),
        tables: [decode, prefill].map(|(what, phase)| compared(phase, what)).into(),
        ..Section::default()
    }
}

fn expected(level: &Level, profiled: bool) -> Section {
    let machine = level.machine.as_ref().expect("only levels with a machine");
    let limits = &machine.target.limits;
    let words = vec![format!(
        "For {} threads of {} ({}): {:.1} GB/s from memory, {} multiply-adds/s of bytes and {} of f32, {} for a barrier. A stage reads its weights and computes at \
         the same time, though not wholly; experts are taken to be chosen {}.",
        machine.target.threads,
        machine.cpu,
        machine.source,
        limits.read / 1e9,
        count(limits.dots),
        count(limits.fmas),
        seconds(limits.barrier),
        if profiled { "as the profile says" } else { "equally often" }
    )];
    let steps = [("Decode", &level.decode), ("Prefill", &level.batch)];
    let chart = |(what, program): (&str, &Program)| {
        let parts = program.kinds.iter().filter_map(|kind| Some((kind.operations.clone(), kind.expected?.seconds())));
        let bar = Bar { label: what.to_string(), whole: seconds(program.step?.seconds), parts: parts.collect() };
        Some(Chart { bars: vec![bar], unit: seconds })
    };
    Section {
        title: format!("Expected times, {}", level.name),
        words,
        charts: steps.into_iter().filter_map(chart).collect(),
        tables: steps.into_iter().filter_map(|(what, program)| expected_table(what, program)).collect(),
        ..Section::default()
    }
}

fn expected_table(what: &str, program: &Program) -> Option<Table> {
    let step = program.step?;
    let row = |kind: &Kind| {
        let e = kind.expected?;
        Some(vec![
            kind.operations.clone(),
            kind.stages.to_string(),
            bytes(e.bytes),
            count(e.multiply_adds),
            seconds(e.reading),
            seconds(e.computing),
            seconds(e.seconds()),
            percent(e.seconds() / step.seconds),
            e.bound().to_string(),
        ])
    };
    let mut rows: Vec<Vec<String>> = program.kinds.iter().filter_map(row).collect();
    let sum = |part: fn(&crate::predict::Expected) -> f64| {
        program.kinds.iter().filter_map(|kind| kind.expected.as_ref().map(part)).sum::<f64>()
    };
    rows.push(vec![
        "all together".to_string(),
        program.stages.to_string(),
        bytes(sum(|e| e.bytes)),
        count(sum(|e| e.multiply_adds)),
        seconds(sum(|e| e.reading)),
        seconds(sum(|e| e.computing)),
        seconds(step.seconds),
        percent(1.0),
        format!("{:.1} tokens/s", step.tokens as f64 / step.seconds),
    ]);
    Some(Table {
        caption: format!("{what} of {} after {}", plural(step.tokens, "token"), step.depth),
        columns: vec![
            ("operations", Align::Left),
            ("stages", Align::Right),
            ("reads", Align::Right),
            ("multiply-adds", Align::Right),
            ("reading", Align::Right),
            ("computing", Align::Right),
            ("together", Align::Right),
            ("share", Align::Right),
            ("bound by", Align::Left),
        ],
        rows,
        sum: true,
    })
}

fn weights(report: &Report) -> Section {
    let rows = report.weights.iter().map(|w| {
        let (error, worst) = match &w.error {
            None => ("not packed yet".to_string(), String::new()),
            Some(loss) if loss.relative_rms == 0.0 => ("none".to_string(), String::new()),
            Some(loss) => (
                format!("{:.2} %", 100.0 * loss.relative_rms),
                format!("{} ({:.2} %)", loss.worst, 100.0 * loss.worst_relative_rms),
            ),
        };
        let bits = format!("{:.2}", 8.0 * w.bytes as f64 / w.count as f64);
        vec![w.role.clone(), w.layout.clone(), count(w.count as f64), bytes(w.bytes as f64), bits, error, worst]
    });
    Section {
        title: "Weights".to_string(),
        words: report.repacked.iter().map(|line| format!("{}.", line.trim())).collect(),
        tables: vec![Table {
            caption: "Sizes, and what storing them lost: √(Σ (weight − stored)² / Σ weight²)".to_string(),
            columns: vec![
                ("role", Align::Left),
                ("as", Align::Left),
                ("number", Align::Right),
                ("size", Align::Right),
                ("bits", Align::Right),
                ("relative RMS error", Align::Right),
                ("worst tensor", Align::Left),
            ],
            rows: rows.collect(),
            sum: false,
        }],
        ..Section::default()
    }
}

fn memory(report: &Report) -> Section {
    let m = &report.memory;
    let threads = report.levels.iter().find_map(|level| Some(level.machine.as_ref()?.target.threads));
    let mut rows: Vec<[String; 3]> = vec![
        ["weights".into(), bytes(m.weights as f64), "mapped from the file, shared by all processes".into()],
        [
            "keys and values, a token".into(),
            bytes(m.kv_per_token as f64),
            format!("taken {} at a time, {}", plural(m.page_tokens as usize, "token"), bytes(m.page as f64)),
        ],
        [
            "keys and values, a full context".into(),
            bytes(m.kv_at_context as f64),
            plural(report.model.context, "token"),
        ],
        ["scratch".into(), bytes(m.scratch as f64), "shared by all threads".into()],
        ["scratch, a thread".into(), bytes(m.thread_scratch as f64), String::new()],
    ];
    if let Some(threads) = threads {
        let all = m.weights + m.kv_at_context + m.scratch + threads as u64 * m.thread_scratch;
        rows.push([
            "all, one sequence".into(),
            bytes(all as f64),
            format!("{} and a full context", plural(threads, "thread")),
        ]);
    }
    let part = |name: &str, size: u64| (name.to_string(), size as f64);
    let parts = report.weights.iter().map(|w| part(&format!("{} {}", w.role, w.layout), w.bytes));
    let parts = parts.chain([
        part("keys and values, a full context", m.kv_at_context),
        part("scratch", m.scratch + threads.unwrap_or(1) as u64 * m.thread_scratch),
    ]);
    let parts: Vec<(String, f64)> = parts.collect();
    let whole = bytes(parts.iter().map(|(_, size)| size).sum());
    Section {
        title: "Memory".to_string(),
        charts: vec![Chart { bars: vec![Bar { label: "All, one sequence".to_string(), whole, parts }], unit: bytes }],
        tables: vec![Table {
            caption: "Memory plan".to_string(),
            columns: vec![("what", Align::Left), ("size", Align::Right), ("", Align::Left)],
            rows: rows.into_iter().map(Vec::from).collect(),
            sum: false,
        }],
        ..Section::default()
    }
}

fn code(level: &Level) -> Section {
    let tuning = match &level.tuning {
        Some(record) => format!(
            "Kernels are written as a tuning record says, {record}. Where it says nothing they are written by moec's defaults."
        ),
        None => "Kernels are written by moec's defaults for the level; `moec tune` measures the choices on a machine and writes a record of what was faster there.".to_string(),
    };
    let words = vec![format!("Needs {}. {tuning}", level.features.join(", "))];
    let tables =
        [("One token", &level.decode), ("Many tokens", &level.batch)].into_iter().flat_map(|(what, program)| {
            let caption = format!(
                "{what}: {} with {}, {}",
                plural(program.stages, "stage"),
                plural(program.barriers, "barrier"),
                plural(program.kernels, "kernel")
            );
            let mut tables = vec![stages_table(caption, program)];
            tables.extend(variants_table(what, program));
            tables
        });
    Section { title: format!("Code, {}", level.name), words, tables: tables.collect(), ..Section::default() }
}

/// Matrices that a token meets, on average: whole where that is what each token meets.
fn matrices(mean: f64) -> String {
    if (mean - mean.round()).abs() < 1e-9 { format!("{mean:.0}") } else { format!("{mean:.2}") }
}

fn stages_table(caption: String, program: &Program) -> Table {
    let mut rows = Vec::new();
    for kind in &program.kinds {
        let head = [
            kind.operations.clone(),
            kind.stages.to_string(),
            if kind.weight_bytes > 0 { bytes(kind.weight_bytes as f64) } else { String::new() },
            if kind.multiply_adds > 0 { count(kind.multiply_adds as f64) } else { String::new() },
        ];
        let others = (!kind.kernels.is_empty()).then(|| vec![kind.kernels.join(", "), String::new(), String::new()]);
        let products = kind.products.iter().map(|product| {
            let of = match product.experts {
                1 => format!("{} rows", product.rows),
                n => format!("{} rows, {} of {n}", product.rows, matrices(product.matrices)),
            };
            vec![product.kernel.clone(), of, product.choice.clone()]
        });
        for (i, kernel) in products.chain(others).enumerate() {
            let head = if i == 0 { head.to_vec() } else { vec![String::new(); head.len()] };
            rows.push([head, kernel].concat());
        }
        if kind.products.is_empty() && kind.kernels.is_empty() {
            rows.push([head.to_vec(), vec![String::new(); 3]].concat());
        }
    }
    Table {
        caption,
        columns: vec![
            ("operations", Align::Left),
            ("stages", Align::Right),
            ("weights of a token", Align::Right),
            ("multiply-adds of a token", Align::Right),
            ("kernels", Align::Left),
            ("product", Align::Left),
            ("written as", Align::Left),
        ],
        rows,
        sum: false,
    }
}

/// The stages that differ from others of their kind.
fn variants_table(what: &str, program: &Program) -> Option<Table> {
    let rows: Vec<Vec<String>> = program
        .kinds
        .iter()
        .flat_map(|kind| {
            kind.variants.iter().map(|variant| {
                vec![
                    kind.operations.clone(),
                    ranges(&variant.stages),
                    bytes(variant.weight_bytes as f64),
                    count(variant.multiply_adds as f64),
                    variant.expected.map_or(String::new(), |e| seconds(e.seconds())),
                ]
            })
        })
        .collect();
    (!rows.is_empty()).then(|| Table {
        caption: format!("{what}: stages that differ from others of their kind"),
        columns: vec![
            ("operations", Align::Left),
            ("which, from 0", Align::Left),
            ("weights of a token", Align::Right),
            ("multiply-adds of a token", Align::Right),
            ("expected, each", Align::Right),
        ],
        rows,
        sum: false,
    })
}

/// Numbers as `0–3, 5`.
fn ranges(numbers: &[usize]) -> String {
    let mut all: Vec<(usize, usize)> = Vec::new();
    for &n in numbers {
        match all.last_mut() {
            Some((_, last)) if *last + 1 == n => *last = n,
            _ => all.push((n, n)),
        }
    }
    let told = |(a, b): (usize, usize)| if a == b { a.to_string() } else { format!("{a}–{b}") };
    all.into_iter().map(told).collect::<Vec<_>>().join(", ")
}

fn passes(report: &Report) -> Section {
    let rows = report.passes.iter().map(|pass| {
        let number = |n: usize| if pass.disabled { "off".to_string() } else { n.to_string() };
        let first = pass.first.clone().unwrap_or_default();
        vec![pass.name.clone(), pass.doc.clone(), number(pass.decode), number(pass.batch), first]
    });
    Section {
        title: "Passes".to_string(),
        tables: vec![Table {
            caption: "Rewrites of the graphs of one token and of many".to_string(),
            columns: vec![
                ("pass", Align::Left),
                ("what it does", Align::Left),
                ("one", Align::Right),
                ("many", Align::Right),
                ("its first rewrite", Align::Left),
            ],
            rows: rows.collect(),
            sum: false,
        }],
        ..Section::default()
    }
}

#[cfg(test)]
mod tests {
    use super::ranges;

    #[test]
    fn neighbours_are_a_range() {
        assert_eq!(ranges(&[0, 1, 2, 5, 7, 8]), "0–2, 5, 7–8");
        assert_eq!(ranges(&[]), "");
    }
}
