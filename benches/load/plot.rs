//! Bars in groups, as SVG.

use anyhow::{Result, anyhow};
use plotters::prelude::*;
use std::path::Path;

/// The bars of one workload: whose, and how high.
pub struct Group {
    pub name: &'static str,
    pub bars: Vec<(String, f64)>,
}

const WIDTH: u32 = 1200;
const HEIGHT: u32 = 420;

fn colour(contestant: &str) -> RGBColor {
    match contestant {
        "direct" => RGBColor(170, 170, 170),
        "nginx" => RGBColor(0, 150, 57),
        "nginx-cache" => RGBColor(130, 200, 140),
        "haproxy" => RGBColor(70, 130, 190),
        "oncegate" => RGBColor(217, 95, 2),
        "oncegate-fjall" => RGBColor(230, 171, 2),
        _ => RGBColor(117, 112, 179),
    }
}

/// One group after the other on a logarithmic scale. Without groups there is nothing to draw.
pub fn bars(path: &Path, title: &str, groups: &[Group]) -> Result<()> {
    let values = groups.iter().flat_map(|group| &group.bars).map(|(_, value)| *value);
    let (least, most) = (values.clone().fold(f64::INFINITY, f64::min), values.fold(0.0, f64::max));
    if groups.is_empty() || least <= 0.0 {
        return Ok(());
    }
    draw(path, title, groups, least, most).map_err(|error| anyhow!("{}: {error}", path.display()))
}

fn draw(path: &Path, title: &str, groups: &[Group], least: f64, most: f64) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::new(path, (WIDTH, HEIGHT)).into_drawing_area();
    root.fill(&WHITE)?;
    let bottom = least / 2.0;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 20))
        .margin(10)
        .x_label_area_size(30)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..groups.len() as f64, (bottom..most * 1.5).log_scale())?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .disable_x_axis()
        .y_label_formatter(&|value| format!("{value:.0}"))
        .draw()?;

    let mut names: Vec<&str> = Vec::new();
    for name in groups.iter().flat_map(|group| &group.bars).map(|(name, _)| name.as_str()) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    for name in names {
        let mut of_one = Vec::new();
        for (at, group) in groups.iter().enumerate() {
            let width = 0.84 / group.bars.len() as f64;
            for (nth, (_, value)) in group.bars.iter().enumerate().filter(|(_, (owner, _))| owner == name) {
                let left = at as f64 + 0.08 + width * nth as f64;
                of_one.push(Rectangle::new([(left, bottom), (left + width * 0.92, *value)], colour(name).filled()));
            }
        }
        let colour = colour(name);
        chart
            .draw_series(of_one)?
            .label(name)
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], colour.filled()));
    }
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
    let share = f64::from(WIDTH - 80) / groups.len() as f64;
    for (at, group) in groups.iter().enumerate() {
        let middle = 70.0 + share * (at as f64 + 0.5);
        let style = ("sans-serif", 13).into_font().color(&BLACK);
        let style = style.pos(plotters::style::text_anchor::Pos::new(
            plotters::style::text_anchor::HPos::Center,
            plotters::style::text_anchor::VPos::Top,
        ));
        root.draw(&Text::new(group.name, (middle as i32, HEIGHT as i32 - 34), style))?;
    }
    root.present()?;
    Ok(())
}
