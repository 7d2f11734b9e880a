//! Medians with their spread, in groups, as SVG.

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::path::Path;

/// What is shown of one workload.
pub struct Group {
    pub name: String,
    pub marks: Vec<Mark>,
}

pub struct Mark {
    pub contestant: String,
    pub median: f64,
    pub least: f64,
    pub most: f64,
}

type Drawn<T = ()> = Result<T, Box<dyn std::error::Error>>;
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

const WIDTH: u32 = 1200;
const HEIGHT: u32 = 440;
const TITLE_HEIGHT: u32 = 60;
const FONT: &str = "sans-serif";

const COLOURS: [(&str, RGBColor); 5] = [
    ("direct", RGBColor(150, 150, 150)),
    ("nginx", RGBColor(0, 130, 50)),
    ("nginx-cache", RGBColor(120, 190, 60)),
    ("haproxy", RGBColor(60, 120, 190)),
    ("oncegate", RGBColor(217, 80, 2)),
];
/// Further builds and engines of the gateway, in turn.
const FURTHER: [RGBColor; 3] = [RGBColor(150, 60, 160), RGBColor(210, 160, 0), RGBColor(90, 90, 180)];

/// One group beside the other on a logarithmic scale. Without groups there is nothing to draw.
pub fn draw(path: &Path, title: &str, groups: &[Group]) -> Result<()> {
    if groups.is_empty() || groups.iter().flat_map(|group| &group.marks).any(|mark| mark.least <= 0.0) {
        return Ok(());
    }
    try_draw(path, title, groups).map_err(|error| anyhow!("{}: {error}", path.display()))
}

fn try_draw(path: &Path, title: &str, groups: &[Group]) -> Drawn {
    let root = SVGBackend::new(path, (WIDTH, HEIGHT)).into_drawing_area();
    root.fill(&WHITE)?;
    let (head, body) = root.split_vertically(TITLE_HEIGHT);
    let colours = colours(groups);
    legend(&head, title, &colours)?;

    let marks = || groups.iter().flat_map(|group| &group.marks);
    let least = marks().map(|mark| mark.least).fold(f64::INFINITY, f64::min);
    let most = marks().map(|mark| mark.most).fold(0.0, f64::max);
    let mut chart = ChartBuilder::on(&body)
        .margin(10)
        .x_label_area_size(30)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..groups.len() as f64, (least / 1.5..most * 1.5).log_scale())?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_labels(0)
        .y_labels(12)
        .light_line_style(BLACK.mix(0.06))
        .y_label_formatter(&|value| format!("{value:.0}"))
        .draw()?;
    for (at, group) in groups.iter().enumerate() {
        if at % 2 == 1 {
            let (top, bottom) = (most * 1.5, least / 1.5);
            let band = Rectangle::new([(at as f64, bottom), (at as f64 + 1.0, top)], BLACK.mix(0.03).filled());
            chart.draw_series([band])?;
        }
        for (nth, mark) in group.marks.iter().enumerate() {
            let x = at as f64 + (nth as f64 + 1.0) / (group.marks.len() as f64 + 1.0);
            let colour = colours.iter().find(|(name, _)| *name == mark.contestant).map_or(BLACK, |(_, colour)| *colour);
            chart.draw_series([PathElement::new([(x, mark.least), (x, mark.most)], colour.stroke_width(2))])?;
            chart.draw_series([Circle::new((x, mark.median), 5, colour.filled())])?;
            let value = if mark.median < 10.0 { format!("{:.1}", mark.median) } else { format!("{:.0}", mark.median) };
            let style = (FONT, 11).into_font().color(&colour).pos(Pos::new(HPos::Center, VPos::Bottom));
            chart.draw_series([Text::new(value, (x, mark.most * 1.06), style)])?;
        }
        let (left, width) = (70.0, f64::from(WIDTH - 80) / groups.len() as f64);
        let middle = (left + width * (at as f64 + 0.5)) as i32;
        let style = (FONT, 13).into_font().color(&BLACK).pos(Pos::new(HPos::Center, VPos::Top));
        root.draw(&Text::new(group.name.as_str(), (middle, HEIGHT as i32 - 34), style))?;
    }
    root.present()?;
    Ok(())
}

/// Of each contestant, in the order of appearance.
fn colours(groups: &[Group]) -> Vec<(&str, RGBColor)> {
    let mut colours: Vec<(&str, RGBColor)> = Vec::new();
    let mut further = FURTHER.iter().cycle();
    for name in groups.iter().flat_map(|group| &group.marks).map(|mark| mark.contestant.as_str()) {
        if colours.iter().all(|(known, _)| *known != name) {
            let colour =
                COLOURS.iter().find(|(known, _)| *known == name).map(|(_, colour)| colour).or_else(|| further.next());
            colours.push((name, *colour.unwrap_or(&BLACK)));
        }
    }
    colours
}

fn legend(area: &Area<'_>, title: &str, colours: &[(&str, RGBColor)]) -> Drawn {
    let centred = (FONT, 18).into_font().color(&BLACK).pos(Pos::new(HPos::Center, VPos::Top));
    area.draw(&Text::new(title, (WIDTH as i32 / 2, 8), centred))?;
    let style = (FONT, 13).into_font().color(&BLACK).pos(Pos::new(HPos::Left, VPos::Center));
    let mut x = 80;
    for (name, colour) in colours {
        area.draw(&Circle::new((x, 46), 5, colour.filled()))?;
        area.draw(&Text::new(*name, (x + 12, 46), style.clone()))?;
        x += 40 + 8 * name.len() as i32;
    }
    Ok(())
}
