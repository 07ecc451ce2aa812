//! What is looked at on this machine alone.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use hanse_model::{CardReport, OpenError, cards};
use hanse_node::owner::cards::{CardProcess, Meter, MeterError, meter};
use hanse_node::owner::{DataDirLock, LockError};
use hanse_protocol::{Identity, IdentityError};

use super::Check;
use crate::output;

/// Bytes that are written and read to see how fast a disk is.
const SAMPLE_BYTES: usize = 32 << 20;
/// A disk slower than this takes more than half a minute for each GiB of experts.
const SLOW_BYTES_PER_SECOND: f64 = 32.0 * (1 << 20) as f64;
/// Less room than this is worth a word.
const LITTLE_BYTES: u64 = 1 << 30;
/// So many programs that use a card are named.
const MOST_PROGRAMS: usize = 4;

/// Whether there is a key, and only its owner can read it.
pub(super) fn key(data_dir: &Path) -> Check {
    if let Err(error) = nearest(data_dir) {
        return Check::fail("key", format!("{error:#}"), "move the file away, or name another folder with --data-dir");
    }
    let path = data_dir.join("identity.key");
    let shown = path.display();
    match path.try_exists() {
        Ok(true) => {}
        Ok(false) => return Check::ok("key", format!("none yet: `hanse node` makes {shown}")),
        Err(error) => {
            let advice = "give the folder's user the right to read it, or name another with --data-dir";
            return Check::fail("key", format!("cannot look at {shown}: {error}"), advice);
        }
    }
    match Identity::load_or_create(&path) {
        Ok(identity) => Check::ok("key", format!("{}, and only its owner can read it", identity.peer_id())),
        Err(IdentityError::Exposed { mode, .. }) => {
            let advice = format!("run: chmod 600 {shown}; if others use this machine, delete it: a new one is made");
            Check::fail("key", format!("{shown} can be read by others (mode {mode:03o})"), advice)
        }
        Err(error) => {
            let advice = "restore it, or move it away: a new one is made, and with it another peer id";
            Check::fail("key", format!("{:#}", anyhow::Error::from(error)), advice)
        }
    }
}

/// Whether a node runs with this data folder.
pub(super) fn runs(data_dir: &Path) -> bool {
    // Without the file there was none; looking must not make one.
    data_dir.join("lock").exists() && matches!(DataDirLock::acquire(data_dir), Err(LockError::InUse { .. }))
}

/// What computes experts.
pub(super) fn gpu() -> Check {
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let on_cpu = |why: &str| format!("none is used: {why}; the CPU, which has {cores} cores, computes");
    match cards() {
        Ok(cards) => {
            let meter = meter();
            let shown: Vec<String> = cards.iter().map(|shown| card(shown) + &used(&meter, shown)).collect();
            let found = format!("{}; {}", shown.join("; "), driver(&cards));
            match meter {
                Ok(_) => Check::ok("gpu", found),
                // All else works.
                Err(error) => Check::ok("gpu", format!("{found}; --yield-to-others cannot be used: {error}")),
            }
        }
        // A machine without a card is as good as any.
        Err(error @ (OpenError::NoDriver | OpenError::NoGpu)) => Check::ok("gpu", on_cpu(&error.to_string())),
        Err(OpenError::NotBuilt) => {
            let other = if cfg!(target_vendor = "apple") {
                "one for Apple's GPUs: --features metal"
            } else {
                "one for NVIDIA cards: --features cuda"
            };
            Check::ok("gpu", on_cpu(&format!("this build computes on the CPU only ({other})")))
        }
        Err(error) => Check::warn(
            "gpu",
            on_cpu(&error.to_string()),
            "see docs/gpu.md, or say --device cpu if there is no card to use",
        ),
    }
}

/// What is there, and how much of it is free.
fn card(card: &CardReport) -> String {
    let CardReport { device, name, kind, memory, .. } = card;
    let memory = match memory {
        Ok((free, total)) => format!("{} of {} free", output::bytes(*free), output::bytes(*total)),
        Err(reason) => reason.clone(),
    };
    format!("{device} {name} ({kind}), {memory}")
}

/// Which programs use a card, as far as that is told.
fn used(meter: &Result<Box<dyn Meter>, MeterError>, card: &CardReport) -> String {
    let told = meter.as_ref().ok().and_then(|meter| meter.processes(&card.uuid).ok());
    let mut programs: Vec<CardProcess> = told.unwrap_or_default();
    programs.sort_by_key(|program| std::cmp::Reverse(program.bytes));
    let more = programs.len().saturating_sub(MOST_PROGRAMS);
    let shown = programs.iter().take(MOST_PROGRAMS).map(|CardProcess { pid, name, bytes }| {
        let name = name.as_deref().and_then(|name| Path::new(name).file_name()?.to_str());
        // Whoever runs a program names it.
        let plain = |name: &str| name.chars().filter(|c| !c.is_control()).collect();
        let name = name.map_or_else(|| format!("process {pid}"), plain);
        bytes.map_or_else(|| name.clone(), |bytes| format!("{name} ({})", output::bytes(bytes)))
    });
    let shown: Vec<String> = shown.collect();
    match (shown.is_empty(), more) {
        (true, _) => String::new(),
        (false, 0) => format!(", used by {}", shown.join(", ")),
        (false, more) => format!(", used by {} and {more} more", shown.join(", ")),
    }
}

