//! The rows of a job file, one at a time, whatever the file's size.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use crate::error::{Code, Error, Result};

/// Bytes a row may have: more than any context holds, images inline included.
pub const MAX_ROW_BYTES: usize = 64 << 20;

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

    pub fn lines(&self) -> Result<Lines> {
        let path = self.path();
        self.expect_file()?;
        let file = File::open(path)
            .map_err(|e| Error::io(format!("{} cannot be opened", path.display()), &e))?;
        Ok(Lines {
            path: path.to_path_buf(),
            reader: BufReader::with_capacity(1 << 18, file),
            number: 0,
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
    /// The line goes on beyond [`MAX_ROW_BYTES`]: `bytes` is its beginning.
    pub too_long: bool,
}

/// The lines of a file that are not blank.
pub struct Lines {
    path: PathBuf,
    reader: BufReader<File>,
    number: u64,
}

impl Lines {
    /// The next line; `None` at the end.
    pub fn next_line(&mut self) -> Result<Option<Line>> {
        loop {
            let mut bytes = Vec::new();
            let limit = MAX_ROW_BYTES as u64 + 1;
            let what = || format!("{} cannot be read", self.path.display());
            let read = (&mut self.reader)
                .take(limit)
                .read_until(b'\n', &mut bytes)
                .map_err(|e| Error::io(what(), &e))?;
            if read == 0 {
                return Ok(None);
            }
            self.number += 1;
            let too_long = read as u64 == limit && bytes.last() != Some(&b'\n');
            if too_long {
                let skipped = skip_rest(&mut self.reader);
                skipped.map_err(|e| Error::io(what(), &e))?;
            }
            if self.number == 1 && bytes.starts_with(b"\xef\xbb\xbf") {
                bytes.drain(..3);
            }
            while matches!(bytes.last(), Some(b'\n' | b'\r')) {
                bytes.pop();
            }
            if !bytes.iter().all(u8::is_ascii_whitespace) {
                return Ok(Some(Line {
                    number: self.number,
                    bytes,
                    too_long,
                }));
            }
        }
    }
}

/// Up to the end of the line, in constant memory.
fn skip_rest(reader: &mut impl BufRead) -> std::io::Result<()> {
    loop {
        let buffer = reader.fill_buf()?;
        if buffer.is_empty() {
            return Ok(());
        }
        match buffer.iter().position(|b| *b == b'\n') {
            Some(at) => {
                reader.consume(at + 1);
                return Ok(());
            }
            None => {
                let n = buffer.len();
                reader.consume(n);
            }
        }
    }
}
