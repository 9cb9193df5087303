//! The nestvmm program: command line, terminal, reports.

mod bench;
mod child;
mod cli;
mod console;
mod crash;
mod demo;
mod disks;
mod doctor;
mod engines;
mod exec;
mod image;
mod image_command;
mod interrupt;
mod run;
mod scenario;
mod session;
mod status;
mod symbols;
mod terminal;
mod trace_command;
mod trace_file;

use std::process::ExitCode;

use clap::Parser;
use cli::{Cli, Command};

fn main() -> ExitCode {
    restore_terminal_on_panic();
    let result = match parse().command {
        Command::Run(args) => run::run(&args),
        Command::Demo(args) => demo::demo(&args),
        Command::ServeExec { port } => exec::guest::serve(&port).map(|()| 0),
        Command::Doctor(args) => doctor::doctor(&args).map(|()| 0),
        Command::Bench(command) => bench::bench(&command).map(|()| 0),
        Command::Scenario(command) => scenario::scenario(&command),
        Command::Trace(command) => trace_command::trace(&command).map(|()| 0),
        Command::Image(command) => image_command::image(command).map(|()| 0),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(failure) => failure.report(),
    }
}

/// Reads the command line. A mistake in that of `run --exec` must not look like a status of the command.
fn parse() -> Cli {
    Cli::try_parse().unwrap_or_else(|e| {
        let exec = |a: std::ffi::OsString| a == "--exec" || a.to_string_lossy().starts_with("--exec=");
        if e.use_stderr() && std::env::args_os().any(exec) {
            // Nothing can be done when standard error is closed.
            let _ = e.print();
            std::process::exit(exec::NO_STATUS.into());
        }
        e.exit()
    })
}

/// A panic's message must not end up in a terminal that is in raw mode.
fn restore_terminal_on_panic() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        terminal::restore();
        default(info);
    }));
}
