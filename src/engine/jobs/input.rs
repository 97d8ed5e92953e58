//! The rows of a job file, one at a time, whatever the file's size.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use serde::de::IgnoredAny;
use twox_hash::XxHash3_64;

use crate::error::{Code, Error, Result};

/// Bytes a row may have: more than any context holds, images inline included.
pub const MAX_ROW_BYTES: usize = 64 << 20;

/// What is looked at to tell whether a file holds rows at all.
const HEAD_BYTES: u64 = 1 << 20;
const HEAD_ROWS: usize = 64;
const UTF8_MARK: &[u8] = b"\xef\xbb\xbf";
pub(super) const GIVE_ROWS: &str = "give -i a file with a JSON object a line (OpenAI's batch format), or --prompts one with a prompt a line";

/// Where rows come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// OpenAI batch rows.
    Jsonl(PathBuf),
    /// A prompt a line. `chat`: as a user's message, else to be continued as it is.
    Prompts { path: PathBuf, chat: bool },
}

impl Source {
    pub fn path(&self) -> &Path {
        match self {
            Source::Jsonl(path) | Source::Prompts { path, .. } => path,
        }
    }

    /// Looks before it opens: a pipe that nobody writes to would be waited for.
    fn expect_file(&self) -> Result<()> {
        let path = self.path();
        let cause = match std::fs::metadata(path) {
            Ok(meta) if meta.is_dir() => "it is a folder",
            Ok(meta) if !meta.is_file() => {
                "it is a pipe or a device, and the rows are read more than once"
            }
            Err(_) if path == Path::new("-") => {
                "the rows are read more than once, and standard input cannot be"
            }
            // What is not there at all opening names best.
            Ok(_) | Err(_) => return Ok(()),
        };
        Err(Error::new(
            Code::Usage,
            format!("{} cannot be the input of a job", path.display()),
            cause,
            "put the rows into a file and give its path",
        ))
    }

    /// That the file is one of rows, by its beginning: a picture, a table or a pretty-printed array given by mistake would
    /// else be thousands of failed rows. A single line that is wrong is no reason: its row fails, the others go on.
    ///
    /// # Errors
    /// `Usage`: none of the first lines is a row, or all are blank; `Io`: the file cannot be read.
    pub fn expect_rows(&self) -> Result<()> {
        let mut head = Vec::new();
        let reader = self.lines()?.reader;
        reader
            .take(HEAD_BYTES)
            .read_to_end(&mut head)
            .map_err(|e| Error::io(format!("{} cannot be read", self.path().display()), &e))?;
        let cut = head.len() as u64 == HEAD_BYTES;
        let text = head.strip_prefix(UTF8_MARK).unwrap_or(&head);
        let mut seen = 0;
        for line in text.split_inclusive(|b| *b == b'\n') {
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            let whole = !cut || line.ends_with(b"\n");
            if self.is_like_a_row(line, seen == 0, whole) {
                return Ok(());
            }
            seen += 1;
            if seen == HEAD_ROWS {
                break;
            }
        }
        match (seen, cut) {
            (0, true) => Ok(()),
            (0, false) => Err(self.no_rows("every line is blank", GIVE_ROWS)),
            _ if head.starts_with(b"\xff\xfe") || head.starts_with(b"\xfe\xff") => Err(self
                .no_rows(
                    "it is UTF-16, as some editors and shells save text",
                    "save it as UTF-8: iconv -f UTF-16 -t UTF-8",
                )),
            _ if head.contains(&0) => Err(self.no_rows("it is not text", GIVE_ROWS)),
            _ => {
                let wanted = match self {
                    Source::Jsonl(_) => "a JSON object",
                    Source::Prompts { .. } => "UTF-8 text",
                };
                let cause = match seen {
                    1 => format!("its only line is not {wanted}"),
                    n => format!("none of its first {n} lines is {wanted}"),
                };
                Err(self.no_rows(&cause, GIVE_ROWS))
            }
        }
    }

    pub(super) fn no_rows(&self, cause: &str, fix: &str) -> Error {
        let what = format!("{} has no rows", self.path().display());
        Error::new(Code::Usage, what, cause, fix)
    }

    /// `first`: nothing but blank lines before it. `whole`: it is not cut off where the beginning ends.
    fn is_like_a_row(&self, line: &[u8], first: bool, whole: bool) -> bool {
        match self {
            Source::Prompts { .. } => match std::str::from_utf8(line) {
                Ok(text) => !text.contains('\0'),
                Err(e) => !whole && e.error_len().is_none(),
            },
            Source::Jsonl(_) => {
                // A file that begins with an object is one of rows, be the object broken; one that begins otherwise may be an array over many
                // lines, whose lines may begin like objects.
                let line = line.trim_ascii();
                let begins_one = line.len() > 1 && line[0] == b'{' && !line.contains(&0);
                let is_one = || serde_json::from_slice::<HashMap<String, IgnoredAny>>(line).is_ok();
                begins_one && (first || !whole || is_one())
            }
        }
    }

    pub fn lines(&self) -> Result<Lines> {
        self.lines_up_to(MAX_ROW_BYTES)
    }

