//! Text for people: tables, units, wrapped lines, colors.

use comfy_table::{
    Attribute, Cell, CellAlignment, ColumnConstraint, ContentArrangement, LineStyle, TableStyle, Width,
};

/// Columns separated by blanks, with one line under the header.
const STYLE: TableStyle = TableStyle::new().header_separator(LineStyle::none().fill('─').junction('─'));

/// The least width of a last column that wraps.
const LAST_WIDTH: u16 = 24;

/// A divergence: `0.002630`, or `3.10e-6` where that says more.
pub fn nats(kl: f64) -> String {
    match kl > 0.0 && kl < 1e-4 {
        true => format!("{kl:.2e}"),
        false => format!("{kl:.6}"),
    }
}

/// Bytes for people: `94.5 KiB`.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut x = n as f64;
    let mut unit = 0;
    // 1023.95 would print as 1024.0.
    while x >= 1023.95 && unit + 1 < UNITS.len() {
        x /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{n} B"),
        _ => format!("{x:.1} {}", UNITS[unit]),
    }
}

/// Seconds for people: `18 ms`, `3.42 s`, `2 min 05 s`.
pub fn seconds(s: f64) -> String {
    match s {
        s if s < 0.9995 => format!("{:.0} ms", s * 1e3),
        s if s < 99.995 => format!("{s:.2} s"),
        s => format!("{} min {:02} s", s.round() as u64 / 60, s.round() as u64 % 60),
    }
}

/// A ratio as a percentage of two decimals, or of one digit where that shows none.
pub fn percent(x: f64) -> String {
    match x * 100.0 {
        0.0 => "0".into(),
        p if p.abs() < 0.01 => format!("{p:.0e} %"),
        p => format!("{p:.2} %"),
    }
}

/// `2 ops`, `1 op`.
pub fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// `a/very/long/name` cut in the middle to `width` characters.
pub fn shorten(name: &str, width: usize) -> String {
    let chars: Vec<char> = name.chars().collect();
    if chars.len() <= width {
        return name.to_string();
    }
    let head = (width - 1) / 3;
    let tail = width - 1 - head;
    chars[..head].iter().chain(&['…']).chain(&chars[chars.len() - tail..]).collect()
}

/// A table to be painted. A header that starts with `>` aligns its column to the right; the last column wraps.
pub struct Table {
    header: Vec<String>,
    right: Vec<bool>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table.
    pub fn new(header: &[&str]) -> Table {
        Table {
            header: header.iter().map(|h| h.trim_start_matches('>').to_string()).collect(),
            right: header.iter().map(|h| h.starts_with('>')).collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row.
    pub fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }
}

/// Where text goes: how wide it is, and whether it may have colors.
#[derive(Clone, Copy, Debug)]
pub struct Painter {
    /// Columns.
    pub width: u16,
    /// Whether colors and bold letters are wanted.
    pub color: bool,
}

impl Painter {
    /// Paints a table and an empty line; nothing when it has no rows.
    pub fn table(&self, out: &mut String, table: Table) {
        if table.rows.is_empty() {
            return;
        }
        let mut t = comfy_table::Table::new();
        t.load_style(STYLE).set_content_arrangement(ContentArrangement::Dynamic).set_width(self.width);
        match self.color {
            true => t.enforce_styling(),
            false => t.force_no_tty(),
        };
        t.set_header(table.header.iter().map(|h| Cell::new(h).add_attribute(Attribute::Bold)));
        t.add_rows(table.rows);
        let last = table.right.len() - 1;
        let widest = t.column_max_content_widths();
        // What the other columns leave, each with its padding, but room for a word.
        let taken: u16 = widest[..last].iter().map(|w| w + 3).sum();
        let room = self.width.saturating_sub(taken + 3).clamp(12, LAST_WIDTH);
        for (i, column) in t.column_iter_mut().enumerate() {
            if table.right[i] {
                column.set_cell_alignment(CellAlignment::Right);
            }
            if i < last {
                column.set_constraint(ColumnConstraint::ContentWidth);
            } else if widest[i] > room {
                column.set_constraint(ColumnConstraint::LowerBoundary(Width::Fixed(room)));
            }
        }
        for line in t.lines() {
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out.push('\n');
    }

    /// A line, wrapped at blanks; what follows the first break is indented.
    pub fn line(&self, out: &mut String, text: &str) {
        let mut column = 0;
        for word in text.trim_end().split(' ') {
            let n = word.chars().count();
            if column > 0 && column + 1 + n > self.width as usize {
                out.push_str("\n  ");
                column = 2;
            } else if column > 0 {
                out.push(' ');
                column += 1;
            }
            out.push_str(word);
            column += n;
        }
        out.push('\n');
    }

    /// A line that stands out.
    pub fn warning(&self, out: &mut String, text: &str) {
        const YELLOW: (&str, &str) = ("\x1b[33m", "\x1b[0m");
        let (on, off) = if self.color { YELLOW } else { ("", "") };
        out.push_str(on);
        self.line(out, &format!("warning: {text}"));
        out.push_str(off);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units() {
        for (n, want) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1024 * 1024 - 1, "1.0 MiB"),
            (96 << 20, "96.0 MiB"),
        ] {
            assert_eq!(bytes(n), want);
        }
        for (s, want) in
            [(0.0184, "18 ms"), (0.9999, "1.00 s"), (99.999, "1 min 40 s"), (125.2, "2 min 05 s")]
        {
            assert_eq!(seconds(s), want);
        }
        for (x, want) in [(0.0, "0"), (0.0345, "3.45 %"), (0.00003, "3e-3 %"), (f64::NAN, "NaN %")] {
            assert_eq!(percent(x), want);
        }
    }

    #[test]
    fn names_keep_both_ends() {
        assert_eq!(shorten("abc", 5), "abc");
        assert_eq!(shorten("model.layers.0.q_proj", 12), "mod…0.q_proj");
        assert_eq!(shorten("ééééééé", 4), "é…éé");
    }

    #[test]
    fn lines_and_tables_keep_to_the_width() {
        let p = Painter { width: 60, color: false };
        let mut out = String::new();
        p.line(&mut out, &"seven77 ".repeat(20));
        let mut t = Table::new(&["name", ">bytes", "why"]);
        t.row(["model.layers.0.self_attn.q_proj", "12.0 KiB", &"because ".repeat(12)]);
        p.table(&mut out, t);
        p.table(&mut out, Table::new(&["nothing"]));
        assert!(out.lines().all(|l| l.chars().count() <= 60), "{out}");
        assert_eq!(out.matches("because").count(), 12);
        assert!(!out.contains("nothing"));
        assert_eq!(out.matches("seven77").count(), 20);
    }
}
