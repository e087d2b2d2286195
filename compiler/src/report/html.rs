//! A report as one page of HTML: nothing is loaded, nothing runs, light and dark as the reader has it.
//!
//! Deliberately absent: scripts and fonts.

use super::Report;
use super::page::{self, Align, Bar, Chart, Section, Table};
use std::fmt::Write as _;

/// Colours of parts, for light and dark pages alike: neighbours differ in hue and lightness.
const COLOURS: [&str; 10] =
    ["#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#a463f2", "#3ca951", "#ff8ab7", "#97bbf5", "#9c6b4e", "#9498a0"];

/// Parts below this share of a bar are not labelled in it.
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
    if let Some(drawn) = &section.chart {
        text += &chart(drawn);
    }
    for rows in &section.tables {
        text += &table(rows);
    }
    text + "</section>\n"
}

/// Bars of coloured parts, and what the colours mean. The same name has the same colour in all bars of a chart.
fn chart(chart: &Chart) -> String {
    const HEIGHT: f64 = 30.0;
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in chart.bars.iter().flat_map(|bar| &bar.parts) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let colour = |name: &str| COLOURS[names.iter().position(|n| *n == name).unwrap_or(0) % COLOURS.len()];
    let mut text = "<figure>\n".to_string();
    for Bar { label, whole, parts } in &chart.bars {
        let sum: f64 = parts.iter().map(|(_, size)| size).sum();
        let _ = write!(
            text,
            "<div class=\"bar\"><div class=\"label\"><span>{}</span><span>{}</span></div>\n<svg viewBox=\"0 0 1000 {HEIGHT}\" preserveAspectRatio=\"none\" role=\"img\" aria-label=\"{}\">",
            escaped(label),
            escaped(whole),
            escaped(label)
        );
        let mut x = 0.0;
        for (name, size) in parts.iter().filter(|(_, size)| *size > 0.0) {
            let width = 1000.0 * size / sum;
            let _ = write!(
                text,
                "<rect x=\"{x:.2}\" y=\"0\" width=\"{width:.2}\" height=\"{HEIGHT}\" fill=\"{}\"><title>{}: {} ({:.1} %)</title></rect>",
                colour(name),
                escaped(name),
                escaped(&(chart.unit)(*size)),
                100.0 * size / sum
            );
            x += width;
        }
        text += "</svg>\n<div class=\"shares\">";
        // Words in a stretched picture would be stretched, too: they lie over it.
        let mut left = 0.0;
        for (_, size) in parts {
            let share = size / sum;
            if share >= LEAST_LABEL {
                let _ = write!(
                    text,
                    "<span style=\"left:{:.2}%;width:{:.2}%\">{:.0} %</span>",
                    100.0 * left,
                    100.0 * share,
                    100.0 * share
                );
            }
            left += share;
        }
        text += "</div></div>\n";
    }
    text += "<ul class=\"legend\">";
    for name in &names {
        let _ = write!(text, "<li><i style=\"background:{}\"></i>{}</li>", colour(name), escaped(name));
    }
    text + "</ul>\n</figure>\n"
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
