//! What all commands have in common on the outside: an environment variable for every option, and a first page that groups
//! the commands.

use std::ffi::OsString;
use std::fmt::Write;

use clap::builder::{BoolishValueParser, Resettable};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command, Id};

use crate::error::{Code, Error, Result};
use crate::units::{flag_size, parse_size};

const PREFIX: &str = "TENSORPAGER_";

/// The commands as the first page shows them. A command without a group would not be shown: a test looks.
const GROUPS: [(&str, &[&str]); 4] = [
    ("Generate", &["run", "score"]),
    (
        "Files of requests",
        &["batch", "batch-check", "batch-merge"],
    ),
    ("Models", &["pull", "pack", "verify", "inspect", "clean"]),
    (
        "This machine",
        &["doctor", "plan", "tune", "bench", "demo", "completions"],
    ),
];

const FOOT: &str = "\
Examples:
  tensorpager doctor                                       can this machine do it?
  tensorpager run Qwen/Qwen2.5-0.5B-Instruct -p 'Why is the sky blue?'
  tensorpager run ./Qwen2.5-7B-Instruct --cpu-memory 6GiB  a chat, in 6 GiB

`tensorpager COMMAND --help` explains one. Every option can also be set by the environment: --cpu-memory as
TENSORPAGER_CPU_MEMORY; the option wins. RUST_LOG=tensorpager=debug logs to stderr; NO_COLOR is honoured.";

/// Options that few need: `--help` lists them, `-h` does not.
const RARE: [&str; 20] = [
    "allow-overflow",
    "allow-external",
    "config-from",
    "offload-limit",
    "device-map",
    "max-memory",
    "prefetch-depth",
    "page-size",
    "queue-depth",
    "ring-size",
    "pinned-memory",
    "io",
    "verify",
    "threads",
    "min-p",
    "repetition-penalty",
    "ignore-eos",
    "frame-sampling",
    "min-pixels",
    "trace",
];

/// The variable of an option; `None` for what is no option (positional values, --help).
pub(super) fn variable(arg: &Arg) -> Option<String> {
    let long = arg.get_long()?;
    let answers = matches!(
        arg.get_action(),
        ArgAction::Help | ArgAction::HelpShort | ArgAction::HelpLong | ArgAction::Version
    );
    (!answers).then(|| format!("{PREFIX}{}", long.to_uppercase().replace('-', "_")))
}

/// Gives every option of `command` and of those below it its variable. A flag reads 1, true, yes, on and their opposites.
pub(super) fn with_environment(command: Command) -> Command {
    command
        .mut_args(|arg| match variable(&arg) {
            None => arg,
            Some(name) => {
                let arg = match arg.get_action() {
                    ArgAction::SetTrue => arg.value_parser(BoolishValueParser::new()),
                    // `--temperature -1` is a value to refuse, not an option `-1`.
                    _ => arg.allow_negative_numbers(true),
                };
                let rare = arg.get_long().is_some_and(|long| RARE.contains(&long));
                // Not one line more in the help for each: its foot says how they are called.
                arg.env(name).hide_env(true).hide_short_help(rare)
            }
        })
        .mut_subcommands(with_environment)
}

/// Options that go against `--greedy` without excluding it: where one is typed, that variable is silent.
const AGAINST_GREEDY: [&str; 4] = ["temperature", "top_k", "top_p", "min_p"];

/// The option that bounds what an entry of `--max-memory` is about.
fn budget_of(device: &str) -> Option<&'static str> {
    match device.trim() {
        "cpu" => Some("cpu_memory"),
        "disk" => None,
        _ => Some("gpu_memory"),
    }
}

/// `command`, reading no variable that goes against what is typed in `args`: what was typed wins.
pub(super) fn heeding_what_is_typed(command: Command, args: &[OsString]) -> Command {
    let bare = without_environment(command.clone()).ignore_errors(true);
    match bare.try_get_matches_from(args) {
        Ok(found) => silenced(command, &found),
        Err(_) => command,
    }
}

fn without_environment(command: Command) -> Command {
    command
        .mut_args(|arg| arg.env(Resettable::Reset))
        .mut_subcommands(without_environment)
}

fn silenced(command: Command, found: &ArgMatches) -> Command {
    let typed =
        |arg: &Arg| found.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine);
    let mut silent: Vec<Id> = Vec::new();
    for arg in command.get_arguments() {
        // Conflicts are declared on one side.
        for other in command.get_arg_conflicts_with(arg) {
            if typed(arg) {
                silent.push(other.get_id().clone());
            }
            if typed(other) {
                silent.push(arg.get_id().clone());
            }
        }
        if AGAINST_GREEDY.contains(&arg.get_id().as_str()) && typed(arg) {
            silent.push(Id::from("greedy"));
        }
    }
    if let Ok(Some(map)) = found.try_get_one::<String>("max_memory") {
        let devices = map.split(',').filter_map(|entry| entry.split('=').next());
        silent.extend(devices.filter_map(budget_of).map(Id::from));
    }
    let command = command.mut_args(|arg| match silent.contains(arg.get_id()) {
        true => arg.env(Resettable::Reset),
        false => arg,
    });
    match found.subcommand() {
        Some((name, inner)) => command.mut_subcommand(name, |c| silenced(c, inner)),
        None => command,
    }
}

