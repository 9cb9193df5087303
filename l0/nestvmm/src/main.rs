//! The nestvmm program: command line, terminal, reports.

mod bench;
mod cli;
mod console;
mod crash;
mod doctor;
mod image;
mod image_command;
mod run;
mod session;
mod status;
mod terminal;

use std::process::ExitCode;

use clap::Parser;
use cli::{Cli, Command};

fn main() -> ExitCode {
    restore_terminal_on_panic();
    let result = match Cli::parse().command {
        Command::Run(args) => run::run(&args),
        Command::Doctor(args) => doctor::doctor(&args).map(|()| 0),
        Command::Bench(command) => bench::bench(&command).map(|()| 0),
        Command::Image(command) => image_command::image(command).map(|()| 0),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(failure) => failure.report(),
    }
}

/// A panic's message must not end up in a terminal that is in raw mode.
fn restore_terminal_on_panic() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        terminal::restore();
        default(info);
    }));
}
