//! Tables for a terminal, for Markdown and for HTML.

use crate::report::{escape, scroll};

/// A table: its columns' names and its rows. The first column is text at the left, those after it are numbers, but for the last `texts`.
#[derive(Debug, Default)]
pub(super) struct Sheet {
    pub(super) heads: Vec<String>,
    pub(super) rows: Vec<Line>,
    /// How many columns at the end are text.
    pub(super) texts: usize,
}

/// A row.
#[derive(Debug, Default)]
pub(super) struct Line {
    pub(super) cells: Vec<String>,
    /// Whether it is to stand out.
    pub(super) strong: bool,
}

impl Line {
    pub(super) fn new(cells: Vec<String>) -> Self {
        Self { cells, strong: false }
    }

    pub(super) fn strong(cells: Vec<String>) -> Self {
        Self { cells, strong: true }
    }
}

impl Sheet {
    fn is_number(&self, column: usize) -> bool {
        column > 0 && column + self.texts < self.heads.len()
    }

    /// With spaces between the columns; rows that stand out begin with a mark.
    pub(super) fn text(&self) -> String {
        let wide = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.cells.get(column));
            cells.chain(self.heads.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.heads.len()).map(wide).collect();
        let line = |cells: &[String], mark: &str| {
            let padded =
                cells.iter().zip(widths.iter().copied()).enumerate().map(|(column, (cell, width))| {
                    if self.is_number(column) { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
                });
            format!("{mark}{}", padded.collect::<Vec<_>>().join("  ")).trim_end().to_owned() + "\n"
        };
        let rows = self.rows.iter().map(|row| line(&row.cells, if row.strong { "* " } else { "  " }));
        line(&self.heads, "  ") + &rows.collect::<String>()
    }

    pub(super) fn markdown(&self) -> String {
        let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
        let cell = |row: &Line, cell: &String| {
            let cell = cell.trim_start().replace('|', "\\|").replace('<', "&lt;");
            if row.strong && !cell.is_empty() { format!("**{cell}**") } else { cell }
        };
        let rule = (0..self.heads.len()).map(|column| if self.is_number(column) { "---:".to_owned() } else { "---".to_owned() });
        let rows = self.rows.iter().map(|row| line(row.cells.iter().map(|text| cell(row, text)).collect()));
        line(self.heads.clone()) + &line(rule.collect()) + &rows.collect::<String>()
    }

    pub(super) fn html(&self) -> String {
        let class = |column| if self.is_number(column) { " class=\"n\"" } else { "" };
        let heads: String = self.heads.iter().enumerate().map(|(at, head)| format!("<th{}>{}</th>", class(at), escape(head))).collect();
        let row = |row: &Line| {
            let cell = |(at, text): (usize, &String)| {
                let indent = if text.starts_with(' ') { " style=\"padding-left:18px\"" } else { "" };
                format!("<td{}{indent}>{}</td>", class(at), escape(text.trim_start()))
            };
            let cells: String = row.cells.iter().enumerate().map(cell).collect();
            format!("<tr{}>{cells}</tr>\n", if row.strong { " class=\"own\"" } else { "" })
        };
        let region = scroll("Scores");
        format!("{region}<table><tr>{heads}</tr>\n{}</table></div>\n", self.rows.iter().map(row).collect::<String>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_table_has_three_forms() {
        let cells = |cells: [&str; 3]| cells.map(str::to_owned).to_vec();
        let rows = vec![Line::new(cells(["a|b", "1.5", "<i>"])), Line::strong(cells(["  ü", "10.25", ""]))];
        let sheet = Sheet { heads: cells(["name", "score", "source"]), rows, texts: 1 };
        assert_eq!(sheet.text(), "  name  score  source\n  a|b     1.5  <i>\n*   ü   10.25\n");
        assert_eq!(
            sheet.markdown(),
            "| name | score | source |\n| --- | ---: | --- |\n| a\\|b | 1.5 | &lt;i> |\n| **ü** | **10.25** |  |\n"
        );
        let html = sheet.html();
        assert!(html.contains("<th class=\"n\">score</th><th>source</th>") && html.contains("<td>&lt;i&gt;</td>"), "{html}");
        assert!(html.contains("<tr class=\"own\"><td style=\"padding-left:18px\">ü</td><td class=\"n\">10.25</td>"), "{html}");
    }
}
