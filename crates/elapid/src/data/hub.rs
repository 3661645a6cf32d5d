//! The Hugging Face Hub: files of dataset and model repositories, in the cache that Python's `huggingface_hub` keeps.
//!
//! `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`, `HF_HUB_CACHE` and `HF_HUB_OFFLINE` mean what they mean there.

use std::env;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use ureq::config::RedirectAuthHeaders;
use ureq::http::{Response, StatusCode};
use ureq::{Agent, Body};

use super::sources::{Compression, Format, README, Wanted};
use crate::Error;
use crate::error::say;

/// Attempts at a request, and the wait after the first; it doubles.
const TRIES: u32 = 5;
const WAIT: Duration = Duration::from_millis(500);
/// The longest that a server's `Retry-After` is heeded.
const LONGEST_WAIT: u64 = 300;

/// Where the Hub puts what it has made Parquet of.
const CONVERTED: &str = "refs/convert/parquet";

/// What kind of repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Dataset,
    Model,
}

impl Kind {
    fn word(self) -> &'static str {
        match self {
            Self::Dataset => "dataset",
            Self::Model => "model",
        }
    }
}

/// A file of a repository.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Remote {
    path: String,
    size: u64,
    /// What it is called in the cache: the SHA-256 of a large file, git's own hash of another.
    blob: String,
    large: bool,
}

/// A repository at one commit.
struct Repo {
    kind: Kind,
    name: String,
    commit: String,
    files: Vec<Remote>,
}

impl Repo {
    fn paths(&self) -> Vec<String> {
        self.files.iter().map(|file| file.path.clone()).collect()
    }
}

/// Is this a name such as `owner/name`, rather than a path?
pub(super) fn is_name(text: &str) -> bool {
    let part = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphanumeric())
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
    };
    let parts: Vec<&str> = text.split('/').collect();
    let file = Path::new(text);
    let named = Format::of(file) != (Format::Text, Compression::None)
        || file.extension().is_some_and(|extension| ["txt", "md"].iter().any(|known| extension == *known));
    match parts[..] {
        [name] => part(name) && !name.contains('.'),
        // Below a folder that is there, a path was meant.
        [owner, name] => part(owner) && part(name) && !named && !Path::new(owner).exists(),
        _ => false,
    }
}

/// The files of a dataset's split, downloaded.
///
/// # Errors
/// The Hub cannot be reached or refuses; no such dataset, configuration or split; a file that is not what it should be.
pub(super) fn dataset(name: &str, config: Option<&str>, split: Option<&str>) -> Result<Vec<PathBuf>, Error> {
    let hub = Hub::from_env()?;
    let wanted = Wanted { config, split };
    let repo = hub.repo(Kind::Dataset, name, "main")?;
    let readme = match repo.files.iter().find(|file| file.path == README) {
        Some(file) => {
            let path = &hub.fetch_all(&repo, std::slice::from_ref(file))?[0];
            String::from_utf8_lossy(&fs::read(path).map_err(|cause| Error::io("read", path, &cause))?)
                .into_owned()
        }
        None => String::new(),
    };
    let chosen =
        wanted.among(&repo.paths(), &readme).map_err(|error| error.at(format!("the dataset {name}")));
    let (repo, paths) = match chosen {
        Ok(paths) => (repo, paths),
        Err(error) => {
            // What is in no file that we read, the Hub may have made Parquet of.
            let Ok(converted) = hub.repo(Kind::Dataset, name, CONVERTED) else { return Err(error) };
            let paths = wanted
                .converted(&converted.paths())
                .map_err(|error| error.at(format!("the dataset {name}")))?;
            (converted, paths)
        }
    };
    let files: Vec<Remote> = repo.files.iter().filter(|file| paths.contains(&file.path)).cloned().collect();
    hub.fetch_all(&repo, &files)
}

