//! The result of `moec tune` as a picture: for each shape and step two bars, default and tuned, as shares of the machine's limit.
//!
//! SVG written by hand: rectangles and words. Deliberately absent: anything that needs a script or a font of its own.

use super::tune::step_name;
use moec::tune::Outcome;
use std::fmt::Write as _;

const LEFT: f64 = 250.0;
const WIDTH: f64 = 560.0;
const ROW: f64 = 30.0;
const TOP: f64 = 76.0;

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// The picture.
pub fn svg(outcome: &Outcome) -> String {
    let mut rows = String::new();
    let mut y = TOP;
    for product in &outcome.products {
        let Some(found) = outcome.record.products.get(&product.shape) else { continue };
        let _ = writeln!(
            rows,
            r#"<text x="14" y="{:.0}" class="shape">{}</text>"#,
            y + 16.0,
            escaped(&product.shape.to_string())
        );
        for m in &found.measured {
            let bar = |share: f64| WIDTH * share.clamp(0.0, 1.2) / 1.2;
            let _ = writeln!(
                rows,
                concat!(
                    r#"<text x="{:.0}" y="{:.0}" class="end">{}</text>"#,
                    r#"<rect x="{}" y="{:.0}" width="{:.1}" height="9" class="default"/>"#,
                    r#"<rect x="{}" y="{:.0}" width="{:.1}" height="9" class="tuned"/>"#,
                    r#"<text x="{:.1}" y="{:.0}">{:.0} → {:.0} %</text>"#
                ),
                LEFT - 8.0,
                y + 16.0,
                step_name(m.step),
                LEFT,
                y + 3.0,
                bar(m.default_share),
                LEFT,
                y + 12.0,
                bar(m.tuned_share),
                LEFT + bar(m.default_share.max(m.tuned_share)) + 6.0,
                y + 16.0,
                100.0 * m.default_share,
                100.0 * m.tuned_share,
            );
            y += ROW;
        }
        y += 12.0;
    }
    let mut grid = String::new();
    for percent in (0..=120).step_by(20) {
        let x = LEFT + WIDTH * f64::from(percent) / 120.0;
        let _ = writeln!(
            grid,
            r#"<line x1="{x:.1}" y1="{:.0}" x2="{x:.1}" y2="{y:.0}" class="{}"/><text x="{x:.1}" y="{:.0}" class="middle">{percent} %</text>"#,
            TOP - 4.0,
            if percent == 100 { "limit" } else { "grid" },
            TOP - 9.0,
        );
    }
    let (width, height) = (LEFT + WIDTH + 110.0, y + 14.0);
    format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0}" height="{height:.0}" viewBox="0 0 {width:.0} {height:.0}">
<style>
text {{ font: 12px sans-serif; fill: #222 }} .title {{ font-size: 15px; font-weight: bold }} .shape {{ font-weight: bold }}
.end {{ text-anchor: end }} .middle {{ text-anchor: middle; fill: #777 }} .default {{ fill: #a9b4c2 }} .tuned {{ fill: #d1495b }}
.grid {{ stroke: #e4e4e4 }} .limit {{ stroke: #555; stroke-dasharray: 4 3 }}
</style>
<rect width="100%" height="100%" fill="white"/>
<text x="14" y="24" class="title">Share of the machine's limit</text>
<text x="14" y="43">{} · {} threads</text>
<rect x="{:.0}" y="15" width="10" height="10" class="default"/><text x="{:.0}" y="24">default</text>
<rect x="{:.0}" y="15" width="10" height="10" class="tuned"/><text x="{:.0}" y="24">tuned</text>
{grid}{rows}</svg>
"#,
        escaped(&outcome.record.machine.cpu),
        outcome.record.threads,
        LEFT + WIDTH - 130.0,
        LEFT + WIDTH - 116.0,
        LEFT + WIDTH - 50.0,
        LEFT + WIDTH - 36.0,
    )
}
