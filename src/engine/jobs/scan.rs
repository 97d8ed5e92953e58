//! Which rows there are, and which of them are finished: a few bytes a row, whatever the rows hold.

use serde::Deserialize;
use twox_hash::XxHash3_64;

use super::files::{RowLog, Span};
use super::input::{Line, Source};
use super::limits::{Largest, RowLimits};
use super::request::{Request, RowError, RowIds};
use super::shard::Shard;
use crate::error::{Code, Error, Result};

/// Begins every row id of ours.
pub const ID_PREFIX: &str = "batch_req_";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Pending,
    /// An earlier row has the same custom_id: an error to be written.
    Duplicate,
    Done,
    /// Its error is written.
    Failed,
    /// Another shard's.
    Elsewhere,
}

/// A row of the input.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    /// Hash of the custom_id; of the whole line where there is none.
    ident: u64,
    /// Low half of the row id.
    pub id: u64,
    pub line: u32,
    pub state: State,
}

/// All rows of the input, in order.
pub struct Scan {
    pub marks: Vec<Mark>,
    /// Indices of `marks`, by ident, then in order.
    by_ident: Vec<u32>,
    /// The most answer tokens that a row asks for in so many words.
    pub longest_answer: usize,
    pub largest: Largest,
}

/// What a result row says of itself; the rest is skipped.
#[derive(Deserialize)]
struct Head {
    id: String,
    custom_id: Option<String>,
    #[serde(default)]
    line: Option<u64>,
}

/// A row read from its line: its id, and the request or why there is none.
pub struct ParsedLine {
    pub id: u128,
    pub request: Result<Request, (Option<String>, RowError)>,
}

pub fn parse_line(source: &Source, line: &Line, ids: RowIds<'_>) -> ParsedLine {
    let request = Request::parse(source, line);
    let id = match &request {
        Ok(r) => r.id(ids),
        // What cannot be read is identified by its bytes; what is wrong with it does not depend on the rules.
        Err(_) => u128::from(line.hash(0)),
    };
    ParsedLine { id, request }
}

