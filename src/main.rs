//! Exit codes only: 0 done, 1 failed, 2 usage, 3 finished with failed rows, 130 interrupted.

use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    match tensorpager::cli::run(std::env::args_os()) {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            // Nobody may be there to read it.
            let _ = writeln!(std::io::stderr(), "{e}");
            ExitCode::from(e.exit_code())
        }
    }
}
