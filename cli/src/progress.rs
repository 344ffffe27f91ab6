//! How far unpacking is, on standard error if that is a terminal.

use std::sync::OnceLock;

use bulkhead_image::Progress;
use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};

/// A bar that is gone when all is done.
#[derive(Debug, Default)]
pub(crate) struct Bar {
    bar: OnceLock<ProgressBar>,
    waiting: OnceLock<ProgressBar>,
}

impl Progress for Bar {
    fn waiting(&self) {
        let spinner = ProgressBar::new_spinner().with_finish(ProgressFinish::AndClear);
        spinner.set_message("Waiting for another bulkhead that unpacks an image");
        spinner.tick();
        let _ = self.waiting.set(spinner);
    }

    fn begin(&self, bytes: u64) {
        if let Some(spinner) = self.waiting.get() {
            spinner.finish_and_clear();
        }
        let bar = ProgressBar::new(bytes).with_finish(ProgressFinish::AndClear);
        if let Ok(style) = ProgressStyle::with_template("Unpacking {bar:30} {bytes}/{total_bytes}")
        {
            bar.set_style(style);
        }
        let _ = self.bar.set(bar);
    }

    fn read(&self, bytes: u64) {
        if let Some(bar) = self.bar.get() {
            bar.inc(bytes);
        }
    }

    fn end(&self) {
        if let Some(bar) = self.bar.get() {
            bar.finish_and_clear();
        }
    }
}
