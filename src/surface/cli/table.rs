//! Columns that line up, whatever is coloured in them.

use console::measure_text_width;

/// Lines of a table: each column as wide as its widest cell, two blanks between, `indent` before.
pub(crate) fn lines(indent: &str, rows: &[Vec<String>]) -> Vec<String> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|c| rows.iter().filter_map(|r| r.get(c)).map(|cell| measure_text_width(cell)).max().unwrap_or(0))
        .collect();
    rows.iter().map(|row| line(indent, row, &widths)).collect()
}

fn line(indent: &str, row: &[String], widths: &[usize]) -> String {
    let mut text = indent.to_owned();
    for (cell, width) in row.iter().zip(widths) {
        text.push_str(cell);
        text.push_str(&" ".repeat(width.saturating_sub(measure_text_width(cell)) + 2));
    }
    text.trim_end().to_owned()
}

/// A row of headings or plain words.
pub(crate) fn row(cells: &[&str]) -> Vec<String> {
    cells.iter().map(|cell| (*cell).to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_take_no_room() {
        let rows = [row(&["a", "b"]), row(&["\u{1b}[32mlong\u{1b}[0m", "c"])];
        assert_eq!(lines(" ", &rows), [" a     b", " \u{1b}[32mlong\u{1b}[0m  c"]);
    }
}
