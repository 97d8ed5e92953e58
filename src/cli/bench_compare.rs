//! `bench compare`: two records of `bench MODEL`, row by row, and whether they differ by more than their own noise.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Deserialize;

use super::bench_model::budgets;
use crate::error::{Code, Error, Result};

#[derive(Args)]
#[command(after_help = "Example:
  tensorpager bench ./Qwen2.5-7B-Instruct -o json > before.json
  tensorpager bench compare before.json after.json")]
pub struct CompareArgs {
    /// What `bench MODEL -o json` (or jsonl) wrote
    before: PathBuf,
    /// The same of the run to hold against it
    after: PathBuf,
}

#[derive(Debug, Deserialize)]
struct Row {
    model: String,
    dtype: String,
    test: String,
    batch: usize,
    repetitions: usize,
    cpu_memory: Option<u64>,
    #[serde(default)]
    gpu_memory: Option<u64>,
    tokens_per_s: f64,
    tokens_per_s_deviation: f64,
}

impl Row {
    fn same_work(&self, other: &Row) -> bool {
        (
            &self.model,
            &self.dtype,
            &self.test,
            self.batch,
            self.cpu_memory,
            self.gpu_memory,
        ) == (
            &other.model,
            &other.dtype,
            &other.test,
            other.batch,
            other.cpu_memory,
            other.gpu_memory,
        )
    }

    /// Square of the standard error of the mean.
    fn error2(&self) -> f64 {
        self.tokens_per_s_deviation.powi(2) / self.repetitions.max(1) as f64
    }
}

pub fn run(args: CompareArgs) -> Result<u8> {
    let (before, after) = (read(&args.before)?, read(&args.after)?);
    super::run::print(&table(&before, &after))?;
    Ok(0)
}

/// Rows of one JSON object with `rows`, or of JSONL.
fn read(path: &Path) -> Result<Vec<Row>> {
    let bad = |cause: String| {
        Error::new(
            Code::Usage,
            format!("{} cannot be compared", path.display()),
            cause,
            "give files that `tensorpager bench MODEL -o json` or `-o jsonl` wrote",
        )
    };
    #[derive(Deserialize)]
    struct Whole {
        rows: Vec<Row>,
    }
    let text = std::fs::read_to_string(path).map_err(|e| bad(e.to_string()))?;
    if let Ok(whole) = serde_json::from_str::<Whole>(&text) {
        return Ok(whole.rows);
    }
    let lines = text.lines().filter(|l| !l.trim().is_empty());
    let rows = lines
        .map(|l| serde_json::from_str(l).map_err(|e| bad(e.to_string())))
        .collect::<Result<Vec<Row>>>()?;
    match rows.is_empty() {
        true => Err(bad("it has no rows".into())),
        false => Ok(rows),
    }
}

/// Two standard errors of the difference: beyond it the rows differ.
fn verdict(a: &Row, b: &Row) -> &'static str {
    let difference = b.tokens_per_s - a.tokens_per_s;
    if difference.abs() <= 2.0 * (a.error2() + b.error2()).sqrt() {
        "same"
    } else if difference > 0.0 {
        "faster"
    } else {
        "slower"
    }
}

fn table(before: &[Row], after: &[Row]) -> String {
    let mut text = String::from(
        "| model | type | budget | test | b | before t/s | after t/s | change | |\n\
         | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |\n",
    );
    let head = |r: &Row| {
        format!(
            "| {} | {} | {} | {} | {} |",
            r.model,
            r.dtype,
            budgets(r.cpu_memory, r.gpu_memory),
            r.test,
            r.batch
        )
    };
    for a in before {
        match after.iter().find(|b| a.same_work(b)) {
            Some(b) => {
                text += &format!(
                    "{} {:.2} ± {:.2} | {:.2} ± {:.2} | {:+.1} % | {} |\n",
                    head(a),
                    a.tokens_per_s,
                    a.tokens_per_s_deviation,
                    b.tokens_per_s,
                    b.tokens_per_s_deviation,
                    100.0 * (b.tokens_per_s / a.tokens_per_s - 1.0),
                    verdict(a, b)
                );
            }
            None => {
                text += &format!(
                    "{} {:.2} | | | only in the first |\n",
                    head(a),
                    a.tokens_per_s
                )
            }
        }
    }
    for b in after
        .iter()
        .filter(|b| !before.iter().any(|a| a.same_work(b)))
    {
        text += &format!(
            "{} | {:.2} | | only in the second |\n",
            head(b),
            b.tokens_per_s
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(tokens_per_s: f64, deviation: f64) -> Row {
        Row {
            model: "m".into(),
            dtype: "bfloat16".into(),
            test: "tg16".into(),
            batch: 1,
            repetitions: 4,
            cpu_memory: Some(1 << 30),
            gpu_memory: None,
            tokens_per_s,
            tokens_per_s_deviation: deviation,
        }
    }

    #[test]
    fn a_difference_counts_beyond_the_noise_of_both() {
        assert_eq!(verdict(&row(10.0, 0.5), &row(10.5, 0.5)), "same");
        assert_eq!(verdict(&row(10.0, 0.5), &row(11.0, 0.5)), "faster");
        assert_eq!(verdict(&row(10.0, 0.1), &row(9.0, 0.1)), "slower");
    }

    #[test]
    fn rows_of_other_work_are_not_compared() {
        let other = Row {
            batch: 8,
            ..row(80.0, 1.0)
        };
        let text = table(&[row(10.0, 0.1)], &[other]);
        assert!(
            text.contains("only in the first") && text.contains("only in the second"),
            "{text}"
        );
    }
}
