//! A bar chart of what was measured, as SVG: for each L1 a panel, in it for each benchmark a bar for each mode, of
//! the time of one operation in L0, L1 and L2.

use std::io;

use quick_xml::Writer;
use quick_xml::events::{BytesDecl, BytesText, Event};

use super::access_name;
use super::report::{Benchmark, Measured, Mode, Report};
use super::table::names;

/// Width of the picture, in pixels, as all that follows.
const WIDTH: f64 = 1000.0;
/// Where bars begin and end.
const LEFT: f64 = 310.0;
const RIGHT: f64 = 820.0;
/// Height of a bar, and from one to the next.
const BAR: f64 = 12.0;
const STEP: f64 = 15.0;
/// Between benchmarks.
const GAP: f64 = 12.0;
/// What is above a panel's bars: its title, the axis' name and numbers.
const HEAD: f64 = 80.0;
/// What is above the first panel: title and legend.
const TOP: f64 = 70.0;
/// What is below each panel.
const FOOT: f64 = 20.0;
/// Colours of L0, L1 and L2, which those who see fewer colours tell apart too.
const LEVELS: [(&str, &str); 3] = [("L0", "#d55e00"), ("L1", "#0072b2"), ("L2", "#56b4e9")];
const TEXT: &str = "#222222";
const FAINT: &str = "#666666";
const GRID: &str = "#d0d0d0";

/// The chart.
///
/// # Errors
/// Those of writing to memory, which has none.
pub fn chart(report: &Report) -> io::Result<String> {
    let mut l1s: Vec<_> = report.modes.iter().map(|m| m.mode.l1).collect();
    l1s.dedup();
    let of = |l1| report.modes.iter().filter(move |m| m.mode.l1 == l1).collect();
    let panels: Vec<Panel> = l1s.into_iter().flat_map(|l1| Panel::of(of(l1))).collect();
    let height = TOP + panels.iter().map(Panel::height).sum::<f64>();
    let mut writer = Writer::new_with_indent(Vec::new(), b' ', 1);
    writer.write_event(Event::Decl(BytesDecl::new("1.0", Some("UTF-8"), None)))?;
    let (w, h) = (px(WIDTH), px(height));
    writer
        .create_element("svg")
        .with_attribute(("xmlns", "http://www.w3.org/2000/svg"))
        .with_attribute(("width", w.as_str()))
        .with_attribute(("height", h.as_str()))
        .with_attribute(("viewBox", format!("0 0 {w} {h}").as_str()))
        .with_attribute(("font-family", "sans-serif"))
        .write_inner_content(|writer| {
            let mut canvas = Canvas(writer);
            canvas.rect([0.0, 0.0, WIDTH, height], "#ffffff", None)?;
            legend(&mut canvas, report.rounds)?;
            let mut top = TOP;
            for panel in &panels {
                panel.draw(&mut canvas, top)?;
                top += panel.height();
            }
            Ok(())
        })?;
    String::from_utf8(writer.into_inner()).map_err(io::Error::other)
}

fn px(n: f64) -> String {
    // One digit is less than an eye sees.
    let text = format!("{n:.1}");
    text.strip_suffix(".0").map_or(text.clone(), str::to_owned)
}

/// How a text looks.
#[derive(Clone, Copy)]
struct Style {
    size: f64,
    colour: &'static str,
    bold: bool,
    /// SVG's text-anchor: start, middle or end.
    anchor: &'static str,
}

const PLAIN: Style = Style { size: 11.0, colour: TEXT, bold: false, anchor: "start" };

/// Draws.
struct Canvas<'a>(&'a mut Writer<Vec<u8>>);

impl Canvas<'_> {
    /// A rectangle at `[x, y]` of `[width, height]`; browsers show `tip` when the mouse is on it.
    fn rect(&mut self, place: [f64; 4], colour: &str, tip: Option<&str>) -> io::Result<()> {
        let [x, y, width, height] = place.map(px);
        let rect = self.0.create_element("rect").with_attributes([
            ("x", x.as_str()),
            ("y", &y),
            ("width", &width),
            ("height", &height),
            ("fill", colour),
        ]);
        match tip {
            None => rect.write_empty()?,
            Some(tip) => rect.write_inner_content(|w| {
                w.create_element("title").write_text_content(BytesText::new(tip)).map(|_| ())
            })?,
        };
        Ok(())
    }

    fn text(&mut self, [x, y]: [f64; 2], text: &str, style: Style) -> io::Result<()> {
        let (x, y, size) = (px(x), px(y), px(style.size));
        let weight = if style.bold { "bold" } else { "normal" };
        let element = self.0.create_element("text").with_attributes([
            ("x", x.as_str()),
            ("y", &y),
            ("font-size", &size),
            ("font-weight", weight),
            ("fill", style.colour),
            ("text-anchor", style.anchor),
        ]);
        element.write_text_content(BytesText::new(text)).map(|_| ())
    }

    fn vertical(&mut self, x: f64, [from, to]: [f64; 2]) -> io::Result<()> {
        self.rect([x - 0.5, from, 1.0, to - from], GRID, None)
    }
}

