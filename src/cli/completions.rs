//! `completions`: what a shell needs to complete this program's commands and options.

use clap::Args;
use clap_complete::Shell;

use crate::error::Result;

#[derive(Args)]
#[command(after_help = "Examples:
  tensorpager completions bash > ~/.local/share/bash-completion/completions/tensorpager
  tensorpager completions zsh > ~/.zfunc/_tensorpager      (with fpath+=~/.zfunc before compinit)
  tensorpager completions fish > ~/.config/fish/completions/tensorpager.fish")]
pub struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

pub fn run(args: CompletionsArgs) -> Result<u8> {
    let mut script = Vec::new();
    clap_complete::generate(
        args.shell,
        &mut super::command(),
        "tensorpager",
        &mut script,
    );
    super::run::print(&String::from_utf8_lossy(&script))?;
    Ok(0)
}
