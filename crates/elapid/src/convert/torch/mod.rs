//! Files of `torch.save`: a zip archive of a pickle and of one file of numbers a storage.

mod pickle;
mod write;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use zip::CompressionMethod;
use zip::read::{ArchiveOffset, Config, ZipArchive};
use zip::result::ZipError;

use crate::Error;
use crate::model::weights::{FileDType, PIECE, Source, View, insert};

pub(super) use write::write;

/// Most bytes of a pickle: that of a model of ten thousand tensors has some 2 MB.
const MAX_PICKLE: u64 = 16 << 20;

/// Views of all tensors of these files, by name. Nothing that a file says is executed.
///
/// # Errors
/// A file that is not a whole archive of `torch.save`, or holds anything but a dictionary of tensors of supported element
/// types.
pub(super) fn open(files: &[PathBuf]) -> Result<BTreeMap<String, View>, Error> {
    let mut found = BTreeMap::new();
    for path in files {
        for (name, view) in open_file(path)? {
            insert(&mut found, name, view)?;
        }
    }
    Ok(found)
}

/// A stored file of the archive: its place and its checksum.
struct Entry {
    start: u64,
    len: u64,
    crc: u32,
}

fn open_file(path: &Path) -> Result<Vec<(String, View)>, Error> {
    let source = Source::open(path)?;
    let fault = |what: &str| Error::new(format!("{} {what}", path.display()));
    let start = source.map(0, source.len.min(4) as usize);
    match start.as_deref().map_err(|_| ()) {
        Ok(b"PK\x03\x04") => {}
        Ok([0x80, ..]) => {
            return Err(fault("is in the format that torch wrote before version 1.6, a bare pickle")
                .with_hint(
                    "write it again in Python: torch.save(torch.load(path, weights_only=True), path)",
                ));
        }
        _ => {
            return Err(fault("is no file of torch.save")
                .with_hint("it should be a zip archive; the file may be damaged, or a Git LFS pointer"));
        }
    }
    let damaged = |what: &str| fault(what).with_hint("the file is cut off or damaged; copy it again");
    let entries = entries(path).map_err(|cause| damaged(&format!("is no whole zip archive: {cause}")))?;
    let root =
        entries.keys().find_map(|name| name.strip_suffix("/data.pkl").filter(|root| !root.contains('/')));
    let root = root
        .ok_or_else(|| fault("is a zip archive without data.pkl").with_hint("it is no file of torch.save"))?;
    if entries.contains_key(&format!("{root}/constants.pkl")) {
        return Err(fault("is a TorchScript program, not a dictionary of tensors")
            .with_hint("save the state_dict() of the model instead"));
    }
    let whole = |name: &str| match entries.get(name) {
        Some(Some(entry)) => Ok(Some(entry)),
        Some(None) => Err(fault(&format!("holds {name} compressed, as torch.save never does"))
            .with_hint("write it again with torch.save")),
        None => Ok(None),
    };
    let bytes = |entry: &Entry| source.map(entry.start, entry.len as usize);
    if let Some(order) = whole(&format!("{root}/byteorder"))?
        && order.len < 16
        && &bytes(order)?[..] != b"little"
    {
        return Err(fault("was written on a big-endian machine")
            .with_hint("load and save it with torch on a little-endian machine"));
    }
    let program = whole(&format!("{root}/data.pkl"))?.expect("root was found by it");
    if program.len > MAX_PICKLE {
        let what = format!("holds a data.pkl of {} bytes, more than {MAX_PICKLE}", program.len);
        return Err(fault(&what).with_hint("no dictionary of tensors is that large"));
    }
    check(&source, program).map_err(|what| damaged(&format!("holds a data.pkl that {what}")))?;
    let tensors = pickle::read(&bytes(program)?).map_err(|what| {
        fault(&format!("cannot be read safely: its pickle {what}"))
            .with_hint("elapid reads dictionaries of tensors and runs no code; save the state_dict() alone, or as safetensors")
    })?;

    let mut checked = BTreeMap::new();
    let mut views = Vec::new();
    for (name, tensor) in tensors {
        let pickle::Storage { kind, key, elements } = &tensor.storage;
        let dtype = match kind.as_str() {
            "FloatStorage" => FileDType::F32,
            "HalfStorage" => FileDType::F16,
            "BFloat16Storage" => FileDType::Bf16,
            other => {
                return Err(fault(&format!("holds {name} as {other}")).with_hint(
                    "supported are float32, bfloat16 and float16; save the model in one of them",
                ));
            }
        };
        let place = format!("{root}/data/{key}");
        let entry = whole(&place)?.ok_or_else(|| damaged(&format!("lacks {place}, which {name} lies in")))?;
        if elements.checked_mul(dtype.size() as u64) != Some(entry.len) {
            return Err(damaged(&format!(
                "holds {name} in a storage of {elements} elements, but {place} has {} bytes",
                entry.len
            )));
        }
        if checked.insert(key.clone(), ()).is_none() {
            check(&source, entry).map_err(|what| damaged(&format!("holds {place}, which {what}")))?;
        }
        let view = View::new(
            &source,
            dtype,
            (entry.start, entry.len),
            tensor.offset,
            &tensor.shape,
            &tensor.strides,
        )
        .map_err(|what| {
            fault(&format!("holds {name}, which {what}"))
                .with_hint("every element needs a place of its own in the file; save tensor.contiguous(), or copy the file again")
        })?;
        views.push((name, view));
    }
    Ok(views)
}

/// The files of the archive; None for one that is compressed or encrypted.
fn entries(path: &Path) -> Result<BTreeMap<String, Option<Entry>>, ZipError> {
    let reader = BufReader::with_capacity(4096, File::open(path)?);
    let mut archive = ZipArchive::with_config(Config { archive_offset: ArchiveOffset::Known(0) }, reader)?;
    if archive.has_duplicate_names() {
        return Err(ZipError::InvalidArchive("a name stands for two files".into()));
    }
    let mut entries = BTreeMap::new();
    for index in 0..archive.len() {
        let file = archive.by_index_raw(index)?;
        let stored = file.compression() == CompressionMethod::Stored && !file.encrypted();
        let start = file.data_start().ok_or(ZipError::InvalidArchive("a file lies nowhere".into()))?;
        let entry = Entry { start, len: file.size(), crc: file.crc32() };
        let stored = stored && file.size() == file.compressed_size();
        entries.insert(file.name()?.into_owned(), stored.then_some(entry));
    }
    Ok(entries)
}

/// Compares a file of the archive with its checksum.
fn check(source: &Arc<Source>, entry: &Entry) -> Result<(), String> {
    let end = entry.start.checked_add(entry.len).filter(|end| *end <= source.len);
    let end = end.ok_or_else(|| format!("claims {} bytes", entry.len))?;
    let mut crc = crc32fast::Hasher::new();
    let mut at = entry.start;
    while at < end {
        let len = (end - at).min(4 * PIECE as u64);
        let bytes = source.map(at, len as usize).map_err(|error| error.to_string())?;
        crc.update(&bytes);
        at += len;
    }
    let crc = crc.finalize();
    if crc == entry.crc {
        Ok(())
    } else {
        Err(format!("has checksum {crc:08x} instead of {:08x}", entry.crc))
    }
}
