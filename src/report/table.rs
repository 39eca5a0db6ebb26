//! The report as text.

use super::{Float, Show, Summary};
use comfy_table::{
    Attribute, Cell, CellAlignment, Color, ColumnConstraint, ContentArrangement, LineStyle, Table,
    TableStyle, Width,
};
use passes::WeightReport;
use std::fmt::Write;

/// Columns separated by blanks, with one line under the header.
const STYLE: TableStyle = TableStyle::new().header_separator(LineStyle::none().fill('─').junction('─'));

/// Names longer than this are cut in the middle.
const NAME_WIDTH: usize = 44;

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

fn percent(x: f64) -> String {
    match x * 100.0 {
        p if p == 0.0 => "0".into(),
        p if p < 0.01 => format!("{p:.0e} %"),
        p => format!("{p:.2} %"),
    }
}

/// `a/very/long/name` cut in the middle to `width` characters.
fn shorten(name: &str, width: usize) -> String {
    let chars: Vec<char> = name.chars().collect();
    if chars.len() <= width {
        return name.to_string();
    }
    let head = (width - 1) / 3;
    let tail = width - 1 - head;
    chars[..head].iter().chain(&['…']).chain(&chars[chars.len() - tail..]).collect()
}

fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

struct Painter {
    width: u16,
    color: bool,
}

pub(super) fn render(s: &Summary, show: Show, width: u16, color: bool) -> String {
    let p = Painter { width, color };
    let mut out = String::new();
    if !s.weights.is_empty() {
        p.weights(&mut out, s);
    }
    if !s.float.is_empty() {
        p.float(&mut out, &s.float);
    }
    if s.passes.iter().any(|r| r.check.is_some()) {
        p.checks(&mut out, s);
    }
    if show.timing {
        p.timing(&mut out, s);
    }
    if show.stats {
        p.stats(&mut out, s);
    }
    for note in &s.notes {
        line(&mut out, &p.wrap(&format!("note: {note}")));
    }
    for warning in &s.warnings {
        line(&mut out, &p.paint(Color::Yellow, &p.wrap(&format!("warning: {warning}"))));
    }
    p.totals(&mut out, s);
    out
}

fn line(out: &mut String, text: &str) {
    out.push_str(text.trim_end());
    out.push('\n');
}

impl Painter {
    fn table(&self, header: &[&str], right: &[usize]) -> Table {
        let mut t = Table::new();
        t.load_style(STYLE).set_content_arrangement(ContentArrangement::Dynamic).set_width(self.width);
        if self.color {
            t.enforce_styling();
        } else {
            t.force_no_tty();
        }
        t.set_header(header.iter().map(|h| Cell::new(h).add_attribute(Attribute::Bold)));
        for &i in right {
            t.column_mut(i).expect("the column is in the header").set_cell_alignment(CellAlignment::Right);
        }
        t
    }

    fn put(&self, out: &mut String, t: &Table) {
        for l in t.lines() {
            line(out, &l);
        }
        out.push('\n');
    }