/// What is known of the driver, and its own version where the system tells it.
fn driver(cards: &[CardReport]) -> String {
    let known = cards.first().map_or("", |card| card.driver.as_str());
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
    let is_version = |word: &&str| word.contains('.') && word.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let own = text.split_whitespace().find(is_version);
    own.map_or_else(|| known.to_owned(), |own| format!("{known} (version {own})"))
}

/// Whether the disk that holds `dir`, which need not exist yet, is fast enough and has `needed` bytes.
pub(super) fn disk(dir: &Path, needed: Option<u64>) -> Check {
    let existing = match nearest(dir) {
        Ok(existing) => existing,
        Err(error) => {
            let advice = "move the file away, or name another folder with --cache-dir";
            return Check::fail("disk", format!("{error:#}"), advice);
        }
    };
    let measured = speed(&existing);
    let (written, read) = match measured {
        Ok(speed) => speed,
        Err(error) => {
            let advice = "make room, give yourself the right to write there, or name another folder with --cache-dir";
            return Check::fail("disk", format!("{error:#}"), advice);
        }
    };
    let per_second = |speed: f64| output::bytes(speed as u64);
    let speeds = format!("writes {}/s, reads {}/s", per_second(written), per_second(read));
    let free = free_bytes(&existing);
    let room = free.map_or_else(String::new, |free| format!(", {} free", output::bytes(free)));
    let found = format!("{}: {speeds}{room}", existing.display());
    if let (Some(free), Some(needed)) = (free, needed)
        && free < needed
    {
        let advice = format!("make room for {}, or name another folder with --cache-dir", output::bytes(needed));
        return Check::fail("disk", found, advice);
    }
    if free.is_some_and(|free| free < LITTLE_BYTES) {
        return Check::warn(
            "disk",
            found,
            "fetched weights may not fit: make room, or name another folder with --cache-dir",
        );
    }
    if written.min(read) < SLOW_BYTES_PER_SECOND {
        return Check::warn("disk", found, "loading experts takes long: another disk for --cache-dir would help");
    }
    Check::ok("disk", found)
}

/// The folder in which `dir` is or would be made: itself or the first above it that is there.
///
/// # Errors
/// If what is there is no folder, so that `dir` cannot be made.
fn nearest(dir: &Path) -> anyhow::Result<PathBuf> {
    // Above a relative path there is the current folder, which its own ancestors do not name.
    let dir = std::path::absolute(dir).with_context(|| format!("cannot tell where {dir:?} is"))?;
    // A link that leads nowhere is in the way too.
    let existing = dir.ancestors().find(|dir| dir.symlink_metadata().is_ok()).unwrap_or(&dir);
    anyhow::ensure!(existing.is_dir(), "{} is no folder", existing.display());
    Ok(existing.to_owned())
}

/// Bytes that are written and read in a second.
fn speed(dir: &Path) -> anyhow::Result<(f64, f64)> {
    let cannot = |what: &'static str| move || format!("cannot {what} a file in {}", dir.display());
    let mut file = tempfile::tempfile_in(dir).with_context(cannot("create"))?;
    // Nothing that a file system would compress away.
    let mut sample = vec![0; SAMPLE_BYTES];
    rand::Rng::fill(&mut rand::rng(), &mut sample[..]);
    let per_second = |elapsed: Duration| SAMPLE_BYTES as f64 / elapsed.as_secs_f64().max(1e-9);
    let begun = Instant::now();
    file.write_all(&sample).and_then(|()| file.sync_all()).with_context(cannot("write"))?;
    let written = per_second(begun.elapsed());
    forget(&file);
    let begun = Instant::now();
    file.rewind().and_then(|()| file.read_exact(&mut sample)).with_context(cannot("read"))?;
    Ok((written, per_second(begun.elapsed())))
}

/// Has the system read a file from the disk the next time, and not from memory.
#[cfg(target_os = "linux")]
fn forget(file: &File) {
    // Where that cannot be, reading looks faster than it is.
    let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed);
}

#[cfg(not(target_os = "linux"))]
fn forget(_file: &File) {}

#[cfg(unix)]
fn free_bytes(dir: &Path) -> Option<u64> {
    let told = rustix::fs::statvfs(dir).ok()?;
    told.f_bavail.checked_mul(told.f_frsize)
}

#[cfg(not(unix))]
fn free_bytes(_dir: &Path) -> Option<u64> {
    None
}