    /// As [`Source::lines`], where rows of more than `limit` bytes are too long.
    pub fn lines_up_to(&self, limit: usize) -> Result<Lines> {
        let path = self.path();
        self.expect_file()?;
        let file = File::open(path)
            .map_err(|e| Error::io(format!("{} cannot be opened", path.display()), &e))?;
        Ok(Lines {
            path: path.to_path_buf(),
            reader: BufReader::with_capacity(1 << 18, file),
            number: 0,
            limit: limit.min(MAX_ROW_BYTES),
        })
    }
}

/// A line that is not blank.
#[derive(Debug)]
pub struct Line {
    /// From 1, blank lines counted.
    pub number: u64,
    /// Without its line end.
    pub bytes: Vec<u8>,
    pub too_long: Option<TooLong>,
}

/// Why a line is not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLong {
    /// Bytes of the line, or of memory that its values take beside it.
    pub bytes: u64,
    pub limit: u64,
}

/// Lines below this are read whatever they hold.
const SMALL_BYTES: usize = 1 << 20;
/// Memory that a value takes beside its text, and that an object's entry takes.
const VALUE_BYTES: u64 = 40;
/// Beginning of a line that is too long, by which it is known.
const BEGINNING_BYTES: usize = 64 << 10;

impl Line {
    /// A hash of the line, whatever it holds. Of one that is too long the beginning counts: the limit may be another next time.
    pub fn hash(&self, seed: u64) -> u64 {
        match self.too_long {
            None => XxHash3_64::oneshot_with_seed(seed, &self.bytes),
            Some(_) => self.hash_of_beginning(seed),
        }
    }

    pub fn hash_of_beginning(&self, seed: u64) -> u64 {
        let beginning = &self.bytes[..self.bytes.len().min(BEGINNING_BYTES)];
        XxHash3_64::oneshot_with_seed(seed, beginning)
    }

    /// Memory that the line takes once it is parsed, about: a list of small numbers takes many times its text.
    fn parsed_bytes(&self) -> u64 {
        let begins = |b: &&u8| matches!(b, b',' | b'[' | b'{');
        let values = self.bytes.iter().filter(begins).count();
        self.bytes.len() as u64 + VALUE_BYTES * values as u64
    }
}

/// The lines of a file that are not blank.
pub struct Lines {
    path: PathBuf,
    reader: BufReader<File>,
    number: u64,
    /// Most bytes of a row.
    limit: usize,
}

impl Lines {
    /// The next line; `None` at the end.
    pub fn next_line(&mut self) -> Result<Option<Line>> {
        loop {
            let mut bytes = Vec::new();
            let limit = self.limit as u64 + 1;
            let what = || format!("{} cannot be read", self.path.display());
            let read = (&mut self.reader)
                .take(limit)
                .read_until(b'\n', &mut bytes)
                .map_err(|e| Error::io(what(), &e))?;
            if read == 0 {
                return Ok(None);
            }
            self.number += 1;
            let mut too_long = None;
            let mut rest_is_blank = true;
            if read as u64 == limit && bytes.last() != Some(&b'\n') {
                let rest = skip_rest(&mut self.reader);
                let (skipped, is_blank) = rest.map_err(|e| Error::io(what(), &e))?;
                too_long = Some(read as u64 + skipped);
                rest_is_blank = is_blank;
            }
            if self.number == 1 && bytes.starts_with(UTF8_MARK) {
                bytes.drain(..3);
            }
            while matches!(bytes.last(), Some(b'\n' | b'\r')) {
                bytes.pop();
            }
            // Blank or not whatever the limit: rows are counted by readers with different ones.
            if !rest_is_blank || !bytes.iter().all(u8::is_ascii_whitespace) {
                if too_long.is_some() {
                    bytes.truncate(BEGINNING_BYTES);
                    bytes.shrink_to_fit();
                }
                let limit = self.limit as u64;
                let mut line = Line {
                    number: self.number,
                    bytes,
                    too_long: too_long.map(|bytes| TooLong { bytes, limit }),
                };
                if line.bytes.len() > SMALL_BYTES {
                    let bytes = line.parsed_bytes();
                    line.too_long =
                        (bytes > limit.max(SMALL_BYTES as u64)).then_some(TooLong { bytes, limit });
                }
                return Ok(Some(line));
            }
        }
    }
}

/// Up to the end of the line, in constant memory. The bytes passed over, and whether they are blank.
fn skip_rest(reader: &mut impl BufRead) -> std::io::Result<(u64, bool)> {
    let (mut skipped, mut is_blank) = (0, true);
    loop {
        let buffer = reader.fill_buf()?;
        if buffer.is_empty() {
            return Ok((skipped, is_blank));
        }
        let end = buffer.iter().position(|b| *b == b'\n');
        let rest = &buffer[..end.unwrap_or(buffer.len())];
        is_blank = is_blank && rest.iter().all(u8::is_ascii_whitespace);
        skipped += rest.len() as u64;
        let taken = rest.len() + usize::from(end.is_some());
        reader.consume(taken);
        if end.is_some() {
            return Ok((skipped, is_blank));
        }
    }
}
