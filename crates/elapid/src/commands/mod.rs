//! The subcommands, one file each.

mod bench;
mod compile;
mod convert;
mod diff;
mod doctor;
mod eval;
mod generate;
mod inspect;
mod quickstart;
mod replay;
mod selftest;
mod show;
mod tokenize;
mod train;

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{ArgAction, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::Error;
use crate::config::file::words;
use crate::error::{quiet, say};
use crate::parallel;

/// Trains Mamba-2 language models: text in, a Hugging Face compatible model out.
#[derive(Parser)]
#[command(name = "elapid", version, args_override_self = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Text → tokens → trained model → sample, in minutes, offline
    Quickstart(quickstart::QuickstartArgs),
    /// Pack text into a dataset of token blocks
    Tokenize(tokenize::TokenizeArgs),
    /// Train a model
    Train(Box<train::TrainCommand>),
    /// Repeat a training step that was not finite, and say where it went wrong
    Replay(replay::ReplayArgs),
    /// Write the training step as HLO modules for a Trainium compiler
    Compile(compile::CompileArgs),
    /// Loss and perplexity of a model on a dataset
    Eval(eval::EvalArgs),
    /// Continue a prompt
    Generate(generate::GenerateArgs),
    /// Models of other programs, in and out
    Convert(convert::ConvertArgs),
    /// Compare two models of any formats; exit code 0: equal, 1: different, 2: one cannot be read
    Diff(diff::DiffArgs),
    /// Say what a model, dataset, checkpoint or run holds
    Inspect(inspect::InspectArgs),
    /// Speed of kernels, training and generation beside this machine's limits
    Bench(bench::BenchArgs),
    /// Say what this machine can do, and check every kernel on it
    Doctor(doctor::DoctorArgs),
    /// Check every op on a device against its f64 definition: the first thing to run on a new instance
    Selftest(selftest::SelftestArgs),
}

/// Runs the command line `args`, program name first. Errors go to stderr as `error:` and `hint:`.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args = args.into_iter().enumerate().map(|(i, arg)| kebab_case(i, arg)).collect();
    let args = match with_file(args) {
        Ok(args) => args,
        Err(error) => return fail(&error, ExitCode::FAILURE),
    };
    let matches = command().try_get_matches_from(args);
    let cli = match matches.and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => cli,
        Err(error) => {
            let code = error.exit_code();
            // Nothing is left to do where even this cannot be printed.
            let _ = error.print();
            return ExitCode::from(code as u8);
        }
    };
    let result = match cli.command {
        Command::Quickstart(args) => quickstart::run(&args),
        Command::Tokenize(args) => tokenize::run(args),
        Command::Train(args) => train::run(*args),
        Command::Replay(args) => replay::run(&args),
        Command::Compile(args) => compile::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Convert(args) => convert::run(args),
        Command::Diff(args) => match diff::run(&args) {
            Ok(true) => Ok(()),
            Ok(false) => return ExitCode::FAILURE,
            Err(error) => return fail(&error, ExitCode::from(2)),
        },
        Command::Inspect(args) => inspect::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Selftest(args) => selftest::run(&args),
    };
    match result {
        Ok(()) => {
            parallel::finish();
            ExitCode::SUCCESS
        }
        Err(error) => fail(&error, ExitCode::FAILURE),
    }
}

/// Says what is wrong; `code` is the exit code unless a signal asked for it.
fn fail(error: &Error, code: ExitCode) -> ExitCode {
    let who = parallel::let_the_first_speak(error);
    let what = if error.signal().is_some() { "stopped" } else { "error" };
    say(format_args!("{what}: {who}{error}"));
    if let Some(hint) = error.hint() {
        say(format_args!("hint: {hint}"));
    }
    error.signal().map_or(code, |signal| ExitCode::from(128 + signal as u8))
}

/// All commands. A switch of `train` may be turned off again, `--shuffle=false`: a file may have turned it on.
fn command() -> clap::Command {
    Cli::command().mut_subcommand("train", |train| {
        train.mut_args(|arg| match arg.get_action() {
            ArgAction::SetTrue => arg
                .action(ArgAction::Set)
                .value_parser(clap::value_parser!(bool))
                .value_name("BOOL")
                .num_args(0..=1)
                .require_equals(true)
                .default_missing_value("true")
                .default_value("false")
                .hide_default_value(true)
                .hide_possible_values(true),
            _ => arg,
        })
    })
}

/// The command line with the settings of `train`'s `--config` in front of its own flags, which override them.
fn with_file(mut args: Vec<OsString>) -> Result<Vec<OsString>, Error> {
    let command = command();
    // What is missing may stand in the file; what is wrong shows when all is put together.
    let lenient =
        command.clone().ignore_errors(true).mut_subcommand("train", |train| train.ignore_errors(true));
    let file = lenient.try_get_matches_from(&args).ok().and_then(|found| {
        found.subcommand_matches("train").and_then(|train| train.get_one::<PathBuf>("config").cloned())
    });
    let place = args.iter().position(|word| word == "train");
    if let (Some(file), Some(place)) = (file, place) {
        let train = command.find_subcommand("train").expect("it is one of ours");
        args.splice(place + 1..place + 1, words(&file, train)?);
    }
    Ok(args)
}

/// `--flag_name=value` → `--flag-name=value`: the spelling of the system that this one replaces.
fn kebab_case(index: usize, arg: OsString) -> OsString {
    match arg.to_str() {
        Some(text) if index > 0 && text.starts_with("--") => {
            let end = text.find('=').unwrap_or(text.len());
            (text[..end].replace('_', "-") + &text[end..]).into()
        }
        _ => arg,
    }
}

/// Prints one line on stdout, on the rank that speaks. A reader that has gone away is no error of ours.
fn print_line(text: &str) -> Result<(), Error> {
    if quiet() {
        return Ok(());
    }
    match writeln!(std::io::stdout(), "{text}") {
        Err(cause) if cause.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::io("write to", Path::new("stdout"), &cause))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flags_are_consistent() {
        command().debug_assert();
    }

    #[test]
    fn underscores_are_dashes_in_flags_and_only_there() {
        let convert = |arg: &str| kebab_case(1, arg.into()).into_string().unwrap();
        assert_eq!(convert("--data_dir=my_data"), "--data-dir=my_data");
        assert_eq!(convert("--grad_accum_usteps"), "--grad-accum-usteps");
        assert_eq!(convert("my_data"), "my_data");
    }

    #[test]
    fn the_last_of_a_repeated_flag_counts() {
        let cli = Cli::try_parse_from([
            "elapid",
            "train",
            "--model",
            "tiny",
            "--data-dir",
            "d",
            "--max-steps",
            "1",
            "--lr",
            "1",
            "--lr",
            "2",
        ]);
        let Command::Train(args) = cli.unwrap().command else { panic!("not train") };
        assert_eq!(args.train.lr, 2.0);
    }
}
