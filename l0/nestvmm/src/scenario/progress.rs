//! Telling the user which scenarios run and how they ended: a line for each that runs on a terminal,
//! plain lines elsewhere.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use scenario_runner::run::Verdict;
use scenario_runner::suite::Event;

/// What is shown on standard error.
#[derive(Debug)]
pub struct Progress {
    total: usize,
    ended: usize,
    /// The lines of those that run; `None` where there is no terminal.
    lines: Option<(MultiProgress, BTreeMap<String, ProgressBar>)>,
}

impl Progress {
    /// For `total` scenarios.
    pub fn new(total: usize) -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self { total, ended: 0, lines: terminal.then(|| (MultiProgress::new(), BTreeMap::new())) }
    }

    /// Shows what happened.
    pub fn show(&mut self, event: &Event<'_>) {
        match event {
            Event::Started(name) => self.started(name),
            Event::Ended(report) => {
                self.ended += 1;
                let (word, seconds) = (report.verdict.word(), report.time.as_secs_f64());
                let mut line =
                    format!("[{}/{}] {word}  {}  {seconds:.1} s", self.ended, self.total, report.name);
                if let Verdict::Failed(why) = &report.verdict {
                    line.push_str(&format!("\n    {}", why.replace('\n', "\n    ")));
                }
                self.line(&report.name, &line);
            }
        }
    }

    fn started(&mut self, name: &str) {
        let Some((all, lines)) = &mut self.lines else { return };
        let style = ProgressStyle::with_template("{spinner} {msg} {elapsed}");
        let bar =
            ProgressBar::new_spinner().with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
        let bar = all.add(bar.with_message(name.to_owned()));
        bar.enable_steady_tick(Duration::from_millis(200));
        lines.insert(name.to_owned(), bar);
    }

    fn line(&mut self, name: &str, line: &str) {
        match &mut self.lines {
            None => eprintln!("{line}"),
            Some((all, lines)) => {
                if let Some(bar) = lines.remove(name) {
                    bar.finish_and_clear();
                }
                all.suspend(|| eprintln!("{line}"));
            }
        }
    }

    /// Nothing more will be shown.
    pub fn end(&mut self) {
        if let Some((all, _)) = &self.lines {
            // The terminal may be gone.
            let _ = all.clear();
        }
    }
}
