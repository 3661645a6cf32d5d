//! The files of a checkpoint: each rank its pieces, the first one all others.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use elapid_tensor::Backend;
use serde::{Deserialize, Serialize};

use super::held::{Held, STRETCH};
use super::piece::{write, write_tensors};
use super::{CONFIG, FileInfo, LogicalTensor, MANIFEST, Manifest, PREFIXES, Piece, Progress, State};
use crate::Error;
use crate::config::ModelConfig;
use crate::parallel::{Mesh, Rank};

/// What a rank has written: its file, where it holds any block, and the blocks of each tensor.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Pieces {
    file: Option<(String, FileInfo)>,
    /// (name, logical extents, block)
    blocks: Vec<(String, Vec<usize>, Piece)>,
}

impl Pieces {
    /// Those of a rank that holds nothing that others do not.
    pub(super) fn none() -> Self {
        Self { file: None, blocks: Vec::new() }
    }
}

/// Everything but tensors.
pub(super) struct Description {
    mesh: Mesh,
    progress: Progress,
    config: String,
    /// Names and contents.
    tokenizer: Vec<(String, Vec<u8>)>,
}

impl Description {
    pub(super) fn new<B: Backend>(mesh: Mesh, state: &State<'_, B>, progress: Progress) -> Self {
        let tokenizer = state.tokenizer.map_or(&[][..], |tokenizer| tokenizer.files());
        let tokenizer = tokenizer.iter().map(|(name, content)| ((*name).to_owned(), content.clone()));
        let (config, tokenizer) = (state.model.config().to_json(), tokenizer.collect());
        Self { mesh, progress, config, tokenizer }
    }

    /// Writes all other files and the manifest, which names the `pieces` of all ranks.
    pub(super) fn write(self, dir: &Path, pieces: Vec<Pieces>) -> Result<(), Error> {
        let Self { mesh, progress, config, tokenizer } = self;
        let texts = std::iter::once((CONFIG, config.as_bytes()));
        let texts = texts.chain(tokenizer.iter().map(|(name, content)| (name.as_str(), &content[..])));
        let mut files = BTreeMap::new();
        for (name, content) in texts {
            files.insert(name.to_owned(), write(&dir.join(name), |out| out.write_all(content))?);
        }
        let mut tensors = BTreeMap::new();
        for Pieces { file, blocks } in pieces {
            files.extend(file);
            for (name, shape, piece) in blocks {
                let tensor = LogicalTensor { shape, dtype: "F32".into(), pieces: Vec::new() };
                tensors.entry(name).or_insert(tensor).pieces.push(piece);
            }
        }
        let tokenizer = tokenizer.into_iter().map(|(name, _)| name).collect();
        let manifest = Manifest::new(mesh, progress, tokenizer, files, tensors);
        write(&dir.join(MANIFEST), |out| out.write_all(manifest.to_json().as_bytes()))?;
        Ok(())
    }
}

/// Writes the files of a checkpoint into `dir`; all ranks call this together.
pub(crate) fn write_files<B: Backend>(
    dir: &Path,
    rank: &Rank,
    backend: &B,
    state: &State<'_, B>,
    progress: Progress,
) -> Result<(), Error> {
    let held = state.held(backend);
    let pieces = rank.gather(write_pieces(dir, rank.number(), backend, held, state.buffers)?);
    rank.from_first(|| Description::new(rank.mesh(), state, progress).write(dir, pieces))
}

/// Writes into `dir` a checkpoint of weights that no run has trained: parameters of these names and extents, of which `values`
/// gives any stretch, and no moments.
pub(crate) fn write_weights(
    dir: &Path,
    config: &ModelConfig,
    tokenizer: Vec<(String, Vec<u8>)>,
    parameters: Vec<(String, Vec<usize>)>,
    values: impl Fn(&str, usize, usize) -> Result<Vec<f32>, Error>,
) -> Result<(), Error> {
    let file = rank_file(0);
    let [prefix, ..] = PREFIXES;
    let entries: Vec<_> =
        parameters.iter().map(|(name, shape)| (format!("{prefix}.{name}"), shape.clone())).collect();
    let (info, sums) = write_tensors(&dir.join(&file), &entries, |place, sink| {
        let (name, shape) = &parameters[place];
        let elements = shape.iter().product();
        (0..elements).step_by(STRETCH).try_for_each(|first| {
            sink(&values(name, first, STRETCH.min(elements - first)).map_err(std::io::Error::other)?)
        })
    })?;
    let blocks = entries.into_iter().zip(sums).map(|((name, shape), crc32)| {
        let offset = vec![0; shape.len()];
        let piece = Piece { file: file.clone(), name: name.clone(), offset, shape: shape.clone(), crc32 };
        (name, shape, piece)
    });
    let pieces = Pieces { blocks: blocks.collect(), file: Some((file.clone(), info)) };
    let (mesh, progress, config) = (Mesh::SINGLE, Progress::none(), config.to_json());
    Description { mesh, progress, config, tokenizer }.write(dir, vec![pieces])
}

fn rank_file(rank: usize) -> String {
    format!("rank-{rank:05}.safetensors")
}

/// Writes the blocks that the rank of this number holds.
pub(super) fn write_pieces<B: Backend>(
    dir: &Path,
    rank: usize,
    backend: &B,
    held: Vec<Held<B>>,
    buffers: [&B::Buffer; 3],
) -> Result<Pieces, Error> {
    let file = rank_file(rank);
    if held.is_empty() {
        return Ok(Pieces::none());
    }
    let mut count = HashMap::new();
    let entries: Vec<_> = held
        .iter()
        .map(|block| {
            // The only block of a tensor has its name, further ones of the same file a number as well.
            let nth = count.entry(&block.tensor).and_modify(|n| *n += 1).or_insert(0);
            let name = if *nth == 0 { block.tensor.clone() } else { format!("{}#{nth}", block.tensor) };
            (name, block.shape.clone())
        })
        .collect();
    let values = |place: usize, sink: super::piece::Sink<'_>| held[place].each(backend, buffers, sink);
    let (info, sums) = write_tensors(&dir.join(&file), &entries, values)?;
    let blocks = held.into_iter().zip(entries).zip(sums).map(|((block, (name, shape)), crc32)| {
        let piece = Piece { file: file.clone(), name, offset: block.offset, shape, crc32 };
        (block.tensor, block.logical, piece)
    });
    Ok(Pieces { blocks: blocks.collect(), file: Some((file, info)) })
}
