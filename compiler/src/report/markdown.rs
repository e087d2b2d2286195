//! A report in Markdown, with tables as GitHub shows them.
//!
//! Deliberately absent: pictures; their numbers are in the tables.

use super::Report;
use super::page::{self, Align, Table};
use std::fmt::Write as _;

/// Words as they are, whatever they hold.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if matches!(c, '\\' | '|' | '*' | '_' | '`' | '<' | '[' | '#') {
            out.push('\\');
        }
        out.push(if c == '\n' { ' ' } else { c });
    }
    out
}

/// The page.
pub fn markdown(report: &Report) -> String {
    let mut text = format!("# {}\n\n{}\n\n", escaped(&page::title(report)), escaped(&page::subtitle(report)));
    for figure in page::figures(report) {
        let _ = writeln!(text, "- **{}**: {} ({})", figure.name, escaped(&figure.value), escaped(&figure.note));
    }
    for section in page::sections(report) {
        let _ = write!(text, "\n## {}\n", escaped(&section.title));
        for words in &section.words {
            let _ = write!(text, "\n{}\n", escaped(words));
        }
        for table in &section.tables {
            let _ = write!(text, "\n{}", rows(table));
        }
    }
    text
}

fn rows(table: &Table) -> String {
    let mut text = format!("{}:\n\n", escaped(&table.caption));
    let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    text += &line(table.columns.iter().map(|(name, _)| escaped(name)).collect());
    let rule = |align: &Align| match align {
        Align::Left => ":--".to_string(),
        Align::Right => "--:".to_string(),
    };
    text += &line(table.columns.iter().map(|(_, align)| rule(align)).collect());
    for (i, row) in table.rows.iter().enumerate() {
        let last = table.sum && i + 1 == table.rows.len();
        let cell =
            |cell: &String| if last && !cell.is_empty() { format!("**{}**", escaped(cell)) } else { escaped(cell) };
        text += &line(row.iter().map(cell).collect());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::escaped;

    #[test]
    fn names_cannot_break_a_table() {
        assert_eq!(escaped("a|b_c\n*d*"), r"a\|b\_c \*d\*");
    }
}
