//! Shards back into one file: every row exactly once, in input order.

use std::path::PathBuf;

use super::files::{Paths, RowLog, Sidecar, Span, default_errors};
use super::input::Source;
use super::request::RowIds;
use super::scan::{Scan, State, error_head, result_head};
use super::shard::Shard;
use crate::error::{Code, Error, Result};

/// Missing or repeated rows named in an error; the rest are counted.
const SHOWN: usize = 5;

/// What was merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MergeReport {
    pub rows: u64,
    pub failed: u64,
}

/// Merges the outputs `shards` (and the errors beside them) of one job over `source` into `to`. Code::Usage when a row is
/// missing, there twice, or unknown; nothing is written then.
pub fn merge(source: &Source, shards: &[PathBuf], to: &Paths) -> Result<MergeReport> {
    same_settings(shards)?;
    let mut scan = Scan::read(source, Shard::WHOLE, RowIds::default(), &mut |_| {})?;
    // By row of the input: which log, and where in it.
    let mut places: Vec<Option<(usize, Span)>> = vec![None; scan.marks.len()];
    let mut logs = Vec::new();
    for path in shards {
        if [&to.output, &to.errors].contains(&path) {
            return Err(Error::new(
                Code::Usage,
                format!("{} cannot be merged into itself", path.display()),
                "it is a shard and the output",
                "give another output file",
            ));
        }
        let errors = default_errors(path);
        for (path, must) in [(path.clone(), true), (errors, false)] {
            if !must && !path.exists() {
                continue;
            }
            logs.push(RowLog::open_existing(&path)?);
            place(&mut scan, logs.len() - 1, &mut logs, &mut places)?;
        }
    }
    complete(&scan, &places, source)?;
    let report = MergeReport {
        rows: scan.marks.len() as u64,
        failed: scan.count(State::Failed),
    };
    write(&scan, &logs, &places, to)?;
    Ok(report)
}

/// Shards answered by different models, or under settings that change tokens, are not one job. Told by their sidecars, where
/// those lie beside them.
fn same_settings(shards: &[PathBuf]) -> Result<()> {
    let told: Vec<_> = shards
        .iter()
        .filter_map(|path| Some((path, Sidecar::peek(path)?.settings)))
        .collect();
    let Some(pair) = told.windows(2).find(|pair| pair[0].1 != pair[1].1) else {
        return Ok(());
    };
    Err(Error::new(
        Code::Usage,
        format!(
            "{} and {} are not of one job",
            pair[0].0.display(),
            pair[1].0.display()
        ),
        "they were made by different models, or with different settings",
        "make one of them anew (--overwrite) with the model and the settings of the others",
    ))
}

/// Notes where the rows of log `l` belong.
fn place(
    scan: &mut Scan,
    l: usize,
    logs: &mut [RowLog],
    places: &mut [Option<(usize, Span)>],
) -> Result<()> {
    let path = logs[l].path().to_path_buf();
    let wrong = |cause: String| {
        Err(Error::new(
            Code::Usage,
            format!("{} does not fit the input", path.display()),
            cause,
            "give the outputs of the shards of one job over this input",
        ))
    };
    let mut number = 0;
    logs[l].read_rows(&mut |span, bytes| {
        number += 1;
        let found = match (error_head(bytes), result_head(bytes)) {
            (Some((_, line)), _) => scan.on_line(line).map(|i| (i, State::Failed)),
            (None, Some((_, custom_id))) => scan.find(&custom_id).map(|i| (i, State::Done)),
            (None, None) => {
                return wrong(format!(
                    "line {number} is no result row (an unfinished shard?)"
                ));
            }
        };
        let Some((i, state)) = found else {
            return wrong(format!("the input has no row for its line {number}"));
        };
        if places[i].is_some() {
            let line = scan.marks[i].line;
            return wrong(format!("line {line} of the input is answered twice"));
        }
        places[i] = Some((l, span));
        scan.marks[i].state = state;
        Ok(())
    })
}

fn complete(scan: &Scan, places: &[Option<(usize, Span)>], source: &Source) -> Result<()> {
    let missing: Vec<u32> = places
        .iter()
        .zip(&scan.marks)
        .filter(|(place, _)| place.is_none())
        .map(|(_, mark)| mark.line)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let shown: Vec<String> = missing.iter().take(SHOWN).map(u32::to_string).collect();
    let more = match missing.len() > SHOWN {
        true => ", …",
        false => "",
    };
    Err(Error::new(
        Code::Usage,
        format!("{} of {} rows are missing", missing.len(), places.len()),
        format!(
            "lines {}{more} of {} have no answer",
            shown.join(", "),
            source.path().display()
        ),
        "let every shard finish (give its command again), and name all of them",
    ))
}

fn write(scan: &Scan, logs: &[RowLog], places: &[Option<(usize, Span)>], to: &Paths) -> Result<()> {
    for (path, state) in [(&to.output, State::Done), (&to.errors, State::Failed)] {
        if state == State::Failed && scan.count(state) == 0 {
            continue;
        }
        let mut rows = places
            .iter()
            .zip(&scan.marks)
            .filter(|(_, mark)| mark.state == state)
            .filter_map(|(place, _)| *place);
        RowLog::write_new(path, &mut || {
            rows.next().map(|(l, span)| logs[l].read(span)).transpose()
        })?;
    }
    Ok(())
}