impl Scan {
    /// Reads the input once. `progress(rows)` now and then.
    pub fn read(
        source: &Source,
        shard: Shard,
        ids: RowIds<'_>,
        limits: &RowLimits,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Scan> {
        let mut lines = source.lines_up_to(limits.row_bytes)?;
        let mut marks = Vec::new();
        let mut longest_answer = 0;
        let mut largest = Largest::default();
        while let Some(line) = lines.next_line()? {
            let row = marks.len() as u64;
            let parsed = parse_line(source, &line, ids);
            let custom_id = match &parsed.request {
                Ok(r) => Some(r.custom_id.as_str()),
                Err((id, _)) => id.as_deref(),
            };
            // A row that is no request is read like any other.
            let text = match &parsed.request {
                Ok(r) => {
                    longest_answer = longest_answer.max(r.max_tokens());
                    r.text_bytes()
                }
                Err(_) => 0,
            };
            largest.add(&line, text, limits);
            marks.push(Mark {
                ident: match custom_id {
                    Some(id) => ident(id),
                    // Lines without an id are never duplicates of one another.
                    None => line.hash(line.number),
                },
                id: parsed.id as u64,
                line: u32::try_from(line.number).map_err(|_| too_many(source))?,
                state: match shard.has(row) {
                    true => State::Pending,
                    false => State::Elsewhere,
                },
            });
            if row.is_multiple_of(4096) {
                progress(row);
            }
        }
        let count = u32::try_from(marks.len()).map_err(|_| too_many(source))?;
        let mut by_ident: Vec<u32> = (0..count).collect();
        by_ident.sort_unstable_by_key(|i| (marks[*i as usize].ident, *i));
        for pair in by_ident.windows(2) {
            let (a, b) = (pair[0] as usize, pair[1] as usize);
            if marks[a].ident == marks[b].ident && marks[b].state == State::Pending {
                marks[b].state = State::Duplicate;
            }
        }
        Ok(Scan {
            marks,
            by_ident,
            longest_answer,
            largest,
        })
    }

    /// The first row with this custom_id.
    pub fn find(&self, custom_id: &str) -> Option<usize> {
        let wanted = ident(custom_id);
        let at = self
            .by_ident
            .partition_point(|i| self.marks[*i as usize].ident < wanted);
        let i = *self.by_ident.get(at)? as usize;
        (self.marks[i].ident == wanted).then_some(i)
    }

    /// The row on line `line`.
    pub fn on_line(&self, line: u64) -> Option<usize> {
        let found = self
            .marks
            .binary_search_by_key(&line, |m| u64::from(m.line));
        found.ok()
    }

    pub fn count(&self, state: State) -> u64 {
        self.marks.iter().filter(|m| m.state == state).count() as u64
    }

    /// Rows of this shard.
    pub fn ours(&self) -> u64 {
        self.marks.len() as u64 - self.count(State::Elsewhere)
    }

    /// Marks the rows that `log` answers, and cuts a torn end. A row that answers something else than what is asked now
    /// is refused: nothing of it could be trusted.
    pub fn resume(&mut self, log: &mut RowLog) -> Result<()> {
        let path = log.path().to_path_buf();
        let mut number = 0;
        log.scan(&mut |_, bytes| {
            number += 1;
            let Some((id, custom_id)) = result_head(bytes) else {
                return Ok(false);
            };
            let mismatch = |cause: String| {
                Err(Error::new(
                    Code::Usage,
                    format!("{} holds answers to another job", path.display()),
                    cause,
                    "give --overwrite to begin anew, or another output file",
                ))
            };
            let Some(i) = self.find(&custom_id) else {
                return mismatch(format!(
                    "its line {number} answers `{custom_id}`, which the input does not have"
                ));
            };
            let mark = &mut self.marks[i];
            match mark.state {
                State::Elsewhere => {
                    return mismatch(format!(
                        "its line {number} answers `{custom_id}`, which belongs to another shard"
                    ));
                }
                State::Done => return mismatch(format!("it answers `{custom_id}` twice")),
                _ => {}
            }
            if mark.id != id {
                return mismatch(format!(
                    "since its line {number} was written, the body of `{custom_id}`, one of its pictures, the model or a \
                     setting that changes tokens has changed"
                ));
            }
            mark.state = State::Done;
            Ok(true)
        })
    }

    /// That the errors in `log` are about rows of this input: two jobs with one errors file would lose each other's. An error without a
    /// custom_id is told by its line, unless the file is known to be this job's (`ours`): then the line was mended.
    pub fn expect_own_errors(&self, log: &RowLog, ours: bool) -> Result<()> {
        let mut number = 0;
        log.read_rows(&mut |_, bytes| {
            number += 1;
            let Ok(head) = serde_json::from_slice::<Head>(bytes) else {
                return Ok(());
            };
            let about = match (&head.custom_id, head.line) {
                (Some(id), _) if self.find(id).is_none() => format!("`{id}`"),
                (None, Some(line)) if !ours && !self.is_line(line, &head.id) => {
                    format!("line {line}")
                }
                _ => return Ok(()),
            };
            Err(Error::new(
                Code::Usage,
                format!("{} holds errors of another job", log.path().display()),
                format!("its line {number} is about {about}, which the input does not have"),
                "give --errors another file, or remove that one if nobody needs it",
            ))
        })
    }

    fn is_line(&self, line: u64, id: &str) -> bool {
        let found = self.on_line(line);
        found.is_some_and(|i| parse_id(id) == Some(self.marks[i].id))
    }

    /// Marks the rows whose errors `log` tells, and drops errors that no longer stand (the row was changed, or answered
    /// since). With `retry` all are dropped.
    pub fn resume_errors(&mut self, log: &mut RowLog, retry: bool) -> Result<()> {
        let mut keep = Vec::new();
        let mut rows = 0;
        log.scan(&mut |span, bytes| {
            let Some((id, line)) = error_head(bytes) else {
                return Ok(false);
            };
            rows += 1;
            if let Some(i) = self.on_line(line) {
                let mark = &mut self.marks[i];
                let open = matches!(mark.state, State::Pending | State::Duplicate);
                if open && mark.id == id && !retry {
                    mark.state = State::Failed;
                    keep.push(span);
                }
            }
            Ok(true)
        })?;
        match keep.len() < rows {
            true => log.reorder(&keep),
            false => Ok(()),
        }
    }

    /// Where the rows of `log` lie, in input order; `None` where they already lie so.
    pub fn input_order(&self, log: &mut RowLog) -> Result<Option<Vec<Span>>> {
        let mut rows: Vec<(u32, Span)> = Vec::new();
        log.scan(&mut |span, bytes| {
            let line = match (error_head(bytes), result_head(bytes)) {
                (Some((_, line)), _) => Some(line as u32),
                (None, Some((_, custom_id))) => self.find(&custom_id).map(|i| self.marks[i].line),
                (None, None) => None,
            };
            rows.extend(line.map(|line| (line, span)));
            Ok(line.is_some())
        })?;
        if rows.is_sorted_by_key(|(line, _)| *line) {
            return Ok(None);
        }
        rows.sort_by_key(|(line, _)| *line);
        Ok(Some(rows.into_iter().map(|(_, span)| span).collect()))
    }
}

pub fn ident(custom_id: &str) -> u64 {
    XxHash3_64::oneshot(custom_id.as_bytes())
}

/// Row id and custom_id of an answer; `None` where it is none.
pub fn result_head(bytes: &[u8]) -> Option<(u64, String)> {
    let head: Head = serde_json::from_slice(bytes).ok()?;
    match head.line {
        None => Some((parse_id(&head.id)?, head.custom_id?)),
        Some(_) => None,
    }
}

/// Row id and line of an error row.
pub fn error_head(bytes: &[u8]) -> Option<(u64, u64)> {
    let head: Head = serde_json::from_slice(bytes).ok()?;
    Some((parse_id(&head.id)?, head.line?))
}

/// Low half of the hash in a row id.
fn parse_id(id: &str) -> Option<u64> {
    let hex = id.strip_prefix(ID_PREFIX)?;
    u128::from_str_radix(hex, 16).ok().map(|id| id as u64)
}

fn too_many(source: &Source) -> Error {
    Error::new(
        Code::Usage,
        format!("{} has too many lines", source.path().display()),
        "a job has at most 4 billion rows",
        "split the file",
    )
}
