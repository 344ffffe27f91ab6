//! How commands print what they have found: a table for people, JSON for programs.

use std::io::{self, Write};

use comfy_table::Table;
use serde::Serialize;

use crate::{
    args::Format,
    error::{Result, host},
};

/// Prints it to standard output.
pub(crate) fn print<T: Serialize + ?Sized>(
    format: Format,
    found: &T,
    table: impl FnOnce(&T) -> String,
) -> Result<()> {
    let text = match format {
        Format::Table => table(found),
        Format::Json => {
            let text = serde_json::to_string_pretty(found);
            text.map_err(|error| host("write JSON")(io::Error::from(error)))? + "\n"
        }
    };
    io::stdout()
        .write_all(text.as_bytes())
        .map_err(host("write to standard output"))?;
    Ok(())
}

/// A table without lines, whose first row says what the columns are.
pub(crate) fn columns<const N: usize>(names: [&str; N]) -> Table {
    let mut table = Table::new();
    table
        .load_style(comfy_table::presets::NOTHING)
        .set_header(names);
    table
}

/// The text of it, with the end of its last line.
pub(crate) fn text(table: &Table) -> String {
    format!("{}\n", table.trim_fmt())
}
