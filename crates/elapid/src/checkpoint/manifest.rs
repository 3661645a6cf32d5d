//! `manifest.json`: what a checkpoint holds, and how to know that it is whole.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::piece::verify;
use crate::Error;
use crate::data::Order;
use crate::parallel::Mesh;

/// Version of the format that this build writes, and the only one that it reads.
const VERSION: u32 = 2;

/// What tells one dataset from another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Data {
    /// Number of blocks that are trained on.
    pub blocks: usize,
    /// L.
    pub seq_len: usize,
    /// The fingerprint in the dataset's `state.json`.
    pub fingerprint: Option<String>,
    /// What the dataset was tokenized with, where it says so.
    pub tokenizer: Option<String>,
}

/// How far a run has come, and what its order of samples depends on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Optimizer steps done.
    pub step: u64,
    /// Data position: global samples of this dataset that were read.
    pub samples: u64,
    /// Inputs since step 1.
    pub tokens: u64,
    /// Seconds in steps.
    pub seconds: f64,
    /// Loss of step 1; NaN (null in JSON) before it.
    #[serde(deserialize_with = "or_nan")]
    pub first_loss: f64,
    /// Loss of the last step; NaN before the first.
    #[serde(deserialize_with = "or_nan")]
    pub last_loss: f64,
    /// The order of samples; it needs no other state.
    pub order: Order,
    /// The dataset.
    pub data: Data,
    /// What `metrics.jsonl` says of the last step; null before the first.
    pub metrics: Value,
    /// The flags of the run, schedule and optimizer among them; null where no run has trained the weights.
    pub settings: Value,
}

impl Progress {
    /// That of weights that no run has trained.
    pub(super) fn none() -> Self {
        Self {
            step: 0,
            samples: 0,
            tokens: 0,
            seconds: 0.0,
            first_loss: f64::NAN,
            last_loss: f64::NAN,
            order: Order::Dataset,
            data: Data { blocks: 0, seq_len: 0, fingerprint: None, tokenizer: None },
            metrics: Value::Null,
            settings: Value::Null,
        }
    }

    /// Whether a run has come to it, so that there are moments.
    pub(crate) fn is_of_a_run(&self) -> bool {
        !self.settings.is_null()
    }
}

fn or_nan<'de, D: serde::Deserializer<'de>>(source: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(source)?.unwrap_or(f64::NAN))
}

/// One file beside the manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileInfo {
    /// Its length.
    pub bytes: u64,
    /// CRC-32 (IEEE 802.3) of the whole file, as eight hexadecimal digits.
    pub crc32: String,
}

/// A block of a logical tensor, stored as a tensor of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// File beside the manifest.
    pub file: String,
    /// Name of the block in that file.
    pub name: String,
    /// Where in the logical tensor its first element lies, by axis.
    pub offset: Vec<usize>,
    /// Its extents.
    pub shape: Vec<usize>,
    /// CRC-32 of its bytes.
    pub crc32: String,
}

/// A tensor as the model knows it, whatever the mesh.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogicalTensor {
    /// Extents.
    pub shape: Vec<usize>,
    /// Element type on disk; always `F32`.
    pub dtype: String,
    /// The blocks that tile it.
    pub pieces: Vec<Piece>,
}

/// The manifest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    version: u32,
    /// The ranks that wrote it.
    pub mesh: Mesh,
    /// How far the run had come.
    pub progress: Progress,
    /// Names of the tokenizer's files; none where the dataset has none.
    pub tokenizer: Vec<String>,
    /// All other files, by name.
    pub files: BTreeMap<String, FileInfo>,
    /// All tensors, by name with prefix.
    pub tensors: BTreeMap<String, LogicalTensor>,
}

/// Stands before the checksum of all that comes before it.
const SEAL: &str = ",\n  \"crc32\": \"";

impl Manifest {
    pub(super) fn new(
        mesh: Mesh,
        progress: Progress,
        tokenizer: Vec<String>,
        files: BTreeMap<String, FileInfo>,
        tensors: BTreeMap<String, LogicalTensor>,
    ) -> Self {
        Self { version: VERSION, mesh, progress, tokenizer, files, tensors }
    }

    /// JSON whose last field is the checksum of what stands before that field.
    pub(super) fn to_json(&self) -> String {
        let json = serde_json::to_string_pretty(self).expect("plain data");
        let body = json.strip_suffix("\n}").expect("an object on several lines");
        format!("{body}{SEAL}{:08x}\"\n}}\n", crc32fast::hash(body.as_bytes()))
    }

