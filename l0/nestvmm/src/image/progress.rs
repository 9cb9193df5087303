//! Telling the user how far a build is: bars on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// One step of a build, on standard error.
#[derive(Debug)]
pub(super) struct Step {
    bar: Option<ProgressBar>,
}

impl Step {
    /// Starts a step that is done after `total` units, which are bytes.
    pub(super) fn bytes(label: &str, total: u64) -> Self {
        Self::start(label, total, "{msg} [{bar:30}] {bytes}/{total_bytes}")
    }

    /// Starts a step that is done at 100 percent.
    pub(super) fn percent(label: &str) -> Self {
        Self::start(label, 100, "{msg} [{bar:30}] {percent}%")
    }

    fn start(label: &str, total: u64, template: &str) -> Self {
        if !std::io::stderr().is_terminal() {
            eprintln!("{label}");
            return Self { bar: None };
        }
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::new(total).with_style(style).with_message(label.to_owned());
        bar.enable_steady_tick(Duration::from_millis(200));
        Self { bar: Some(bar) }
    }

    /// Says how much of the total is done.
    pub(super) fn set(&self, done: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
