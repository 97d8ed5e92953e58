//! What is printed as it becomes known, and the record made of it.

use std::path::Path;
use std::time::Duration;

pub struct Report {
    smoke: bool,
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
            lines: Vec::new(),
            title: "GPU".into(),
            widths: Vec::new(),
            checks: 0,
            wrong: Vec::new(),
        }
    }

    /// What the record is called: the machine.
    pub fn title(&mut self, title: &str) {
        self.title = title.to_string();
    }

    fn line(&mut self, line: String) {
        self.lines.push(line);
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

    /// The record. `home` has `build.txt`, which says what was built.
    pub fn markdown(&self, home: &Path) -> String {
        let build = std::fs::read_to_string(home.join("build.txt")).unwrap_or_default();
        let smoke = match self.smoke {
            true => "**A smoke run at small shapes: its timings mean nothing.**\n\n",
            false => "",
        };
        format!(
            "# {}, {}\n\n{smoke}Made by the GPU suite (`gpu/README.md`). {}\n\n{}\n{}\n",
            chrono::Local::now().format("%Y-%m-%d"),
            self.title,
            build.trim(),
            self.verdict(),
            self.lines.join("\n")
        )
    }
}
