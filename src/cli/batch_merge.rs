//! `batch-merge`: the outputs of all shards of a job, back into one file.

use std::path::{Path, PathBuf};

use clap::Args;

use super::run::print;
use crate::engine::jobs::{Paths, Source, default_errors, merge};
use crate::error::{Code, Error, Result};

#[derive(Args)]
#[command(after_help = "Example:
  tensorpager batch-merge -i prompts.jsonl -o answers.jsonl
merges answers.0-of-4.jsonl … answers.3-of-4.jsonl, as `batch -o answers.jsonl --shard i/4` wrote them.")]
pub struct BatchMergeArgs {
    /// The outputs of all shards [default: OUTPUT.i-of-n.jsonl beside the output]
    shards: Vec<PathBuf>,
    /// The requests all shards worked on
    #[arg(
        long,
        short = 'i',
        value_name = "FILE.jsonl",
        required_unless_present = "prompts"
    )]
    input: Option<PathBuf>,
    /// The plain prompts all shards worked on
    #[arg(long, value_name = "FILE.txt", conflicts_with = "input")]
    prompts: Option<PathBuf>,
    /// Where the answers go, in input order
    #[arg(long, short = 'o', value_name = "FILE.jsonl")]
    output: PathBuf,
    /// Where the failed rows go [default: OUTPUT.errors.jsonl]
    #[arg(long, value_name = "FILE.jsonl")]
    errors: Option<PathBuf>,
    /// One JSON object instead of a line
    #[arg(long)]
    json: bool,
}

pub fn run(args: BatchMergeArgs) -> Result<u8> {
    let source = match (args.input, args.prompts) {
        (Some(path), _) => Source::Jsonl(path),
        // Rows are told apart by line here, whatever becomes of their text.
        (None, Some(path)) => Source::Prompts { path, chat: false },
        (None, None) => return Err(Error::internal("an input was required")),
    };
    let shards = match args.shards.is_empty() {
        true => find_shards(&args.output)?,
        false => args.shards,
    };
    let to = Paths {
        errors: args.errors.unwrap_or_else(|| default_errors(&args.output)),
        output: args.output,
    };
    let report = merge(&source, &shards, &to)?;
    let answered = report.rows - report.failed;
    if args.json {
        let object = serde_json::json!({
            "rows": report.rows, "rows_done": answered, "rows_failed": report.failed,
            "shards": shards.len(), "output": to.output.display().to_string(),
        });
        print(&format!("{object}\n"))?;
    } else {
        print(&format!(
            "{answered} answers and {} failed rows of {} shards, in input order: {}\n",
            report.failed,
            shards.len(),
            to.output.display()
        ))?;
    }
    Ok(match report.failed {
        0 => 0,
        _ => 3,
    })
}

/// `answers.i-of-n.jsonl` for every i below the n that lie beside `answers.jsonl`.
fn find_shards(output: &Path) -> Result<Vec<PathBuf>> {
    let folder = match output.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    let stem = format!(
        "{}.",
        output.file_stem().unwrap_or_default().to_string_lossy()
    );
    let end = output
        .extension()
        .map(|e| format!(".{}", e.to_string_lossy()))
        .unwrap_or_default();
    let failed =
        |e: std::io::Error| Error::io(format!("{} cannot be listed", folder.display()), &e);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let middle = name
            .strip_prefix(&stem)
            .and_then(|rest| rest.strip_suffix(&end))
            .and_then(|m| m.split_once("-of-"))
            .and_then(|(i, n)| Some((i.parse::<u64>().ok()?, n.parse::<u64>().ok()?)));
        found.extend(middle.map(|(i, n)| (n, i, entry.path())));
    }
    found.sort();
    let refuse = |cause: String, fix: &str| {
        Err(Error::new(
            Code::Usage,
            format!("the shards of {} cannot be found", output.display()),
            cause,
            fix,
        ))
    };
    let Some(count) = found.first().map(|(n, _, _)| *n) else {
        let cause = format!("no {stem}i-of-n{end} lies in {}", folder.display());
        return refuse(cause, "name the files to merge");
    };
    if found.iter().any(|(n, _, _)| *n != count) {
        return refuse(
            "files of different sets of shards lie there".to_string(),
            "name the files to merge",
        );
    }
    if found.len() as u64 != count {
        return refuse(
            format!("{} of {count} are there", found.len()),
            "let every shard run first",
        );
    }
    Ok(found.into_iter().map(|(_, _, path)| path).collect())
}