fn legend(canvas: &mut Canvas, rounds: u32) -> io::Result<()> {
    let title = Style { size: 18.0, bold: true, ..PLAIN };
    canvas.text([20.0, 30.0], "Time of one operation of L2, with all exits that it causes", title)?;
    let below = format!("Medians of {rounds} rounds. At the bars: microseconds, and entries of L0.");
    canvas.text([20.0, 52.0], &below, Style { size: 12.0, colour: FAINT, ..PLAIN })?;
    for (i, (name, colour)) in LEVELS.iter().enumerate() {
        let x = RIGHT - 170.0 + 60.0 * i as f64;
        canvas.rect([x, 42.0, BAR, BAR], colour, None)?;
        canvas.text([x + 18.0, 52.0], name, Style { size: 13.0, ..PLAIN })?;
    }
    Ok(())
}

/// Benchmarks of the L2s of one L1, on one scale.
struct Panel<'a> {
    title: String,
    modes: Vec<&'a Measured>,
    names: Vec<&'a str>,
}

/// An operation that takes less than this part of the longest has a panel with others that do: beside that one, its bar
/// would be too short to be read.
const SHORT: f64 = 1.0 / 8.0;

/// A mode and what a benchmark measured in it.
type Bar<'a> = (Mode, &'a Benchmark);

impl<'a> Panel<'a> {
    /// Of all benchmarks of one L1.
    fn of(modes: Vec<&'a Measured>) -> Vec<Self> {
        let l1 = modes.first().map(|m| m.mode.l1.to_string()).unwrap_or_default();
        let title = format!("L2 under {l1}");
        let all = Self { title: title.clone(), names: names(&modes), modes };
        let limit = all.longest() * SHORT;
        let (short, long): (Vec<&str>, _) =
            all.names.iter().partition(|name| all.bars(name).iter().all(|(_, b)| total(b) < limit));
        if short.is_empty() || long.is_empty() {
            return vec![all];
        }
        let panel =
            |names, which| Self { title: format!("{title}: {which}"), modes: all.modes.clone(), names };
        vec![panel(short, "short operations"), panel(long, "long operations")]
    }

    /// The longest bar in nanoseconds.
    fn longest(&self) -> f64 {
        let bars = self.names.iter().flat_map(|name| self.bars(name));
        bars.map(|(_, b)| total(b)).fold(0.0, f64::max)
    }

    /// The bars of benchmark `name`, but for modes in which it can't run.
    fn bars(&self, name: &str) -> Vec<Bar<'a>> {
        let of = |m: &&'a Measured| {
            let b = m.benchmarks.iter().find(|b| b.name == name && b.skipped.is_none())?;
            Some((m.mode, b))
        };
        self.modes.iter().filter_map(of).collect()
    }

    fn body(&self) -> f64 {
        let group = |name: &&str| GAP + STEP * self.bars(name).len().max(1) as f64;
        self.names.iter().map(group).sum()
    }

    fn height(&self) -> f64 {
        HEAD + self.body() + FOOT
    }

    fn draw(&self, canvas: &mut Canvas, top: f64) -> io::Result<()> {
        let (begin, end) = (top + HEAD, top + HEAD + self.body());
        let title = Style { size: 15.0, bold: true, ..PLAIN };
        canvas.text([20.0, top + 30.0], &self.title, title)?;
        let middle = Style { anchor: "middle", colour: FAINT, ..PLAIN };
        canvas.text([(LEFT + RIGHT) / 2.0, begin - 26.0], "time of one operation (µs)", middle)?;
        // Without any exit, some length.
        let longest = Some(self.longest() / 1e3).filter(|l| *l > 0.0).unwrap_or(1.0);
        let step = tick(longest);
        let scale = (RIGHT - LEFT) / longest;
        for n in 0..=(longest / step) as u32 {
            let x = LEFT + f64::from(n) * step * scale;
            canvas.vertical(x, [begin - 4.0, end])?;
            canvas.text([x, begin - 9.0], &number(f64::from(n) * step), middle)?;
        }
        let mut y = begin + GAP / 2.0;
        for name in &self.names {
            canvas.text([20.0, y + BAR - 2.0], name, Style { size: 12.0, bold: true, ..PLAIN })?;
            let bars = self.bars(name);
            if bars.is_empty() {
                canvas.text([LEFT + 4.0, y + BAR - 2.0], "can't run", Style { colour: FAINT, ..PLAIN })?;
                y += STEP;
            }
            for (mode, benchmark) in bars {
                bar(canvas, y, scale, mode, benchmark)?;
                y += STEP;
            }
            y += GAP;
        }
        Ok(())
    }
}

fn total(b: &Benchmark) -> f64 {
    b.operation_ns().iter().sum()
}

