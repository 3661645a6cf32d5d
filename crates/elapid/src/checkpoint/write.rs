//! The files of a checkpoint: each rank its pieces, the first one all others.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use elapid_tensor::Backend;
use serde::{Deserialize, Serialize};

use super::held::Held;
use super::piece::{write, write_tensors};
use super::{CONFIG, FileInfo, LogicalTensor, MANIFEST, Manifest, Piece, Progress, State};
use crate::Error;
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

/// Writes the blocks that the rank of this number holds.
pub(super) fn write_pieces<B: Backend>(
    dir: &Path,
    rank: usize,
    backend: &B,
    held: Vec<Held<B>>,
    buffers: [&B::Buffer; 3],
) -> Result<Pieces, Error> {
    let file = format!("rank-{rank:05}.safetensors");
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
