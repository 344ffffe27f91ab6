//! How far a long step is, on standard error: a bar for people, lines for logs.

use std::{
    io::{IsTerminal, stderr},
    time::Duration,
};

use bulkhead_guest::Progress;
use indicatif::{ProgressBar, ProgressStyle};

/// A bar that is drawn on a terminal; elsewhere each step is a line.
#[derive(Debug)]
pub(crate) struct Bar {
    bar: ProgressBar,
    plain: bool,
}

impl Bar {
    pub(crate) fn new() -> Bar {
        let plain = !stderr().is_terminal();
        let bar = if plain {
            ProgressBar::hidden()
        } else {
            ProgressBar::new_spinner()
        };
        bar.enable_steady_tick(Duration::from_millis(120));
        Bar { bar, plain }
    }

    fn style(&self, template: &str) {
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar.set_style(style);
        }
    }
}

impl Progress for Bar {
    fn step(&self, text: &str) {
        if self.plain {
            eprintln!("{text} …");
        } else {
            self.style("{spinner} {msg} {elapsed}");
            self.bar.set_message(text.to_owned());
        }
    }

    fn advance(&self, done: u64, total: u64) {
        self.style("{spinner} {msg} [{wide_bar}] {elapsed}");
        self.bar.set_length(total);
        self.bar.set_position(done.min(total));
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Says nothing: what has been shown once.
#[derive(Debug)]
pub(crate) struct Quiet;

impl Progress for Quiet {
    fn step(&self, _: &str) {}

    fn advance(&self, _: u64, _: u64) {}
}