    /// Reads a manifest and checks it against itself; of the other files it looks at none.
    ///
    /// # Errors
    /// No such file, damaged, or of another version.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let fault = |what: String| {
            Error::new(format!("{}: {what}", path.display())).with_hint(
                "the checkpoint is damaged; take an earlier one, or --resume auto, which finds one",
            )
        };
        let text = match fs::read_to_string(path) {
            Err(cause) if cause.kind() == std::io::ErrorKind::InvalidData => {
                return Err(fault("the file is not text".into()));
            }
            read => read.map_err(|cause| {
                Error::io("read", path, &cause).with_hint("a checkpoint is a folder that holds manifest.json")
            })?,
        };
        let sealed = text
            .rsplit_once(SEAL)
            .filter(|(body, seal)| *seal == format!("{:08x}\"\n}}\n", crc32fast::hash(body.as_bytes())));
        if sealed.is_none() {
            return Err(fault("the file is cut off or changed: its checksum is not right".into()));
        }
        let version = serde_json::from_str::<Value>(&text).ok().and_then(|json| json["version"].as_u64());
        if version != Some(u64::from(VERSION)) {
            return Err(Error::new(format!(
                "{} has format version {}, this elapid reads version {VERSION}",
                path.display(),
                version.map_or("none".into(), |version| version.to_string())
            ))
            .with_hint("use the elapid that wrote it, or a newer one"));
        }
        let manifest: Self = serde_json::from_str(&text).map_err(|cause| fault(cause.to_string()))?;
        manifest.check().map_err(fault)?;
        Ok(manifest)
    }

    /// Compares a file of the checkpoint in `dir` with what is said of it here.
    ///
    /// # Errors
    /// It is missing, cut off or changed; of damaged tensors the names.
    pub fn verify(&self, dir: &Path, file: &str) -> Result<(), Error> {
        let pieces = self.tensors.values().flat_map(|tensor| &tensor.pieces);
        verify(&dir.join(file), &self.files[file], pieces.filter(|piece| piece.file == file))
    }

    /// Names no file outside of its folder, and every tensor is tiled by blocks inside of it.
    fn check(&self) -> Result<(), String> {
        if let Some(name) = self.tokenizer.iter().find(|name| !self.files.contains_key(*name)) {
            return Err(format!("the tokenizer's file {name:?} is none of this folder"));
        }
        for name in self.files.keys() {
            if Path::new(name).file_name().is_none_or(|last| last != name.as_str()) {
                return Err(format!("{name:?} is no file of this folder"));
            }
        }
        for (name, tensor) in &self.tensors {
            let inside = tensor.pieces.iter().all(|piece| {
                let rank = tensor.shape.len();
                let ends = piece.offset.iter().zip(&piece.shape).map(|(start, len)| start.checked_add(*len));
                piece.offset.len() == rank
                    && piece.shape.len() == rank
                    && ends.zip(&tensor.shape).all(|(end, extent)| end.is_some_and(|end| end <= *extent))
                    && self.files.contains_key(&piece.file)
            });
            let elements = |shape: &[usize]| shape.iter().try_fold(1_usize, |all, len| all.checked_mul(*len));
            // No piece is larger than its file, so that nobody makes room for what is not there.
            let held = |piece: &Piece| {
                let elements = elements(&piece.shape).filter(|_| inside)?;
                let bytes = elements.checked_mul(4)? as u64;
                self.files.get(&piece.file).is_some_and(|file| bytes <= file.bytes).then_some(elements)
            };
            let stored = tensor.pieces.iter().try_fold(0_usize, |sum, piece| sum.checked_add(held(piece)?));
            if stored.is_none()
                || stored != elements(&tensor.shape)
                || tensor.dtype != "F32"
                || overlap(&tensor.pieces)
            {
                return Err(format!("the pieces of {name} do not make it up"));
            }
        }
        Ok(())
    }
}

