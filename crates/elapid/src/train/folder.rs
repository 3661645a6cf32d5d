//! The folder of one run.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Seek, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Outcome;
use crate::Error;
use crate::checkpoint::Lock;

pub(crate) const METRICS: &str = "metrics.jsonl";
const NORMS: &str = "norms.jsonl";
/// Exists from the end of a run's export on.
pub(crate) const FINISHED: &str = "finished.json";

#[derive(Serialize, Deserialize)]
struct Finished {
    step: u64,
    first_loss: f64,
    last_loss: f64,
    tokens: u64,
    seconds: f64,
}

/// The folder of one run, locked while it lives.
pub(super) struct RunFolder {
    dir: PathBuf,
    /// Held, not read.
    _lock: Lock,
}

impl RunFolder {
    pub(super) fn lock(dir: &Path) -> Result<Self, Error> {
        Ok(Self { _lock: Lock::new(dir, "--output-dir")?, dir: dir.to_owned() })
    }

    /// An error where a run has made a step here.
    pub(super) fn refuse_a_run(&self) -> Result<(), Error> {
        if fs::metadata(self.dir.join(METRICS)).is_ok_and(|file| file.len() > 0) {
            return Err(Error::new(format!("{} already holds a run", self.dir.display()))
                .with_hint("go on with --resume auto, give another --output-dir, or move that folder away"));
        }
        Ok(())
    }

    /// What a run that came to `max_steps` has left.
    pub(super) fn finished(&self, max_steps: u64) -> Result<Option<Outcome>, Error> {
        let path = self.dir.join(FINISHED);
        let text = match fs::read_to_string(&path) {
            Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            text => text.map_err(|cause| Error::io("read", &path, &cause))?,
        };
        // A file that was torn by a power cut is as none: the last steps are made again.
        let finished = serde_json::from_str::<Finished>(&text).ok().filter(|end| end.step >= max_steps);
        Ok(finished.map(|Finished { first_loss, last_loss, tokens, seconds, .. }| Outcome {
            first_loss,
            last_loss,
            tokens,
            seconds,
            ..Outcome::new(self.dir.join("hf"))
        }))
    }

    /// Marks the run as finished after `step`.
    pub(super) fn finish(&self, step: u64, outcome: &Outcome) -> Result<(), Error> {
        let Outcome { first_loss, last_loss, tokens, seconds, .. } = *outcome;
        let finished = Finished { step, first_loss, last_loss, tokens, seconds };
        self.write(FINISHED, &serde_json::to_string(&finished).expect("plain data"))
    }

    /// Opens `metrics.jsonl` with what it holds up to `step`. The run is no longer finished.
    pub(super) fn open_metrics(&self, step: u64) -> Result<Log, Error> {
        let finished = self.dir.join(FINISHED);
        match fs::remove_file(&finished) {
            Err(cause) if cause.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("remove", &finished, &cause));
            }
            _ => {}
        }
        Log::open(self.dir.join(METRICS), step)
    }

    /// Opens `norms.jsonl` likewise, where it is `wanted`. One that an earlier part of the run left is cut back in any
    /// case: its later lines are of steps that are made again.
    pub(super) fn open_norms(&self, step: u64, wanted: bool) -> Result<Option<Log>, Error> {
        let path = self.dir.join(NORMS);
        let log = if wanted || path.exists() { Some(Log::open(path, step)?) } else { None };
        Ok(log.filter(|_| wanted))
    }

    pub(super) fn write(&self, name: &str, text: &str) -> Result<(), Error> {
        let path = self.dir.join(name);
        fs::write(&path, text).map_err(|cause| Error::io("write", &path, &cause))
    }
}

/// A file of JSON objects, one a line and a step.
pub(super) struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    /// With what it holds up to `step`; later lines and a torn one are cut off.
    fn open(path: PathBuf, step: u64) -> Result<Self, Error> {
        let open = || -> std::io::Result<File> {
            let mut file = File::options().read(true).write(true).create(true).truncate(false).open(&path)?;
            let mut reader = BufReader::new(&file);
            let (mut kept, mut line) = (0, Vec::new());
            while reader.read_until(b'\n', &mut line)? > 0 {
                let whole = line.ends_with(b"\n").then(|| serde_json::from_slice::<Value>(&line).ok());
                let of_step = whole.flatten().and_then(|record| record["step"].as_u64());
                if of_step.is_none_or(|of_step| of_step > step) {
                    break;
                }
                kept += line.len() as u64;
                line.clear();
            }
            file.set_len(kept)?;
            file.seek(std::io::SeekFrom::End(0))?;
            file.sync_all()?;
            Ok(file)
        };
        let file = open().map_err(|cause| Error::io("open", &path, &cause))?;
        Ok(Self { path, file })
    }

    /// One write a line: whoever reads along sees whole lines.
    pub(super) fn push(&mut self, line: &Value) -> Result<(), Error> {
        let line = format!("{line}\n");
        self.file.write_all(line.as_bytes()).map_err(|cause| Error::io("write", &self.path, &cause))
    }

    /// Waits until all of it is on disk.
    pub(super) fn sync(&self) -> Result<(), Error> {
        self.file.sync_all().map_err(|cause| Error::io("write", &self.path, &cause))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_cut_back_to_the_step() {
        let dir = tempfile::tempdir().unwrap();
        let folder = RunFolder::lock(dir.path()).unwrap();
        let path = dir.path().join(METRICS);
        let lines = |steps: std::ops::RangeInclusive<u64>| -> String {
            steps.map(|step| format!("{{\"step\":{step},\"loss\":1.5}}\n")).collect()
        };
        for (tail, step, kept) in [
            ("", 3, 3),
            ("", 5, 5),
            ("", 9, 5),
            ("", 0, 0),
            ("{\"step\":6,\"lo", 9, 5),
            ("{\"step\":6,\"loss\":1.5}", 9, 5),
            ("\0\0\0\n{\"step\":6}\n", 9, 5),
            ("\u{fe}", 4, 4),
        ] {
            fs::write(&path, lines(1..=5) + tail).unwrap();
            let mut log = folder.open_metrics(step).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), lines(1..=kept), "{tail:?} {step}");
            log.push(&"next".into()).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), lines(1..=kept) + "\"next\"\n");
        }
    }

    #[test]
    fn a_folder_has_one_run_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let held = RunFolder::lock(dir.path()).unwrap();
        assert!(RunFolder::lock(dir.path()).is_err());
        drop(held);
        assert!(RunFolder::lock(dir.path()).is_ok());
    }
}
