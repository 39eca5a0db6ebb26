//! What `mixed` found, as files: JSON with all of it, and a chart of bytes against KL divergence as SVG.

use passes::mixed::{Mix, Point};
use plotters::prelude::*;
use std::fmt::Display;

/// Width and height of the chart.
const SIZE: (u32, u32) = (960, 600);

/// Divergences below this are drawn here: the axis is logarithmic.
const LEAST: f64 = 1e-9;

const LINE: RGBColor = RGBColor(31, 119, 180);
const UNIFORM: RGBColor = RGBColor(127, 127, 127);
const TAKEN: RGBColor = RGBColor(214, 39, 40);

/// All that was found, as JSON.
pub fn json(mix: &Mix) -> String {
    let mut text = serde_json::to_string_pretty(mix).expect("what was found is plain data");
    text.push('\n');
    text
}

/// The chart: the frontier as predicted, the recipe that was taken, and the models with one choice for all layers.
pub fn svg(mix: &Mix) -> Result<String, String> {
    let mut text = String::new();
    draw(mix, SVGBackend::with_string(&mut text, SIZE)).map_err(|e| e.to_string())?;
    Ok(text)
}

fn draw(mix: &Mix, backend: SVGBackend) -> Result<(), Box<dyn std::error::Error>> {
    let of_file = mix.frontier.of == "file";
    let x = |bytes: u64| match of_file {
        true => bytes as f64 / 1e6,
        false => bytes as f64 * 8.0 / mix.weights as f64,
    };
    let point = |p: &Point| (x(p.bytes), p.predicted.max(LEAST));
    let frontier: Vec<(f64, f64)> = mix.frontier.points.iter().map(point).collect();
    let taken_at = match mix.taken.file_bytes {
        Some(bytes) if of_file => x(bytes),
        _ => mix.taken.bits,
    };
    let predicted = (taken_at, mix.taken.predicted.max(LEAST));
    let measured = mix.taken.measured.map(|d| (taken_at, d.kl.max(LEAST)));
    // Files of uniform models were not made.
    let uniform = mix.uniform.iter().filter(|_| !of_file);
    let uniform: Vec<(f64, f64, String)> =
        uniform.map(|u| (u.bits, u.measured.max(LEAST), u.choice.to_string())).collect();

    let marks = uniform.iter().map(|u| (u.0, u.1)).chain([predicted]).chain(measured);
    let all: Vec<(f64, f64)> = frontier.iter().copied().chain(marks).collect();
    let bounds = |of: fn(&(f64, f64)) -> f64| {
        let fold = |(a, b): (f64, f64), p: &(f64, f64)| (a.min(of(p)), b.max(of(p)));
        all.iter().fold((f64::INFINITY, f64::NEG_INFINITY), fold)
    };
    let ((left, right), (low, high)) = (bounds(|p| p.0), bounds(|p| p.1));
    let margin = ((right - left) * 0.05).max(0.05);

    let area = backend.into_drawing_area();
    area.fill(&WHITE)?;
    let title = format!("{}: KL divergence predicted {:.3e}", mix.asked, mix.taken.predicted);
    let title = match mix.taken.measured {
        Some(d) => format!("{title}, measured {:.3e} nats", d.kl),
        None => title,
    };
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 20))
        .margin(16)
        .x_label_area_size(48)
        .y_label_area_size(72)
        .build_cartesian_2d(left - margin..right + margin, (low / 1.5..high * 1.5).log_scale())?;
    let small = |x: &f64| format!("{x:.0e}");
    chart
        .configure_mesh()
        .x_desc(if of_file { "output file, MB" } else { "bits for each weight" })
        .y_desc("KL divergence from the float model, nats")
        .y_label_formatter(&small)
        .light_line_style(WHITE)
        .draw()?;
    let path = PathElement::new(frontier, LINE.stroke_width(2));
    let note = if mix.frontier.exact { "frontier, predicted" } else { "frontier, thinned, predicted" };
    legend(chart.draw_series([path])?, note, LINE);
    let circles = uniform.iter().map(|u| Circle::new((u.0, u.1), 4, UNIFORM.filled()));
    if !uniform.is_empty() {
        legend(chart.draw_series(circles)?, "one choice for all layers, measured", UNIFORM);
    }
    let style = ("sans-serif", 13).into_font().color(&UNIFORM);
    chart.draw_series(
        uniform.iter().map(|(x, y, name)| {
            EmptyElement::at((*x, *y)) + Text::new(name.clone(), (7, -12), style.clone())
        }),
    )?;
    let open = Circle::new(predicted, 7, TAKEN.stroke_width(2));
    legend(chart.draw_series([open])?, "taken, predicted (open) and measured (filled)", TAKEN);
    chart.draw_series(measured.map(|p| Circle::new(p, 5, TAKEN.filled())))?;
    let labels = &mut chart.configure_series_labels();
    labels.position(SeriesLabelPosition::UpperRight).border_style(UNIFORM).background_style(WHITE).draw()?;
    area.present()?;
    Ok(())
}

/// Names what was drawn, beside a square of its color.
fn legend<'a, DB: DrawingBackend + 'a>(
    series: &mut plotters::chart::SeriesAnno<'a, DB>,
    text: impl Display,
    color: RGBColor,
) {
    let square = move |(x, y)| Rectangle::new([(x, y - 4), (x + 8, y + 4)], color.filled());
    series.label(text.to_string()).legend(square);
}
