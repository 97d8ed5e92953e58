//! Shards back into one file: every row exactly once, in input order.

use std::path::{Path, PathBuf};

use super::files::{JobMark, Paths, RowLog, Sidecar, Span, trouble};
use super::input::Source;
use super::job::absolute;
use super::limits::RowLimits;
use super::pictures::PictureIds;
use super::request::RowIds;
use super::scan::{Scan, State, error_head, parse_line, result_head};
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
    let key = same_settings(shards)?;
    let limits = RowLimits::default();
    let mut scan = Scan::read(
        source,
        Shard::WHOLE,
        RowIds::default(),
        &limits,
        &mut |_| {},
    )?;
    // By row of the input: which log, and where in it.
    let mut places = Places {
        spans: vec![None; scan.marks.len()],
        ids: vec![0; scan.marks.len()],
    };
    let mut logs = Vec::new();
    for path in shards {
        let errors = JobMark::errors_of(Sidecar::peek(path).as_ref(), path);
        let outputs = [&to.output, &to.errors].map(|p| absolute(p));
        if let Some(path) = [path, &errors]
            .into_iter()
            .find(|p| outputs.contains(&absolute(p)))
        {
            return Err(Error::new(
                Code::Usage,
                format!("{} cannot be merged into itself", path.display()),
                "it is a shard and the output",
                "give another output file",
            ));
        }
        for (path, must) in [(path.clone(), true), (errors, false)] {
            if !must && !path.exists() {
                continue;
            }
            logs.push(RowLog::open_existing(&path)?);
            place(&mut scan, logs.len() - 1, &mut logs, &mut places)?;
        }
    }
    complete(&scan, &places.spans, source)?;
    if let Some(key) = key {
        same_rows(source, &scan, &places.ids, key)?;
    }
    let report = MergeReport {
        rows: scan.marks.len() as u64,
        failed: scan.count(State::Failed),
    };
    write(&scan, &logs, &places.spans, to)?;
    Ok(report)
}

/// By row of the input: which log answers it, and where in it; the id it answers (low half).
struct Places {
    spans: Vec<Option<(usize, Span)>>,
    ids: Vec<u64>,
}

/// Shards answered by different models, or under settings that change tokens, are not one job. Told by their sidecars, where
/// those lie beside them; the settings' hash where one does.
fn same_settings(shards: &[PathBuf]) -> Result<Option<u64>> {
    let told: Vec<_> = shards
        .iter()
        .filter_map(|path| Some((path, Sidecar::peek(path)?.settings)))
        .collect();
    let Some(pair) = told.windows(2).find(|pair| pair[0].1 != pair[1].1) else {
        return Ok(told.first().map(|(_, settings)| *settings));
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
fn place(scan: &mut Scan, l: usize, logs: &mut [RowLog], places: &mut Places) -> Result<()> {
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
            (Some((id, line)), _) => scan.on_line(line).map(|i| (i, id, State::Failed)),
            (None, Some((id, custom_id))) => scan.find(&custom_id).map(|i| (i, id, State::Done)),
            (None, None) => {
                return wrong(format!(
                    "line {number} is no result row (an unfinished shard?)"
                ));
            }
        };
        let Some((i, id, state)) = found else {
            return wrong(format!("the input has no row for its line {number}"));
        };
        if places.spans[i].is_some() {
            let line = scan.marks[i].line;
            return wrong(format!("line {line} of the input is answered twice"));
        }
        places.spans[i] = Some((l, span));
        places.ids[i] = id;
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

/// That the rows are those the shards had: an id is a hash of the row, of the settings (`key`) and of the pictures it names.
fn same_rows(source: &Source, scan: &Scan, ids: &[u64], key: u64) -> Result<()> {
    let pictures = PictureIds::new(source.path());
    let seeing = [None, Some(&pictures)].map(|pictures| RowIds { key, pictures });
    // Whether plain prompts were sent as messages the model decided.
    let readings = match source {
        Source::Jsonl(_) => vec![source.clone()],
        Source::Prompts { path, .. } => [true, false]
            .map(|chat| Source::Prompts {
                path: path.clone(),
                chat,
            })
            .to_vec(),
    };
    let mut lines = source.lines()?;
    for (mark, id) in scan.marks.iter().zip(ids) {
        let Some(line) = lines.next_line()? else {
            break;
        };
        let is_same = |reading: &Source, ids: RowIds<'_>| {
            let row = parse_line(reading, &line, ids);
            let gone = ids.pictures.is_some()
                && row.request.is_ok_and(|r| !pictures.are_there(r.fields()));
            // Where the pictures do not lie on this machine, there is nothing to compare.
            row.id as u64 == *id || gone
        };
        let same = readings
            .iter()
            .any(|reading| seeing.iter().any(|ids| is_same(reading, *ids)))
            || (mark.state == State::Failed && line.hash_of_beginning(0) == *id);
        if !same {
            return Err(Error::new(
                Code::Usage,
                format!(
                    "{} is not what the shards worked on",
                    source.path().display()
                ),
                format!(
                    "since it was answered, the row on line {} or one of its pictures has changed",
                    mark.line
                ),
                "run that shard again (--overwrite), or give the input that the shards had",
            ));
        }
    }
    Ok(())
}

fn write(scan: &Scan, logs: &[RowLog], places: &[Option<(usize, Span)>], to: &Paths) -> Result<()> {
    for (path, state) in [(&to.output, State::Done), (&to.errors, State::Failed)] {
        if state == State::Failed && scan.count(state) == 0 {
            remove_errors(path)?;
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

/// Errors that an earlier merge left no longer stand. A file of something else is left alone.
fn remove_errors(path: &Path) -> Result<()> {
    let Ok(log) = RowLog::open_existing(path) else {
        return Ok(());
    };
    let mut ours = true;
    log.read_rows(&mut |_, bytes| {
        ours &= error_head(bytes).is_some();
        Ok(())
    })?;
    match ours {
        true => std::fs::remove_file(path).map_err(|e| trouble(path, &e)),
        false => Ok(()),
    }
}