/// `--max-memory` and `--cpu-memory` (or `--gpu-memory`) that say different things in the same place, on the command line or in the
/// environment.
pub(super) fn two_budgets(found: &ArgMatches) -> Result<()> {
    if let Some((_, inner)) = found.subcommand() {
        two_budgets(inner)?;
    }
    let Ok(Some(map)) = found.try_get_one::<String>("max_memory") else {
        return Ok(());
    };
    for entry in map.split(',') {
        let Some((device, amount)) = entry.split_once('=') else {
            continue;
        };
        let Some(id) = budget_of(device) else {
            continue;
        };
        let (Ok(Some(other)), Ok(bytes)) = (found.try_get_one::<u64>(id), parse_size(amount))
        else {
            continue;
        };
        if *other != bytes && found.value_source(id) == found.value_source("max_memory") {
            return Err(Error::new(
                Code::Usage,
                format!(
                    "--max-memory {map} and --{} {} contradict each other",
                    id.replace('_', "-"),
                    flag_size(*other)
                ),
                "both bound the same memory",
                "leave one of them out",
            ));
        }
    }
    Ok(())
}

/// The variables of the options that a message names, where they are set.
pub(super) fn variables_set(message: &str) -> Vec<String> {
    let options = message.split("--").skip(1).map(|rest| {
        let name = rest
            .chars()
            .take_while(|c| c.is_ascii_alphanumeric() || *c == '-');
        let name: String = name.collect();
        format!("{PREFIX}{}", name.to_uppercase().replace('-', "_"))
    });
    options
        .filter(|name| std::env::var_os(name).is_some())
        .collect()
}

/// The first page: groups instead of one long list.
pub(super) fn with_first_page(command: Command) -> Command {
    let mut page = String::from("{about}\n\n{usage-heading} {usage}\n");
    for (title, names) in GROUPS {
        let _ = write!(page, "\n{title}:\n");
        let known = names.iter().filter_map(|n| command.find_subcommand(n));
        for c in known {
            let about = c.get_about().map(ToString::to_string).unwrap_or_default();
            let _ = writeln!(page, "  {:<12} {about}", c.get_name());
        }
    }
    page += "\nOptions:\n{options}{after-help}";
    command.help_template(page).after_help(FOOT)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn walk(command: &Command, path: &str, look: &mut dyn FnMut(&str, &Command)) {
        let path = format!("{path} {}", command.get_name());
        look(&path, command);
        for sub in command.get_subcommands() {
            walk(sub, &path, look);
        }
    }

    #[test]
    fn every_option_has_its_variable() {
        let mut seen = 0;
        walk(&super::super::command(), "", &mut |path, command| {
            let mut here = BTreeSet::new();
            for arg in command.get_arguments() {
                let Some(name) = variable(arg) else {
                    assert!(
                        arg.is_positional() || arg.get_env().is_none(),
                        "{path} {arg}"
                    );
                    continue;
                };
                seen += 1;
                let env = arg.get_env().map(|e| e.to_string_lossy().into_owned());
                assert_eq!(env.as_deref(), Some(name.as_str()), "{path} {arg}");
                assert!(here.insert(name), "{path} {arg}: another option has it");
            }
        });
        assert!(seen > 80, "{seen} options");
    }

    #[test]
    fn every_command_is_on_the_first_page_and_says_what_it_does() {
        let command = super::super::command();
        let page = command.clone().render_help().to_string();
        for sub in command.get_subcommands().filter(|c| c.get_name() != "help") {
            let line = format!("\n  {} ", sub.get_name());
            assert!(page.contains(&line), "{} is in no group", sub.get_name());
            assert!(sub.get_about().is_some(), "{}", sub.get_name());
        }
    }

    #[test]
    fn help_is_narrow_and_every_option_is_explained() {
        walk(&super::super::command(), "", &mut |path, command| {
            let text = command.clone().render_long_help().to_string();
            let long = text.lines().find(|l| l.chars().count() > 160);
            assert_eq!(long, None, "{path}");
            for arg in command.get_arguments() {
                assert!(arg.get_help().is_some(), "{path}: {arg} has no explanation");
            }
        });
    }

    #[test]
    fn an_entry_of_max_memory_is_about_one_budget() {
        assert_eq!(budget_of(" cpu "), Some("cpu_memory"));
        assert_eq!(budget_of("0"), Some("gpu_memory"));
        assert_eq!(budget_of("disk"), None);
    }

    #[test]
    fn the_command_line_is_sound() {
        super::super::command().debug_assert();
    }
}
