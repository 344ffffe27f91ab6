//! The shim's log: logfmt lines into the bundle's `log` FIFO.
//!
//! Never blocks and never fails: while nobody reads, lines beyond what the pipe
//! holds are dropped and counted, and the count is told with the next line that
//! fits.

use std::{
    fmt::{self, Write as _},
    fs::File,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use serde::{Deserialize, Serialize};
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    Layer, Registry,
    filter::LevelFilter,
    layer::{Context, SubscriberExt},
    util::SubscriberInitExt,
};

use crate::carry::{Bag, CarriedFd};

/// Longest line: a write of so much to a pipe is not mixed with others.
const MAX_LINE: usize = 4096;

/// Sends log messages to the FIFO `log` in `bundle`, if there is one.
pub fn init(bundle: &Path, debug: bool) {
    let file = open(&bundle.join("log")).ok().map(Arc::new);
    send(file, debug);
}

/// Goes on with the log of the program before this one.
pub(crate) fn unpack(carried: Carried) {
    let file = carried.fifo.and_then(|fifo| fifo.take().ok());
    send(file.map(|file| Arc::new(file.into())), carried.debug);
}

/// What goes along when the program changes.
pub(crate) fn carry(bag: &mut Bag) -> io::Result<Carried> {
    let (file, debug) = LOG.get().cloned().unwrap_or_default();
    Ok(Carried {
        fifo: file.map(|file| bag.put(&*file)).transpose()?,
        debug,
    })
}

/// What goes along of the log.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Carried {
    fifo: Option<CarriedFd>,
    debug: bool,
}

/// Where messages go, and whether they are many.
static LOG: OnceLock<(Option<Arc<File>>, bool)> = OnceLock::new();

fn send(file: Option<Arc<File>>, debug: bool) {
    let level = match debug {
        true => LevelFilter::DEBUG,
        false => LevelFilter::INFO,
    };
    if let Some(file) = &file {
        let fifo = Fifo {
            file: Arc::clone(file),
            dropped: AtomicU64::new(0),
        };
        // A second call (in tests) keeps the first destination.
        let _ = Registry::default().with(fifo.with_filter(level)).try_init();
    }
    let _ = LOG.set((file, debug));
    std::panic::set_hook(Box::new(|info| tracing::error!("panic: {info}")));
}

fn open(path: &Path) -> io::Result<File> {
    use rustix::fs::{FileType, OFlags};
    let flags = OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    // Read-write: the end of a reader must not be an error for the next line.
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(flags.bits().cast_signed())
        .open(path)?;
    if FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) != FileType::Fifo {
        return Err(io::Error::other("it is not a FIFO"));
    }
    Ok(file)
}

#[derive(Debug)]
struct Fifo {
    file: Arc<File>,
    dropped: AtomicU64,
}

impl<S: Subscriber> Layer<S> for Fifo {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let dropped = self.dropped.swap(0, Ordering::Relaxed);
        if dropped > 0 {
            fields.add("dropped", &dropped.to_string());
        }
        let line = line(&Timestamp::now(), *event.metadata().level(), &fields);
        match (&*self.file).write(line.as_bytes()) {
            Ok(count) if count == line.len() => {}
            _ => {
                self.dropped.fetch_add(dropped + 1, Ordering::Relaxed);
            }
        }
    }
}

#[derive(Debug, Default)]
struct Fields {
    message: String,
    rest: String,
}

impl Fields {
    fn add(&mut self, name: &str, value: &str) {
        // Where in a library a message of the crate log comes from.
        if name.starts_with("log.") {
            return;
        }
        let _ = write!(self.rest, " {name}={}", quoted(value));
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let text = format!("{value:?}");
        if field.name() == "message" {
            self.message = text;
        } else {
            self.add(field.name(), &text);
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            value.clone_into(&mut self.message);
        } else {
            self.add(field.name(), value);
        }
    }
}

fn line(now: &Timestamp, level: Level, fields: &Fields) -> String {
    let level = match level {
        Level::ERROR => "error",
        Level::WARN => "warning",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    };
    let time = rfc3339(now.seconds, now.nanos);
    let mut line = format!(
        "time=\"{time}\" level={level} msg={}{}",
        quoted(&fields.message),
        fields.rest
    );
    let mut end = line.len().min(MAX_LINE - 1);
    while !line.is_char_boundary(end) {
        end -= 1;
    }
    line.truncate(end);
    line.push('\n');
    line
}

fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:@+,".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("{text:?}")
    }
}

/// A time of the calendar, in UTC.
fn rfc3339(seconds: i64, nanos: i32) -> String {
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Days to a date in the Gregorian calendar, counted from 1 March of year 0, so
    // that the leap day is the last day of a year.
    let day = days + 719_468;
    let (era, day) = (day.div_euclid(146_097), day.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let date = day - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    let year = year + era * 400 + carry;
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{date:02}T{hour:02}:{minute:02}:{second:02}.{nanos:09}Z")
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00.000000000Z"),
            (951_782_400, "2000-02-29T00:00:00.000000000Z"),
            (1_709_251_199, "2024-02-29T23:59:59.000000000Z"),
            (4_102_444_800, "2100-01-01T00:00:00.000000000Z"),
        ] {
            assert_eq!(rfc3339(seconds, 0), expected);
        }
    }

    #[test]
    fn lines_are_logfmt_and_fit_into_one_write() {
        let mut fields = Fields {
            message: "it \"works\"\n".into(),
            rest: String::new(),
        };
        fields.add("id", "c1");
        fields.add("error", "a b");
        let text = line(&Timestamp::default(), Level::WARN, &fields);
        assert!(
            text.ends_with("level=warning msg=\"it \\\"works\\\"\\n\" id=c1 error=\"a b\"\n"),
            "{text}"
        );
        fields.message = "ä".repeat(5000);
        assert!(line(&Timestamp::default(), Level::INFO, &fields).len() <= MAX_LINE);
    }

    #[test]
    fn a_full_fifo_drops_lines_and_counts_them_lc_43() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        rustix::fs::mkfifoat(
            rustix::fs::CWD,
            &path,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        )
        .unwrap();
        let fifo = Fifo {
            file: open(&path).unwrap().into(),
            dropped: AtomicU64::new(0),
        };
        let mut reader = open(&path).unwrap();
        tracing::subscriber::with_default(Registry::default().with(fifo), || {
            for _ in 0..2000 {
                tracing::info!("{}", "x".repeat(100));
            }
            let mut seen = vec![0; 1 << 20];
            let count = reader.read(&mut seen).unwrap();
            assert!(count <= 64 << 10);
            tracing::info!("again");
            let count = reader.read(&mut seen).unwrap();
            let text = String::from_utf8_lossy(&seen[..count]).into_owned();
            assert!(text.contains("msg=again dropped="), "{text}");
        });
    }

    #[test]
    fn a_regular_file_is_no_log() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("log"), "").unwrap();
        assert!(open(&dir.path().join("log")).is_err());
    }
}
