//! `--report`: one page about a run, readable offline: no script, no font, no picture from elsewhere.
//!
//! Drawn from the trace: passes over time (computing and waiting), waits by unit, where each unit rests, and the tuning curve when this
//! machine has one.

use std::fmt::Write;
use std::path::Path;

use super::summary::{PagingReport, Timings};
use crate::error::{Error, Result};
use crate::paging::{Happening, Plan, Score, Tier, TraceEvent, is_streamed};
use crate::spec::UnitKind;
use crate::units::{flag_size, human_bytes};

/// What the page tells of.
pub struct Page<'a> {
    pub model: &'a str,
    pub device: &'a str,
    pub dtype: &'a str,
    pub timings: &'a Timings,
    pub paging: &'a PagingReport,
    pub plan: &'a Plan,
    /// Kind, name and bytes of each unit, by id.
    pub units: Vec<(UnitKind, String, u64)>,
    pub events: Vec<TraceEvent>,
    /// The tuning curve, the fastest first; empty when nothing was tuned here.
    pub curve: Vec<Score>,
}

/// One pass, seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct PassTime {
    start: f64,
    length: f64,
    waiting: f64,
}

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 180.0;
/// Bars of a chart; more passes than this are drawn as the means of neighbours.
const MOST_BARS: usize = 240;

/// Writes the page.
///
/// # Errors
/// `Io`: the file cannot be written.
pub fn write(path: &Path, page: &Page<'_>) -> Result<()> {
    std::fs::write(path, html(page))
        .map_err(|e| Error::io(format!("{} cannot be written", path.display()), &e))
}