/// The folder of a model's tokenizer files, downloaded.
///
/// # Errors
/// As [`dataset`]; the model has no `tokenizer.json`.
pub(super) fn tokenizer(name: &str, wanted: &[&str]) -> Result<PathBuf, Error> {
    let hub = Hub::from_env()?;
    let repo = hub.repo(Kind::Model, name, "main")?;
    let files: Vec<Remote> =
        repo.files.iter().filter(|file| wanted.contains(&&file.path[..])).cloned().collect();
    if !files.iter().any(|file| file.path == wanted[0]) {
        return Err(Error::new(format!("the model {name} on {} has no {}", hub.endpoint, wanted[0])).with_hint(
            "transformers' `save_pretrained` writes one for most tokenizers; give the folder that it wrote",
        ));
    }
    hub.fetch_all(&repo, &files)?;
    Ok(hub.snapshot(&repo))
}

/// A connection to the Hub, and its cache.
struct Hub {
    endpoint: String,
    token: Option<String>,
    cache: PathBuf,
    offline: bool,
    agent: Agent,
}

impl Hub {
    fn from_env() -> Result<Self, Error> {
        let var = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
        let home = var("HF_HOME").map(PathBuf::from).or_else(|| {
            let cache = var("XDG_CACHE_HOME").map(PathBuf::from);
            Some(cache.or_else(|| env::home_dir().map(|home| home.join(".cache")))?.join("huggingface"))
        });
        let home = home.ok_or_else(|| {
            Error::new("there is no home folder to keep downloads in").with_hint("name one with HF_HOME")
        })?;
        let stored = || fs::read_to_string(home.join("token")).ok().map(|text| text.trim().to_owned());
        let offline = var("HF_HUB_OFFLINE").map(|value| value.to_lowercase());
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .user_agent(concat!("elapid/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(Duration::from_secs(20)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            .build();
        Ok(Self {
            endpoint: var("HF_ENDPOINT")
                .unwrap_or_else(|| "https://huggingface.co".into())
                .trim_end_matches('/')
                .to_owned(),
            token: var("HF_TOKEN").or_else(stored).filter(|token| !token.is_empty()),
            cache: var("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
            offline: offline.is_some_and(|value| ["1", "true", "yes", "on"].contains(&&value[..])),
            agent: config.into(),
        })
    }

    /// The folder of a repository in the cache.
    fn folder(&self, kind: Kind, name: &str) -> PathBuf {
        self.cache.join(format!("{}s--{}", kind.word(), name.replace('/', "--")))
    }

    fn snapshot(&self, repo: &Repo) -> PathBuf {
        self.folder(repo.kind, &repo.name).join("snapshots").join(&repo.commit)
    }

    /// What a revision of a repository holds; offline, what it held when it was last asked for.
    fn repo(&self, kind: Kind, name: &str, revision: &str) -> Result<Repo, Error> {
        let folder = self.folder(kind, name);
        let reference = folder.join("refs").join(revision);
        let listing = |commit: &str| folder.join("listings").join(format!("{commit}.json"));
        if self.offline {
            let commit = fs::read_to_string(&reference).map(|text| text.trim().to_owned());
            let files = commit
                .as_ref()
                .ok()
                .and_then(|commit| serde_json::from_slice(&fs::read(listing(commit)).ok()?).ok());
            let repo = |commit, files| Repo { kind, name: name.to_owned(), commit, files };
            return match (commit, files) {
                (Ok(commit), Some(files)) => Ok(repo(commit, files)),
                (Ok(commit), None) if folder.join("snapshots").join(&commit).is_dir() => {
                    let files = here(&folder.join("snapshots").join(&commit))?;
                    if kind == Kind::Dataset {
                        say(format_args!(
                            "warning: HF_HUB_OFFLINE forbids to ask what {name} holds; these {} files of it are here, and \
                             are taken for all",
                            files.len()
                        ));
                    }
                    Ok(repo(commit, files))
                }
                _ => Err(Error::new(format!(
                    "there is no {} {name} here, and HF_HUB_OFFLINE forbids to look for it",
                    kind.word()
                ))
                .with_hint("check the spelling of the path; or download it once without HF_HUB_OFFLINE")),
            };
        }
        let revision = revision.replace('/', "%2F");
        let url = format!("{}/api/{}s/{name}/revision/{revision}?blobs=true", self.endpoint, kind.word());
        let mut response = self.get(&url, 0, &format!("the {} {name}", kind.word()))?;
        let strange = |what: &str| {
            Error::new(format!("{url} answered strangely: {what}"))
                .with_hint("check HF_ENDPOINT, or try again later")
        };
        let text = response
            .body_mut()
            .with_config()
            .limit(1 << 28)
            .read_to_string()
            .map_err(|cause| strange(&cause.to_string()))?;
        let answer: Value = serde_json::from_str(&text).map_err(|cause| strange(&cause.to_string()))?;
        let plain = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric());
        let commit = answer["sha"].as_str().filter(|sha| plain(sha)).ok_or_else(|| strange("no commit"))?;
        let mut files = Vec::new();
        for file in answer["siblings"].as_array().into_iter().flatten() {
            let large = file["lfs"]["sha256"].as_str();
            let blob = large.or(file["blobId"].as_str()).filter(|blob| plain(blob));
            let path = file["rfilename"]
                .as_str()
                .filter(|path| !path.split('/').any(|part| ["", ".", ".."].contains(&part)));
            let (Some(path), Some(size), Some(blob)) = (path, file["size"].as_u64(), blob) else { continue };
            files.push(Remote { path: path.into(), size, blob: blob.into(), large: large.is_some() });
        }
        files.sort_by(|a, b| a.path.cmp(&b.path));
        write(&listing(commit), &serde_json::to_vec(&files).expect("plain data"))?;
        write(&reference, commit.as_bytes())?;
        Ok(Repo { kind, name: name.to_owned(), commit: commit.to_owned(), files })
    }

    /// Downloads files; gives their paths in the cache, in order.
    fn fetch_all(&self, repo: &Repo, files: &[Remote]) -> Result<Vec<PathBuf>, Error> {
        let here =
            |file: &Remote| self.snapshot(repo).join(&file.path).exists() || self.blob(repo, file).exists();
        let missing: Vec<&Remote> = files.iter().filter(|file| !here(file)).collect();
        let bytes: u64 = missing.iter().map(|file| file.size).sum();
        if !missing.is_empty() && self.offline {
            return Err(Error::new(format!(
                "{} of {} is not here, and HF_HUB_OFFLINE forbids to download it",
                missing[0].path, repo.name
            ))
            .with_hint("download it once without HF_HUB_OFFLINE"));
        }
        if !missing.is_empty() {
            say(format_args!(
                "downloading {} files of {}, {} MB",
                missing.len(),
                repo.name,
                bytes / 1_000_000
            ));
        }
        for (i, file) in missing.iter().enumerate() {
            say(format_args!(
                "  {} of {}: {}, {} MB",
                i + 1,
                missing.len(),
                file.path,
                file.size / 1_000_000
            ));
            self.fetch(repo, file)?;
        }
        files.iter().map(|file| self.place(repo, file)).collect()
    }

    fn blob(&self, repo: &Repo, file: &Remote) -> PathBuf {
        self.folder(repo.kind, &repo.name).join("blobs").join(&file.blob)
    }

    /// Gives a downloaded file its name in the snapshot.
    fn place(&self, repo: &Repo, file: &Remote) -> Result<PathBuf, Error> {
        let path = self.snapshot(repo).join(&file.path);
        if path.exists() {
            return Ok(path);
        }
        let parent = path.parent().unwrap_or(&self.cache);
        fs::create_dir_all(parent).map_err(|cause| Error::io("create", parent, &cause))?;
        let failed = |cause: std::io::Error| Error::io("write", &path, &cause);
        #[cfg(unix)]
        {
            let up = "../".repeat(2 + file.path.split('/').count() - 1);
            match std::os::unix::fs::symlink(format!("{up}blobs/{}", file.blob), &path) {
                Err(cause) if cause.kind() != ErrorKind::AlreadyExists => return Err(failed(cause)),
                _ => {}
            }
        }
        #[cfg(not(unix))]
        fs::copy(self.blob(repo, file), &path).map_err(failed)?;
        Ok(path)
    }

    /// Downloads one file: goes on where a transfer was cut off, in this process or before, and checks what came.
    fn fetch(&self, repo: &Repo, file: &Remote) -> Result<(), Error> {
        let blob = self.blob(repo, file);
        let part = blob.with_extension("incomplete");
        if let Some(parent) = blob.parent() {
            fs::create_dir_all(parent).map_err(|cause| Error::io("create", parent, &cause))?;
        }
        let path = file.path.split('/').map(escape).collect::<Vec<_>>().join("/");
        let folder = if repo.kind == Kind::Dataset { "datasets/" } else { "" };
        let url = format!("{}/{folder}{}/resolve/{}/{path}", self.endpoint, repo.name, repo.commit);
        let failed = |cause: &std::io::Error| Error::io("write", &part, cause);
        let mut out =
            OpenOptions::new().append(true).create(true).open(&part).map_err(|cause| failed(&cause))?;
        out.try_lock().map_err(|_| {
            Error::new(format!("{} is being downloaded by another process", file.path))
                .with_hint("wait for it")
        })?;
        let mut tries = 0;
        loop {
            let have = out.metadata().map_err(|cause| failed(&cause))?.len();
            if have >= file.size {
                break;
            }
            let mut response = self.get(&url, have, &format!("{} of {}", file.path, repo.name))?;
            if have > 0 && response.status() != StatusCode::PARTIAL_CONTENT {
                // The server knows no ranges: from the start.
                out.set_len(0).map_err(|cause| failed(&cause))?;
            }
            match copy(&mut response, &mut out) {
                Ok(()) => {}
                Err(Fault::Disk(cause)) => return Err(failed(&cause)),
                Err(Fault::Network) => {}
            }
            let now = out.metadata().map_err(|cause| failed(&cause))?.len();
            if now < file.size {
                // A transfer that brings anything is not given up.
                tries = if now > have { 0 } else { tries + 1 };
                if tries == TRIES {
                    return Err(Error::new(format!(
                        "the download of {url} breaks off at byte {now} of {}",
                        file.size
                    ))
                    .with_hint("check the connection; the same command goes on from there"));
                }
                thread::sleep(WAIT);
            }
        }
        out.sync_all().map_err(|cause| failed(&cause))?;
        if let Err(what) = check(&part, file) {
            let _ = fs::remove_file(&part);
            return Err(Error::new(format!("{url} is not what it should be: {what}"))
                .with_hint("it was removed; try again, and check HF_ENDPOINT and what lies on the way"));
        }
        fs::rename(&part, &blob).map_err(|cause| failed(&cause))
    }

    /// A request from byte `from` on, again and again where the server is busy or does not answer. `what` is for errors.
    fn get(&self, url: &str, from: u64, what: &str) -> Result<Response<Body>, Error> {
        let mut wait = WAIT;
        for attempt in 1.. {
            let mut request = self.agent.get(url);
            if let Some(token) = &self.token {
                request = request.header("authorization", format!("Bearer {token}"));
            }
            if from > 0 {
                request = request.header("range", format!("bytes={from}-"));
            }
            let fault = match request.call() {
                Ok(response) if response.status().is_success() => return Ok(response),
                Ok(response) => {
                    let status = response.status();
                    let busy = status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error();
                    if !busy {
                        return Err(self.refused(what, status, url));
                    }
                    let after = response.headers().get("retry-after").and_then(|value| value.to_str().ok());
                    if let Some(seconds) = after.and_then(|text| text.trim().parse::<u64>().ok()) {
                        wait = Duration::from_secs(seconds.min(LONGEST_WAIT));
                    }
                    Error::new(format!("{url} answers {status}"))
                        .with_hint("the server is busy; try again later")
                }
                Err(cause) => {
                    let error = Error::new(format!("cannot get {what} from {}: {cause}", self.endpoint)).with_hint(
                        "check the connection and HF_ENDPOINT; if a file or folder was meant, it does not exist",
                    );
                    if matches!(cause, ureq::Error::HostNotFound | ureq::Error::BadUri(_)) {
                        return Err(error);
                    }
                    error
                }
            };
            if attempt == TRIES {
                return Err(fault);
            }
            say(format_args!("{fault}; again in {:.1} seconds", wait.as_secs_f64()));
            thread::sleep(wait);
            wait = (wait * 2).min(Duration::from_secs(LONGEST_WAIT));
        }
        unreachable!("the last attempt returns")
    }

    fn refused(&self, what: &str, status: StatusCode, url: &str) -> Error {
        let hint = match (status.as_u16(), &self.token) {
            (401 | 403, None) => "it is private, gated, or does not exist: check its name, or set HF_TOKEN",
            (401 | 403, Some(_)) => {
                "check that the token in HF_TOKEN may read it, and that its terms are accepted"
            }
            (404, _) => "check its name; if a file or folder was meant, that does not exist either",
            _ => "check HF_ENDPOINT, or try again later",
        };
        Error::new(format!("cannot get {what}: {status} ({url})")).with_hint(hint)
    }
}

enum Fault {
    Network,
    Disk(std::io::Error),
}

fn copy(response: &mut Response<Body>, out: &mut File) -> Result<(), Fault> {
    let mut body = response.body_mut().with_config().limit(u64::MAX).reader();
    let mut buffer = vec![0; 256 << 10];
    loop {
        match body.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => out.write_all(&buffer[..n]).map_err(Fault::Disk)?,
            Err(cause) if cause.kind() == ErrorKind::Interrupted => {}
            Err(_) => return Err(Fault::Network),
        }
    }
}

/// Compares a file with its size and, where it is large, its SHA-256.
fn check(path: &Path, file: &Remote) -> Result<(), String> {
    let mut content = File::open(path).map_err(|cause| cause.to_string())?;
    let mut hash = Sha256::new();
    let size = std::io::copy(&mut content, &mut hash).map_err(|cause| cause.to_string())?;
    if size != file.size {
        return Err(format!("{size} bytes instead of {}", file.size));
    }
    let hash: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    if file.large && hash != file.blob {
        return Err(format!("its SHA-256 is {hash}, not {}", file.blob));
    }
    Ok(())
}

/// The files of a snapshot that Python downloaded.
fn here(snapshot: &Path) -> Result<Vec<Remote>, Error> {
    let (mut files, mut folders) = (Vec::new(), vec![snapshot.to_owned()]);
    while let Some(folder) = folders.pop() {
        let failed = |cause: std::io::Error| Error::io("read", &folder, &cause);
        for entry in fs::read_dir(&folder).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            // Files are links to what they hold.
            let meta = fs::metadata(&path).map_err(failed)?;
            if meta.is_dir() {
                folders.push(path);
                continue;
            }
            let parts = path.strip_prefix(snapshot).unwrap_or(&path).components();
            let path = parts.map(|part| part.as_os_str().to_string_lossy()).collect::<Vec<_>>().join("/");
            files.push(Remote { path, size: meta.len(), blob: String::new(), large: false });
        }
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

fn escape(part: &str) -> String {
    let byte = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    part.bytes().map(byte).collect()
}

fn write(path: &Path, content: &[u8]) -> Result<(), Error> {
    let parent = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(|cause| Error::io("create", parent, &cause))?;
    let new = path.with_extension("new");
    fs::write(&new, content)
        .and_then(|()| fs::rename(&new, path))
        .map_err(|cause| Error::io("write", path, &cause))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_from_paths() {
        for name in ["gpt2", "EleutherAI/gpt-neox-20b", "roneneldan/TinyStories", "a/b.c"] {
            assert!(is_name(name), "{name}");
        }
        for path in
            ["a.txt", "./gpt2", "/gpt2", "a/b/c", "a/b.jsonl", "a/b.txt.gz", "src/nothing", "", "a b", "../x"]
        {
            assert!(!is_name(path), "{path}");
        }
    }
}
