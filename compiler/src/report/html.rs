//! A report as one page of HTML: nothing is loaded, nothing runs, light and dark as the reader has it.
//!
//! Deliberately absent: scripts and fonts.

use super::Report;
use super::page::{self, Align, Bar, Chart, Map, Section, Table};
use std::fmt::Write as _;

/// Colours of parts, for light and dark pages alike: neighbours differ in hue and lightness.
const COLOURS: [&str; 10] =
    ["#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#a463f2", "#3ca951", "#ff8ab7", "#97bbf5", "#9c6b4e", "#9498a0"];

/// The colour of the rest.
const REST: &str = "#9498a0";

/// Parts below this share of the widest bar are drawn together.
const LEAST: f64 = 0.01;

/// Parts below this share of the width are not labelled in it.
const LEAST_LABEL: f64 = 0.09;

const STYLE: &str = include_str!("style.css");

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// The page.
pub fn html(report: &Report) -> String {
    let mut body = format!(
        "<header>\n<h1>{}</h1>\n<p class=\"subtitle\">{}</p>\n<div class=\"figures\">\n",
        escaped(&page::title(report)),
        escaped(&page::subtitle(report))
    );
    for figure in page::figures(report) {
        let _ = writeln!(
            body,
            "<div class=\"figure\"><span class=\"name\">{}</span><span class=\"value\">{}</span><span class=\"note\">{}</span></div>",
            escaped(figure.name),
            escaped(&figure.value),
            escaped(&figure.note)
        );
    }
    body += "</div>\n</header>\n";
    for part in page::sections(report) {
        body += &section(&part);
    }
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>{}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n",
        escaped(&page::title(report))
    )
}

fn section(section: &Section) -> String {
    let mut text = format!("<section>\n<h2>{}</h2>\n", escaped(&section.title));
    for words in &section.words {
        let _ = writeln!(text, "<p>{}</p>", escaped(words));
    }
    for drawn in &section.charts {
        text += &chart(drawn);
    }
    for drawn in &section.maps {
        text += &map(drawn);
    }
    for rows in &section.tables {
        text += &table(rows);
    }
    text + "</section>\n"
}

/// Bars of coloured parts to one scale, and what the colours mean. The same name has the same colour in all bars of a chart.
fn chart(chart: &Chart) -> String {
    const HEIGHT: f64 = 30.0;
    let widest = chart.bars.iter().map(Bar::size).fold(f64::MIN_POSITIVE, f64::max);
    let mut names: Vec<&str> = Vec::new();
    for (name, size) in chart.bars.iter().flat_map(|bar| &bar.parts) {
        if *size >= LEAST * widest && !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let colour = |name: &str| names.iter().position(|n| *n == name).and_then(|i| COLOURS.get(i)).unwrap_or(&REST);
    let mut text = "<figure>\n".to_string();
    let mut rest = false;
    for bar in &chart.bars {
        let label = escaped(&bar.label);
        let (mut x, mut pieces, mut shares) = (0.0, String::new(), String::new());
        let small: Vec<&(String, f64)> = bar.parts.iter().filter(|(name, _)| *colour(name) == REST).collect();
        let sum = ("all others".to_string(), small.iter().map(|(_, size)| size).sum::<f64>());
        rest |= sum.1 > 0.0;
        let shown = bar.parts.iter().filter(|(name, _)| *colour(name) != REST).chain([&sum]);
        for (name, size) in shown.filter(|(_, size)| *size > 0.0) {
            let (share, of) = (size / widest, format!("{} ({:.1} %)", (chart.unit)(*size), 100.0 * size / bar.size()));
            let _ = write!(
                pieces,
                "<rect x=\"{:.2}\" y=\"0\" width=\"{:.2}\" height=\"{HEIGHT}\" fill=\"{}\"><title>{}: {}</title></rect>",
                1000.0 * x,
                1000.0 * share,
                colour(name),
                escaped(name),
                escaped(&of)
            );
            // Words in a stretched picture would be stretched, too: they lie over it.
            if share >= LEAST_LABEL {
                let _ = write!(
                    shares,
                    "<span style=\"left:{:.2}%;width:{:.2}%\">{:.0} %</span>",
                    100.0 * x,
                    100.0 * share,
                    100.0 * size / bar.size()
                );
            }
            x += share;
        }
        let _ = write!(
            text,
            "<div class=\"bar\"><div class=\"label\"><span>{label}</span><span>{}</span></div>\n\
             <svg viewBox=\"0 0 1000 {HEIGHT}\" preserveAspectRatio=\"none\" role=\"img\" aria-label=\"{label}\">{pieces}</svg>\n\
             <div class=\"shares\">{shares}</div></div>\n",
            escaped(&bar.whole)
        );
    }
    text += "<ul class=\"legend\">";
    for name in names.iter().take(COLOURS.len()).copied().chain(rest.then_some("all others")) {
        let _ = write!(text, "<li><i style=\"background:{}\"></i>{}</li>", colour(name), escaped(name));
    }
    text + "</ul>\n</figure>\n"
}

/// A grid of fields of one colour, the more of it the larger the number.
fn map(map: &Map) -> String {
    const HEIGHT: usize = 16;
    const LABEL: usize = 28;
    let columns = map.rows.iter().map(|(_, fields)| fields.len()).max().unwrap_or(0).max(1);
    // Few experts have wide fields; many make the picture wider, which is then scaled down.
    let width = (960 / columns).clamp(8, 48);
    let mut pieces = String::new();
    for (r, (label, fields)) in map.rows.iter().enumerate() {
        let y = r * HEIGHT;
        let _ = write!(pieces, "<text x=\"{}\" y=\"{}\">{}</text>", LABEL - 6, y + HEIGHT - 4, escaped(label));
        for (c, field) in fields.iter().enumerate() {
            let _ = write!(
                pieces,
                "<rect{} x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" fill-opacity=\"{:.3}\"><title>{}</title></rect>",
                if field.framed { " class=\"framed\"" } else { "" },
                LABEL + c * width + 1,
                y + 1,
                width - 2,
                HEIGHT - 2,
                0.04 + 0.96 * field.share,
                escaped(&field.words)
            );
        }
    }
    let (all, high) = (LABEL + columns * width, map.rows.len() * HEIGHT);
    let caption = escaped(&map.caption);
    format!(
        "<figure class=\"map\">\n<figcaption>{caption}</figcaption>\n<svg viewBox=\"0 0 {all} {high}\" width=\"{all}\" role=\"img\" aria-label=\"{caption}\">{pieces}</svg>\n</figure>\n"
    )
}

fn table(table: &Table) -> String {
    let mut text = format!("<div class=\"table\"><table>\n<caption>{}</caption>\n<thead><tr>", escaped(&table.caption));
    let class = |align: Align| if align == Align::Right { " class=\"number\"" } else { "" };
    for (name, align) in &table.columns {
        let _ = write!(text, "<th scope=\"col\"{}>{}</th>", class(*align), escaped(name));
    }
    text += "</tr></thead>\n<tbody>\n";
    for (i, row) in table.rows.iter().enumerate() {
        text += if table.sum && i + 1 == table.rows.len() { "<tr class=\"sum\">" } else { "<tr>" };
        for (cell, (_, align)) in row.iter().zip(&table.columns) {
            let _ = write!(text, "<td{}>{}</td>", class(*align), escaped(cell));
        }
        text += "</tr>\n";
    }
    text + "</tbody>\n</table></div>\n"
}
