//! What is printed as it becomes known, and the record made of it.

use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where the record goes.
struct Place {
    file: PathBuf,
    /// Has `build.txt`, which says what was built.
    home: PathBuf,
}

pub struct Report {
    smoke: bool,
    place: Option<Place>,
    /// The section that runs.
    running: Option<String>,
    lines: Vec<String>,
    title: String,
    widths: Vec<usize>,
    checks: usize,
    wrong: Vec<String>,
}

impl Report {
    pub fn new(smoke: bool) -> Report {
        Report {
            smoke,
            place: None,
            running: None,
            lines: Vec::new(),
            title: "GPU".into(),
            widths: Vec::new(),
            checks: 0,
            wrong: Vec::new(),
        }
    }

    /// From now on the record is there after every line: whatever ends this program leaves what was known by then.
    pub fn keep(&mut self, file: &Path, home: &Path) {
        self.place = Some(Place {
            file: file.to_path_buf(),
            home: home.to_path_buf(),
        });
    }

    pub fn running(&mut self, section: Option<&str>) {
        self.running = section.map(str::to_string);
        self.kept();
    }

    /// Writes the record. One that cannot be written now may be at the end, where that is said.
    fn kept(&self) {
        let _ = self.save();
    }

    /// The record as it stands, whole at every moment.
    pub fn save(&self) -> std::io::Result<()> {
        let Some(Place { file, home }) = &self.place else {
            return Ok(());
        };
        let mut new = file.as_os_str().to_os_string();
        new.push(".new");
        std::fs::write(&new, self.markdown(home))?;
        std::fs::rename(&new, file)
    }

    /// What the record is called: the machine.
    pub fn title(&mut self, title: &str) {
        self.title = title.to_string();
    }

    fn line(&mut self, line: String) {
        self.lines.push(line);
        self.kept();
    }

    /// Begins a table.
    pub fn table(&mut self, name: &str, columns: &[&str]) {
        println!("\n{name}");
        self.line(format!("\n## {name}\n"));
        self.widths = columns.iter().map(|c| c.chars().count().max(9)).collect();
        self.widths[0] = self.widths[0].max(34);
        self.print(columns);
        self.line(format!("| {} |", columns.join(" | ")));
        self.line(format!("|{}", "---|".repeat(columns.len())));
    }

    fn print(&self, cells: &[&str]) {
        let cell = |(i, text): (usize, &&str)| {
            let width = self.widths.get(i).copied().unwrap_or(9);
            match i {
                0 => format!("{text:<width$}"),
                _ => format!("{text:>width$}"),
            }
        };
        let cells: Vec<String> = cells.iter().enumerate().map(cell).collect();
        println!("  {}", cells.join("  ").trim_end());
    }

    pub fn row(&mut self, cells: &[&str]) {
        self.print(cells);
        self.line(format!("| {} |", cells.join(" | ")));
    }

    /// A row that says whether something holds.
    pub fn checked(&mut self, holds: bool, cells: &[&str]) {
        self.checks += 1;
        let mark = if holds { "ok" } else { "WRONG" };
        let mut cells = cells.to_vec();
        match cells.last_mut().filter(|c| c.is_empty()) {
            Some(last) => *last = mark,
            None => cells.push(mark),
        }
        if !holds {
            self.wrong.push(cells.join(" "));
        }
        self.row(&cells);
    }

    /// A row of the table for what was left out, and why.
    pub fn not_run(&mut self, what: &str, why: &str) {
        let columns = self.widths.len().max(2);
        let said = format!("not run: {why}");
        let mut cells = vec!["-"; columns];
        (cells[0], cells[columns - 1]) = (what, &said);
        self.row(&cells);
    }

    pub fn note(&mut self, text: &str) {
        println!("  {text}");
        self.line(format!("\n{text}\n"));
    }

    pub fn failed(&mut self, what: &str) {
        self.checks += 1;
        self.wrong.push(what.to_string());
        self.note(&format!("FAILED {what}"));
    }

    pub fn took(&mut self, section: &str, time: Duration) {
        println!("  ({section}: {:.1} s)", time.as_secs_f64());
    }

    pub fn good(&self) -> bool {
        self.wrong.is_empty()
    }

    pub fn verdict(&self) -> String {
        match self.good() {
            true => format!("all {} checks hold", self.checks),
            false => format!(
                "{} of {} checks do not hold:\n  {}",
                self.wrong.len(),
                self.checks,
                self.wrong.join("\n  ")
            ),
        }
    }

    fn markdown(&self, home: &Path) -> String {
        let build = std::fs::read_to_string(home.join("build.txt")).unwrap_or_default();
        let smoke = match self.smoke {
            true => "**A smoke run at small shapes: its timings mean nothing.**\n\n",
            false => "",
        };
        let unfinished = match &self.running {
            Some(section) => {
                format!("**Not finished: this was written while `{section}` ran.**\n\n")
            }
            None => String::new(),
        };
        format!(
            "# {}, {}\n\n{smoke}{unfinished}Made by the GPU suite (`gpu/README.md`). {}\n\n{}\n{}\n",
            chrono::Local::now().format("%Y-%m-%d"),
            self.title,
            build.trim(),
            self.verdict(),
            self.lines.join("\n")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_record_is_there_before_the_end_and_says_what_ran() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("record.md");
        let read = || std::fs::read_to_string(&file).unwrap();
        let mut report = Report::new(false);
        report.keep(&file, dir.path());
        report.running(Some("ops"));
        report.table("Ops", &["op", ""]);
        report.checked(true, &["softmax", ""]);
        let text = read();
        assert!(
            text.contains("while `ops` ran") && text.contains("| softmax | ok |"),
            "{text}"
        );
        report.failed("ops: it panicked");
        report.running(None);
        let text = read();
        assert!(
            !text.contains("Not finished") && text.contains("FAILED ops"),
            "{text}"
        );
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