    fn paint(&self, color: Color, text: &str) -> String {
        let code = match (self.color, color) {
            (false, _) => return text.to_string(),
            (_, Color::Yellow) => 33,
            _ => 1,
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }

    fn wrap(&self, text: &str) -> String {
        let mut out = String::new();
        let mut column = 0;
        for word in text.split(' ') {
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
        out
    }

    fn weights(&self, out: &mut String, s: &Summary) {
        let measured = s.weights.iter().any(|w| w.output_error.is_some());
        let error = if measured { "output error" } else { "weight error" };
        let mut t = self.table(&["weight", "shape", "method", "before", "after", error], &[1, 3, 4, 5]);
        for w in &s.weights {
            t.add_row([
                Cell::new(shorten(&w.weight, NAME_WIDTH)),
                Cell::new(format!("{} x {}", w.k, w.n)),
                Cell::new(method(w)),
                Cell::new(bytes(w.bytes_before)),
                Cell::new(bytes(w.bytes_after)),
                Cell::new(match (w.output_error, measured) {
                    (Some(e), _) => percent(e),
                    (None, true) => format!("{} (weight)", percent(w.weight_error)),
                    (None, false) => percent(w.weight_error),
                }),
            ]);
        }
        self.put(out, &t);
        for (i, w) in s.weights.iter().enumerate() {
            for note in &w.notes {
                // A note that many weights share is said once.
                if !s.weights[..i].iter().any(|o| o.notes.contains(note)) {
                    let n = s.weights.iter().filter(|o| o.notes.contains(note)).count();
                    let who = if n == 1 { w.weight.clone() } else { count(n, "weight") };
                    line(out, &self.wrap(&format!("{who}: {note}")));
                }
            }
        }
    }

    fn float(&self, out: &mut String, float: &[Float]) {
        let mut t = self.table(&["stays float", "op", "shape", "bytes", "why"], &[2, 3]);
        for f in float {
            let shape: Vec<String> = f.shape.iter().map(u64::to_string).collect();
            let op = f.op.strip_prefix("onnx.").unwrap_or(&f.op);
            t.add_row([
                Cell::new(shorten(&f.weight, NAME_WIDTH * 2 / 3)),
                Cell::new(op),
                Cell::new(shape.join(" x ")),
                Cell::new(bytes(f.bytes)),
                Cell::new(&f.why),
            ]);
        }
        for i in 0..4 {
            let column = t.column_mut(i).expect("the table has five columns");
            column.set_constraint(ColumnConstraint::ContentWidth);
        }
        let why = t.column_mut(4).expect("the table has five columns");
        why.set_constraint(ColumnConstraint::LowerBoundary(Width::Fixed(24)));
        self.put(out, &t);
    }

    fn checks(&self, out: &mut String, s: &Summary) {
        let mut t = self.table(&["check", "wiring", "quantized weights", "int8 activations"], &[1, 2, 3]);
        let show = |x: Option<f64>| x.map_or("-".to_string(), |x| format!("{x:.1e}"));
        for r in &s.passes {
            let Some(c) = &r.check else { continue };
            t.add_row([r.pass.clone(), show(c.wiring), show(c.quantization), show(c.activations)]);
        }
        self.put(out, &t);
    }

    fn timing(&self, out: &mut String, s: &Summary) {
        let mut t = self.table(&["pass", "changed", "time"], &[2]);
        for r in &s.passes {
            t.add_row([r.pass.clone(), if r.changed { "yes" } else { "no" }.into(), seconds(r.seconds)]);
        }
        let rest = s.totals.seconds - s.passes.iter().map(|r| r.seconds).sum::<f64>();
        t.add_row(["reading, checking, writing".into(), String::new(), seconds(rest.max(0.0))]);
        self.put(out, &t);
    }

    fn stats(&self, out: &mut String, s: &Summary) {
        let mut t = self.table(&["pass", "count", "what"], &[1]);
        for r in &s.passes {
            let name = r.pass.split('{').next().unwrap_or_default();
            for (what, n) in &r.counts {
                t.add_row([name.to_string(), n.to_string(), what.clone()]);
            }
        }
        self.put(out, &t);
    }

    fn totals(&self, out: &mut String, s: &Summary) {
        let t = &s.totals;
        if !s.weights.is_empty() {
            let float = s.float.iter().map(|f| f.bytes).sum::<u64>();
            let mut text = format!("{} quantized", count(s.weights.len(), "weight"));
            if let Some(b) = t.bits_per_weight {
                write!(text, " at {b:.3} bits per weight").expect("writing to a string succeeds");
            }
            match s.float.len() {
                0 => text.push_str("; none stays float"),
                n => write!(text, "; {} stay float ({})", count(n, "op"), bytes(float))
                    .expect("writing to a string succeeds"),
            }
            line(out, &text);
        }
        if let Some(c) = &s.calibration {
            line(out, &self.wrap(&format!("calibration: {c}")));
        }
        let input = bytes(t.input_bytes);
        match (&s.output, t.output_bytes) {
            (Some(path), Some(n)) => {
                let ratio = t.input_bytes as f64 / n.max(1) as f64;
                let text =
                    format!("{path}: {input} -> {} ({ratio:.2}x smaller), {}", bytes(n), seconds(t.seconds));
                line(out, &self.paint(Color::Reset, &text));
            }
            _ => line(out, &format!("{}: {input}, nothing written, {}", s.input, seconds(t.seconds))),
        }
    }
}

/// `awq int4 g32`; a group of a whole row has no number.
fn method(w: &WeightReport) -> String {
    match w.group_size {
        g if g >= w.k => format!("{} int{} row", w.method, w.bits),
        g => format!("{} int{} g{g}", w.method, w.bits),
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
        for (x, want) in [(0.0, "0"), (0.0345, "3.45 %"), (0.00003, "3e-3 %")] {
            assert_eq!(percent(x), want);
        }
    }

    #[test]
    fn names_keep_both_ends() {
        assert_eq!(shorten("abc", 5), "abc");
        assert_eq!(shorten("model.layers.0.q_proj", 12), "mod…0.q_proj");
        assert_eq!(shorten("ééééééé", 4), "é…éé");
    }
}