/// A bar and what is written beside it.
fn bar(canvas: &mut Canvas, y: f64, scale: f64, mode: Mode, benchmark: &Benchmark) -> io::Result<()> {
    let label = format!("{}, {}", access_name(mode.access), mode.mmu);
    let base = y + BAR - 2.5;
    canvas.text([LEFT - 8.0, base], &label, Style { anchor: "end", colour: FAINT, ..PLAIN })?;
    let mut x = LEFT;
    for ((name, colour), ns) in LEVELS.iter().zip(benchmark.operation_ns()) {
        let width = ns / 1e3 * scale;
        canvas.rect([x, y, width, BAR], colour, Some(&format!("{name}: {ns:.0} ns")))?;
        x += width;
    }
    let text = if benchmark.exits.is_empty() {
        "no exit".to_owned()
    } else {
        let entries = number(benchmark.operation_entries());
        let noun = if entries == "1" { "entry" } else { "entries" };
        format!("{} µs, {entries} {noun}", number(total(benchmark) / 1e3))
    };
    canvas.text([x + 6.0, base], &text, PLAIN)
}

/// A number of about three digits.
fn number(n: f64) -> String {
    let text = match n {
        n if n >= 100.0 => format!("{n:.0}"),
        n if n >= 10.0 => format!("{n:.1}"),
        n => format!("{n:.2}"),
    };
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// A round distance of axis ticks, such that there are four to ten up to `longest`.
fn tick(longest: f64) -> f64 {
    let magnitude = 10f64.powf(longest.log10().floor());
    match longest / magnitude {
        n if n < 2.0 => magnitude / 5.0,
        n if n < 5.0 => magnitude / 2.0,
        _ => magnitude,
    }
}

#[cfg(test)]
mod tests {
    use quick_xml::Reader;
    use x86_spec::exit::ExitReason;

    use super::super::report::tests::{chain, said};
    use super::*;
    use crate::cli::{L1Choice, MmuChoice, VmcsAccessChoice};

    /// Name, attributes and text of each element.
    fn elements(svg: &str) -> Vec<(String, Vec<(String, String)>)> {
        let mut reader = Reader::from_str(svg);
        let mut found = Vec::new();
        loop {
            match reader.read_event().expect("the picture is XML") {
                Event::Start(e) | Event::Empty(e) => {
                    let text = |b: &[u8]| String::from_utf8(b.to_vec()).expect("UTF-8");
                    let attributes = e.attributes().map(|a| a.expect("a good attribute"));
                    let attributes = attributes.map(|a| (text(a.key.as_ref()), text(&a.value))).collect();
                    found.push((text(e.name().as_ref()), attributes));
                }
                Event::Eof => return found,
                _ => {}
            }
        }
    }

    #[test]
    fn bars_are_as_long_as_the_times_are() {
        let exit = |ns| chain(ExitReason::Cpuid, true, ns);
        let measured = |l1, ns| Measured {
            mode: Mode { l1, access: VmcsAccessChoice::Trapped, mmu: MmuChoice::ShadowOnEpt },
            benchmarks: vec![
                Benchmark::new(said("cpuid", 1), &[exit(ns)]),
                Benchmark::new(said("inl", 1), &[exit(ns.map(|n| 20 * n))]),
                Benchmark::new(said("<&>", 1), &[]),
            ],
        };
        let modes = vec![
            measured(L1Choice::Microvisor, [1000, 3000, 1000]),
            measured(L1Choice::Kvm, [100_000, 300_000, 100_000]),
        ];
        let svg = chart(&Report::new(1, modes)).expect("it can be drawn");
        let elements = elements(&svg);
        let widths = |colour: &str| -> Vec<f64> {
            let with = |(name, a): &&(String, Vec<(String, String)>)| {
                name == "rect"
                    && a.contains(&("fill".into(), colour.into()))
                    && !a.contains(&("width".into(), "12".into()))
            };
            let width = |(_, a): &(String, Vec<(String, String)>)| {
                a.iter().find(|(k, _)| k == "width").and_then(|(_, v)| v.parse().ok()).expect("a width")
            };
            elements.iter().filter(with).map(width).collect()
        };
        // Each panel has its own scale, and long operations have one; without exits there is no length.
        let fifth = (RIGHT - LEFT) / 5.0;
        assert_eq!(widths(LEVELS[0].1), [fifth, 0.0, fifth, fifth, 0.0, fifth]);
        assert_eq!(widths(LEVELS[1].1), [3.0 * fifth, 0.0, 3.0 * fifth, 3.0 * fifth, 0.0, 3.0 * fifth]);
        for text in [
            "L2 under kvm: long operations",
            "&lt;&amp;&gt;",
            "trapped, shadow-on-ept",
            "5 µs, 5 entries",
            "500 µs, 5 entries",
            "no exit",
        ] {
            assert!(svg.contains(&format!(">{text}<")), "{text}: {svg}");
        }
    }

    #[test]
    fn ticks_are_few_and_round() {
        for (longest, expected) in [(9.9, 1.0), (12.0, 2.0), (19.0, 2.0), (30.0, 5.0), (0.7, 0.1)] {
            assert!((tick(longest) - expected).abs() < 1e-9, "{longest}: {}", tick(longest));
        }
        assert_eq!(
            ["0.5", "12", "120", "1230"].map(|n| number(n.parse().unwrap_or(0.0))),
            ["0.5", "12", "120", "1230"]
        );
    }
}