fn html(page: &Page<'_>) -> String {
    let mut text = String::from("<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">");
    let _ = write!(
        text,
        "<title>{} · tensorpager</title><style>{STYLE}</style></head><body><h1>{}</h1><p>{} · {}</p>",
        escape(page.model),
        escape(page.model),
        escape(page.dtype),
        escape(page.device)
    );
    text += &figures(page);
    let passes = passes(&page.events);
    text += &section("Passes over time", &pass_chart(&passes));
    text += &section("Waits by unit", &wait_chart(page));
    text += &section("Where each unit rests", &tier_strip(page));
    text += &section("Tuning curve", &curve_chart(&page.curve));
    text + "</body></html>\n"
}

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:980px;margin:2em auto;padding:0 1em;color:#1c2733;background:#fff}\
h1{font-size:1.6em;margin-bottom:0}h2{font-size:1.15em;margin:1.8em 0 .3em}p{margin:.3em 0;color:#55636f}\
table{border-collapse:collapse}td{padding:.1em 1.6em .1em 0}td:nth-child(2){text-align:right;font-variant-numeric:tabular-nums}\
svg{display:block;width:100%;height:auto}text{font:12px system-ui,sans-serif;fill:#55636f}\
.compute{fill:#3b7dd8}.wait{fill:#e08a3c}.gpu{fill:#3f9b63}.cpu{fill:#3b7dd8}.disk{fill:#e08a3c}.rows{fill:#b8c2cc}.axis{stroke:#c5cdd5}\
i{display:inline-block;width:.8em;height:.8em;margin:0 .3em 0 1em}\
@media(prefers-color-scheme:dark){body{color:#dde5ec;background:#161b20}p,text{color:#9aa8b4;fill:#9aa8b4}.axis{stroke:#3a444d}}";

fn section(title: &str, body: &str) -> String {
    format!("<h2>{title}</h2>{body}")
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

fn figures(page: &Page<'_>) -> String {
    let (p, t) = (page.paging, page.timings);
    let percent = |v: f64| format!("{v:.0} %");
    let rows = [
        (
            "first token after",
            format!("{:.2} s", t.time_to_first_token_s),
        ),
        ("tokens a second", format!("{:.2}", t.output_tokens_per_s)),
        ("from disk a pass", human_bytes(p.disk_bytes_per_pass)),
        ("disk", format!("{:.2} GB/s", p.disk_gb_per_s)),
        ("in RAM", human_bytes(p.resident_cpu_bytes)),
        ("on the GPU", human_bytes(p.resident_gpu_bytes)),
        (
            "share of the bound",
            p.percent_of_bound.map_or("unknown".into(), percent),
        ),
        (
            "waited",
            format!("{:.2} s of {:.2} s", p.stall_s, p.stall_s + p.compute_s),
        ),
        (
            "read with",
            format!(
                "{} {} × {}, prefetch {}{}",
                p.io,
                flag_size(p.page_size),
                p.queue_depth,
                p.prefetch_depth,
                match p.ring_frames {
                    0 => String::new(),
                    n => format!(", {n} frames"),
                }
            ),
        ),
        ("peak memory", human_bytes(p.peak_memory_bytes)),
    ];
    let cells = rows
        .iter()
        .map(|(name, value)| format!("<tr><td>{name}</td><td>{}</td></tr>", escape(value)));
    format!("<table>{}</table>", cells.collect::<String>())
}

/// Passes from the events of the computing side, in order.
fn passes(events: &[TraceEvent]) -> Vec<PassTime> {
    let seconds = |ns: u64| ns as f64 / 1e9;
    let mut passes: Vec<PassTime> = Vec::new();
    let mut end = 0.0;
    let beside = [Happening::Read, Happening::Copy, Happening::Kv];
    for e in events.iter().filter(|e| !beside.contains(&e.what)) {
        if e.what == Happening::Pass {
            let start = seconds(e.start_ns);
            if let Some(last) = passes.last_mut() {
                last.length = end - last.start;
            }
            passes.push(PassTime {
                start,
                ..PassTime::default()
            });
        }
        end = seconds(e.end_ns);
        if let (Some(last), Happening::Wait | Happening::Gather) = (passes.last_mut(), e.what) {
            last.waiting += seconds(e.end_ns - e.start_ns);
        }
    }
    if let Some(last) = passes.last_mut() {
        last.length = end - last.start;
    }
    passes
}

/// At most [`MOST_BARS`], each the mean of so many neighbours.
fn thinned(passes: &[PassTime]) -> Vec<PassTime> {
    let each = passes.len().div_ceil(MOST_BARS).max(1);
    let mean = |group: &[PassTime], of: fn(&PassTime) -> f64| {
        group.iter().map(of).sum::<f64>() / group.len() as f64
    };
    passes
        .chunks(each)
        .map(|g| PassTime {
            start: g[0].start,
            length: mean(g, |p| p.length),
            waiting: mean(g, |p| p.waiting),
        })
        .collect()
}

fn legend(entries: &[(&str, &str)]) -> String {
    let entries = entries
        .iter()
        .map(|(class, name)| format!("<i style=\"background:{}\"></i>{name}", colour(class)));
    format!("<p>{}</p>", entries.collect::<String>())
}

fn colour(class: &str) -> &'static str {
    match class {
        "compute" | "cpu" => "#3b7dd8",
        "wait" | "disk" => "#e08a3c",
        "gpu" => "#3f9b63",
        _ => "#b8c2cc",
    }
}

fn rect(class: &str, x: f64, y: f64, w: f64, h: f64, title: &str) -> String {
    format!(
        "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{:.1}\"><title>{}</title></rect>",
        w.max(0.5),
        h.max(0.0),
        escape(title)
    )
}

fn svg(height: f64, body: &str) -> String {
    format!("<svg viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\">{body}</svg>")
}

/// Bars of stacked parts over an axis: `(title, computing, waiting)` each.
fn bars(items: &[(String, f64, f64)]) -> String {
    let highest = items.iter().map(|(_, a, b)| a + b).fold(1e-12, f64::max);
    let step = WIDTH / items.len().max(1) as f64;
    let scale = (HEIGHT - 24.0) / highest;
    let mut body = format!("<text x=\"0\" y=\"12\">{highest:.3} s</text>");
    for (i, (title, compute, wait)) in items.iter().enumerate() {
        let (x, w) = (i as f64 * step, step * 0.85);
        let (a, b) = (compute * scale, wait * scale);
        body += &rect("compute", x, HEIGHT - a, w, a, title);
        body += &rect("wait", x, HEIGHT - a - b, w, b, title);
    }
    body +=
        &format!("<line class=\"axis\" x1=\"0\" x2=\"{WIDTH}\" y1=\"{HEIGHT}\" y2=\"{HEIGHT}\"/>");
    svg(HEIGHT + 2.0, &body)
}

fn pass_chart(passes: &[PassTime]) -> String {
    if passes.is_empty() {
        return "<p>no pass was recorded</p>".into();
    }
    let drawn = thinned(passes);
    let items: Vec<(String, f64, f64)> = drawn
        .iter()
        .map(|p| {
            let title = format!(
                "at {:.2} s: {:.3} s, {:.3} s of it waiting",
                p.start, p.length, p.waiting
            );
            (title, (p.length - p.waiting).max(0.0), p.waiting)
        })
        .collect();
    let each = passes.len().div_ceil(drawn.len());
    let note = match each {
        1 => format!("{} passes", passes.len()),
        n => format!("{} passes, {n} a bar", passes.len()),
    };
    format!(
        "<p>{note}; the prompt's come first</p>{}{}",
        bars(&items),
        legend(&[("compute", "computing"), ("wait", "waiting")])
    )
}

fn wait_chart(page: &Page<'_>) -> String {
    let mut waits = vec![0.0; page.units.len()];
    let mut rows = 0.0;
    for e in &page.events {
        let s = (e.end_ns - e.start_ns) as f64 / 1e9;
        match (e.what, e.unit) {
            (Happening::Wait, Some(unit)) => {
                if let Some(w) = waits.get_mut(unit.index()) {
                    *w += s;
                }
            }
            (Happening::Gather, _) => rows += s,
            _ => {}
        }
    }
    let items: Vec<(String, f64, f64)> = page
        .units
        .iter()
        .zip(&waits)
        .filter(|((kind, _, _), _)| is_streamed(*kind))
        .map(|((_, name, _), s)| (format!("{name}: {s:.3} s"), 0.0, *s))
        .collect();
    format!(
        "<p>{:.3} s for units in the order of the pass, {rows:.3} s for embedding rows</p>{}",
        waits.iter().sum::<f64>(),
        bars(&items)
    )
}

fn tier_strip(page: &Page<'_>) -> String {
    let shown: Vec<(usize, &(UnitKind, String, u64))> = page
        .units
        .iter()
        .enumerate()
        .filter(|(_, (kind, ..))| is_streamed(*kind) || *kind == UnitKind::Embed)
        .collect();
    let step = WIDTH / shown.len().max(1) as f64;
    let mut body = String::new();
    for (i, (id, (kind, name, bytes))) in shown.iter().enumerate() {
        let tier = page.plan.tiers.get(*id).copied().unwrap_or(Tier::Disk);
        let (class, words) = match (tier, is_streamed(*kind)) {
            (Tier::Disk, false) => ("rows", "disk, by rows"),
            (tier, _) => (tier.name(), tier.name()),
        };
        let title = format!("{name}: {words}, {}", human_bytes(*bytes));
        body += &rect(class, i as f64 * step, 0.0, step * 0.9, 34.0, &title);
    }
    let key = [
        ("gpu", "GPU"),
        ("cpu", "RAM"),
        ("disk", "disk, every pass"),
        ("rows", "disk, by rows"),
    ];
    svg(34.0, &body) + &legend(&key)
}

fn curve_chart(curve: &[Score]) -> String {
    if curve.is_empty() {
        return "<p>not tuned on this machine: <code>tensorpager tune MODEL</code> does it</p>"
            .into();
    }
    let shown: Vec<&Score> = curve.iter().filter(|s| s.ratio < 1e6).collect();
    let slowest = shown.iter().map(|s| s.ratio).fold(1.0, f64::max);
    let mut body = String::new();
    for (i, s) in shown.iter().enumerate() {
        let y = i as f64 * 18.0;
        let name = s.setting.to_string();
        let width = s.ratio / slowest * (WIDTH - 340.0);
        body += &format!(
            "<text x=\"0\" y=\"{:.0}\">{}</text>",
            y + 13.0,
            escape(&name)
        );
        body += &rect(
            "compute",
            280.0,
            y + 2.0,
            width,
            14.0,
            &format!("{:.3} in {} runs", s.ratio, s.runs),
        );
        body += &format!(
            "<text x=\"{:.0}\" y=\"{:.0}\">{:.3}</text>",
            288.0 + width,
            y + 13.0,
            s.ratio
        );
    }
    format!(
        "<p>time of a pass against the defaults', everything on disk</p>{}",
        svg(shown.len() as f64 * 18.0, &body)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::UnitId;

    fn event(what: Happening, unit: Option<u32>, start_ms: u64, end_ms: u64) -> TraceEvent {
        TraceEvent {
            what,
            unit: unit.map(UnitId),
            start_ns: start_ms * 1_000_000,
            end_ns: end_ms * 1_000_000,
            bytes: 0,
        }
    }

    #[test]
    fn passes_are_cut_where_they_begin() {
        let events = [
            event(Happening::Read, Some(1), 0, 900),
            event(Happening::Pass, None, 100, 100),
            event(Happening::Wait, Some(1), 100, 150),
            event(Happening::Compute, Some(1), 150, 200),
            event(Happening::Pass, None, 210, 210),
            event(Happening::Gather, None, 210, 220),
            event(Happening::Compute, Some(1), 220, 300),
        ];
        let p = passes(&events);
        assert_eq!(p.len(), 2);
        assert!(
            (p[0].length - 0.1).abs() < 1e-9 && (p[0].waiting - 0.05).abs() < 1e-9,
            "{p:?}"
        );
        assert!(
            (p[1].length - 0.09).abs() < 1e-9 && (p[1].waiting - 0.01).abs() < 1e-9,
            "{p:?}"
        );
        let many = vec![p[0]; 1000];
        let thin = thinned(&many);
        assert!(thin.len() <= MOST_BARS && (thin[7].length - 0.1).abs() < 1e-9);
    }

    #[test]
    fn names_cannot_break_out_of_the_page() {
        assert_eq!(
            escape("<a href=\"x\">&"),
            "&lt;a href=&quot;x&quot;&gt;&amp;"
        );
    }
}
