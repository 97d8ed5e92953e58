//! Exit codes only: 0 done, 1 failed, 2 usage, 3 finished with failed rows, 130 interrupted.

use std::process::ExitCode;

fn main() -> ExitCode {
    match tensorpager::cli::run(std::env::args_os()) {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            eprintln!("{e}");
            ExitCode::from(e.exit_code())
        }
    }
}
