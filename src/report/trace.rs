//! A trace as Chrome's trace event format, which Perfetto and chrome://tracing read.
//! <https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU>

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use serde_json::json;

use crate::error::{Error, Result};
use crate::paging::{Happening, Pager, Trace, TraceEvent};

/// Track of the computing side; reads have one track a slot behind it, since fills overlap.
const COMPUTING: u64 = 1;

/// Writes the events kept as one JSON object. To be called while the engine rests.
///
/// # Errors
/// `Io`: the file cannot be written.
pub fn write(path: &Path, trace: &Trace, pager: &Pager) -> Result<()> {
    let slots = pager.plan().slots.max(1);
    let failed = |e: std::io::Error| Error::io(format!("{} cannot be written", path.display()), &e);
    let mut out = BufWriter::new(File::create(path).map_err(failed)?);
    out.write_all(b"{\"displayTimeUnit\":\"ms\",\"traceEvents\":[")
        .map_err(failed)?;
    write!(out, "{}", track(COMPUTING, "forward pass")).map_err(failed)?;
    for slot in 0..slots as u64 {
        write!(
            out,
            ",\n{}",
            track(COMPUTING + 1 + slot, &format!("reads, slot {slot}"))
        )
        .map_err(failed)?;
    }
    let copies = COMPUTING + 1 + slots as u64;
    let on_gpu = [
        (copies, "copies to the GPU"),
        (copies + 1, "keys and values to the GPU"),
    ];
    for (tid, name) in on_gpu.iter().filter(|_| pager.plan().gpu.is_some()) {
        write!(out, ",\n{}", track(*tid, name)).map_err(failed)?;
    }
    let mut reads = 0;
    for event in trace.events() {
        let tid = match event.what {
            Happening::Read => {
                reads += 1;
                COMPUTING + 1 + (reads - 1) % slots as u64
            }
            Happening::Copy => copies,
            Happening::Kv => copies + 1,
            _ => COMPUTING,
        };
        write!(out, ",\n{}", line(&event, tid, pager)).map_err(failed)?;
    }
    out.write_all(b"]}\n")
        .and_then(|()| out.flush())
        .map_err(failed)
}

fn track(tid: u64, name: &str) -> serde_json::Value {
    json!({"name": "thread_name", "ph": "M", "pid": 1, "tid": tid, "args": {"name": name}})
}

fn line(e: &TraceEvent, tid: u64, pager: &Pager) -> serde_json::Value {
    let name = match e.unit {
        Some(unit) => pager.unit_name(unit).to_string(),
        None => e.what.name().to_string(),
    };
    let us = |ns: u64| ns as f64 / 1e3;
    match e.what {
        Happening::Pass => json!({
            "name": name, "cat": e.what.name(), "ph": "i", "s": "g", "ts": us(e.start_ns), "pid": 1, "tid": tid
        }),
        _ => json!({
            "name": name, "cat": e.what.name(), "ph": "X", "ts": us(e.start_ns),
            "dur": us(e.end_ns.saturating_sub(e.start_ns)), "pid": 1, "tid": tid,
            "args": {"what": e.what.name(), "bytes": e.bytes}
        }),
    }
}