/// Whether two of the blocks have an element in common.
fn overlap(pieces: &[Piece]) -> bool {
    let apart = |a: &Piece, b: &Piece| {
        let axes = a.offset.iter().zip(&a.shape).zip(b.offset.iter().zip(&b.shape));
        axes.into_iter().any(|((from, len), (other, wide))| from + len <= *other || other + wide <= *from)
    };
    // Sorted by their first axis, a block overlaps none that begins behind its end.
    let mut sorted: Vec<&Piece> = pieces.iter().filter(|piece| !piece.shape.contains(&0)).collect();
    sorted.sort_by_key(|piece| piece.offset.first().copied());
    sorted.iter().enumerate().any(|(i, a)| {
        let end = a.offset.first().zip(a.shape.first()).map(|(from, len)| from + len);
        let near = sorted[i + 1..].iter().take_while(|b| b.offset.first().copied() < end || end.is_none());
        near.into_iter().any(|b| !apart(a, b))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        let progress = Progress {
            step: 7,
            samples: 28,
            tokens: 448,
            seconds: 1.5,
            first_loss: 5.0,
            last_loss: 4.0,
            order: Order::Shuffled(3),
            data: Data { blocks: 9, seq_len: 16, fingerprint: None, tokenizer: Some("bytes".into()) },
            metrics: serde_json::json!({ "step": 7 }),
            settings: serde_json::json!({ "lr": 3e-4 }),
        };
        let file = FileInfo { bytes: 48, crc32: "00000000".into() };
        let half = |at| Piece {
            file: "a".into(),
            name: "w".into(),
            offset: vec![at, 0],
            shape: vec![2, 3],
            crc32: "00000000".into(),
        };
        let tensor = LogicalTensor { shape: vec![4, 3], dtype: "F32".into(), pieces: vec![half(0), half(2)] };
        let (files, tensors) = ([("a".to_owned(), file)].into(), [("model.w".to_owned(), tensor)].into());
        Manifest::new(Mesh::SINGLE, progress, vec!["a".into()], files, tensors)
    }

    fn read(text: &[u8]) -> Result<Manifest, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("manifest.json");
        fs::write(&path, text).unwrap();
        Manifest::read(&path).map_err(|error| error.to_string())
    }

    #[test]
    fn comes_back_as_it_was_written() {
        assert_eq!(read(manifest().to_json().as_bytes()).unwrap(), manifest());
    }

    #[test]
    fn any_cut_and_any_changed_byte_is_noticed() {
        let text = manifest().to_json().into_bytes();
        for cut in 0..text.len() {
            assert!(read(&text[..cut]).is_err(), "cut at {cut}");
        }
        for at in 0..text.len() {
            let mut changed = text.clone();
            changed[at] ^= 1;
            assert!(read(&changed).is_err(), "byte {at}");
        }
    }

    #[test]
    fn pieces_must_make_up_their_tensor() {
        for (what, spoil) in [
            (
                "a gap",
                &(|m: &mut Manifest| drop(m.tensors.get_mut("model.w").unwrap().pieces.pop()))
                    as &dyn Fn(&mut _),
            ),
            ("beyond the end", &|m: &mut Manifest| {
                m.tensors.get_mut("model.w").unwrap().pieces[1].offset[0] = 3
            }),
            ("an overflow", &|m: &mut Manifest| {
                m.tensors.get_mut("model.w").unwrap().pieces[1].offset[0] = usize::MAX
            }),
            ("an overlap and a gap", &|m: &mut Manifest| {
                m.tensors.get_mut("model.w").unwrap().pieces[1].offset[0] = 1
            }),
            ("more than its file", &|m: &mut Manifest| m.files.get_mut("a").unwrap().bytes = 23),
            ("more than there is", &|m: &mut Manifest| {
                let tensor = m.tensors.get_mut("model.w").unwrap();
                tensor.shape = vec![1 << 40, 3];
                tensor.pieces.truncate(1);
                tensor.pieces[0].shape = tensor.shape.clone();
            }),
            ("a product that overflows", &|m: &mut Manifest| {
                let tensor = m.tensors.get_mut("model.w").unwrap();
                tensor.shape = vec![1 << 40, 1 << 40];
                tensor.pieces.truncate(1);
                tensor.pieces[0].shape = tensor.shape.clone();
            }),
            ("an unknown file", &|m: &mut Manifest| {
                m.tensors.get_mut("model.w").unwrap().pieces[0].file = "b".into()
            }),
        ] {
            let mut spoilt = manifest();
            spoil(&mut spoilt);
            assert!(read(spoilt.to_json().as_bytes()).unwrap_err().contains("model.w"), "{what}");
        }
        let mut spoilt = manifest();
        spoilt.files.insert("../b".into(), FileInfo { bytes: 0, crc32: String::new() });
        assert!(read(spoilt.to_json().as_bytes()).unwrap_err().contains("../b"));
    }

    #[test]
    fn another_version_is_refused_by_name() {
        let message = read(Manifest { version: 9, ..manifest() }.to_json().as_bytes()).unwrap_err();
        assert!(message.contains("version 9"), "{message}");
    }
}
