//! The files of a checkpoint: written in one stream with their checksum, read one block at a time.

use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crc32fast::Hasher;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};

use super::{FileInfo, Piece};
use crate::Error;

/// Bytes handled at a time.
const CHUNK: usize = 1 << 20;

/// A file that knows its length and checksum.
struct Summed {
    file: File,
    bytes: u64,
    crc: Hasher,
}

impl Write for Summed {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        let written = self.file.write(data)?;
        self.bytes += written as u64;
        self.crc.update(&data[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

fn hex(crc: Hasher) -> String {
    format!("{:08x}", crc.finalize())
}

/// Writes a file and waits until it is on disk.
pub(crate) fn write(
    path: &Path,
    content: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> Result<FileInfo, Error> {
    let write = || {
        let file = File::create(path)?;
        let mut out = BufWriter::with_capacity(CHUNK, Summed { file, bytes: 0, crc: Hasher::new() });
        content(&mut out)?;
        let Summed { file, bytes, crc } = out.into_inner().map_err(|error| error.into_error())?;
        file.sync_all()?;
        Ok(FileInfo { bytes, crc32: hex(crc) })
    };
    write().map_err(|cause| Error::io("write", path, &cause))
}

/// A safetensors file of fp32 tensors, of which `values` gives one at a time by its place in `entries`.
/// Format: the safetensors README (length of the header as u64, JSON header, data).
pub(super) fn write_tensors(
    path: &Path,
    entries: &[(String, Vec<usize>)],
    values: impl Fn(usize) -> Vec<f32>,
) -> Result<FileInfo, Error> {
    let mut end = 0;
    let infos = entries.iter().map(|(name, shape)| {
        let start = end;
        end += 4 * shape.iter().product::<usize>();
        (name.clone(), TensorInfo { dtype: Dtype::F32, shape: shape.clone(), data_offsets: (start, end) })
    });
    let header = Metadata::new(None, infos.collect())
        .map_err(|cause| cause.to_string())
        .and_then(|header| serde_json::to_string(&header).map_err(|cause| cause.to_string()))
        .map_err(|cause| Error::new(format!("cannot make the header of {}: {cause}", path.display())))?;
    let blanks = header.len().next_multiple_of(8) - header.len();
    write(path, |out| {
        out.write_all(&((header.len() + blanks) as u64).to_le_bytes())?;
        write!(out, "{header}{:blanks$}", "")?;
        let mut bytes = Vec::with_capacity(CHUNK);
        for place in 0..entries.len() {
            for part in values(place).chunks(CHUNK / 4) {
                bytes.clear();
                bytes.extend(part.iter().flat_map(|value| value.to_le_bytes()));
                out.write_all(&bytes)?;
            }
        }
        Ok(())
    })
}

fn damaged(path: &Path, what: impl std::fmt::Display) -> Error {
    Error::new(format!("{} {what}", path.display()))
        .with_hint("the checkpoint is damaged; take an earlier one, or --resume auto, which finds one")
}

/// Reads the whole file and compares it with what the manifest says.
pub(crate) fn verify(path: &Path, info: &FileInfo) -> Result<(), Error> {
    let mut file = match File::open(path) {
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => {
            return Err(damaged(path, "is missing"));
        }
        file => file.map_err(|cause| Error::io("open", path, &cause))?,
    };
    let bytes = file.metadata().map_err(|cause| Error::io("read", path, &cause))?.len();
    if bytes != info.bytes {
        return Err(damaged(path, format!("has {bytes} bytes instead of {}", info.bytes)));
    }
    let (mut crc, mut chunk) = (Hasher::new(), vec![0; CHUNK]);
    loop {
        match file.read(&mut chunk).map_err(|cause| Error::io("read", path, &cause))? {
            0 => break,
            read => crc.update(&chunk[..read]),
        }
    }
    let crc = hex(crc);
    if crc != info.crc32 {
        return Err(damaged(path, format!("has checksum {crc} instead of {}", info.crc32)));
    }
    Ok(())
}

/// A safetensors file open for reading.
#[derive(Debug)]
pub(super) struct PieceFile {
    path: PathBuf,
    file: File,
    header: Metadata,
    /// First byte after the header.
    data: u64,
}

impl PieceFile {
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        let io = |cause| Error::io("read", path, &cause);
        let mut file = File::open(path).map_err(io)?;
        let mut length = [0; 8];
        file.read_exact(&mut length).map_err(io)?;
        let length = u64::from_le_bytes(length);
        let mut header = Vec::new();
        (&file).take(length).read_to_end(&mut header).map_err(io)?;
        let header = serde_json::from_slice(&header).map_err(|cause| damaged(path, cause))?;
        Ok(Self { path: path.to_owned(), file, header, data: 8 + length })
    }

    /// Copies a block to its place in the logical tensor of extents `shape`, both row-major.
    pub(super) fn read(&self, piece: &Piece, shape: &[usize], values: &mut [f32]) -> Result<(), Error> {
        let Piece { name, offset, shape: extents, .. } = piece;
        let info = self.header.info(name).ok_or_else(|| damaged(&self.path, format!("holds no {name}")))?;
        if info.dtype != Dtype::F32 || info.shape != *extents {
            let what = format!("holds {name} as {} {:?}", info.dtype, info.shape);
            return Err(damaged(&self.path, format!("{what} instead of F32 {extents:?}")));
        }
        let io = |cause| Error::io("read", &self.path, &cause);
        let mut file = &self.file;
        file.seek(SeekFrom::Start(self.data + info.data_offsets.0 as u64)).map_err(io)?;
        let mut file = std::io::BufReader::with_capacity(CHUNK, file);
        // The longest stretches that lie together in both: whole trailing axes and one more.
        let whole = (0..shape.len()).rev().take_while(|&axis| extents[axis] == shape[axis]).count();
        let outer = (shape.len() - whole).saturating_sub(1);
        let run: usize = extents[outer..].iter().product();
        let runs: usize = extents[..outer].iter().product();
        let mut bytes = vec![0; 4 * run.min(CHUNK / 4)];
        for index in 0..runs {
            let (mut rest, mut start, mut stride) = (index, 0, 1);
            for axis in (0..shape.len()).rev() {
                let within = if axis < outer {
                    let within = rest % extents[axis];
                    rest /= extents[axis];
                    within
                } else {
                    0
                };
                start += (offset[axis] + within) * stride;
                stride *= shape[axis];
            }
            for part in values[start..start + run].chunks_mut(CHUNK / 4) {
                let bytes = &mut bytes[..4 * part.len()];
                file.read_exact(bytes).map_err(io)?;
                for (value, quad) in part.iter_mut().zip(bytes.as_chunks().0) {
                    *value = f32::from_le_bytes(*quad);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tensor cut up into blocks, as another mesh would write it, comes back whole.
    #[test]
    fn blocks_go_to_their_places() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("piece");
        let shape = [4, 3, 5];
        let element = |at: [usize; 3]| ((at[0] * 3 + at[1]) * 5 + at[2]) as f32;
        let blocks: [([usize; 3], [usize; 3]); 4] =
            [([0, 0, 0], [1, 3, 5]), ([1, 0, 0], [3, 1, 5]), ([1, 1, 0], [3, 2, 2]), ([1, 1, 2], [3, 2, 3])];
        let entries: Vec<_> =
            blocks.iter().enumerate().map(|(i, (_, extents))| (i.to_string(), extents.to_vec())).collect();
        let values = |place: usize| {
            let (offset, [a, b, c]) = blocks[place];
            let mut values = Vec::new();
            for (i, j, k) in (0..a).flat_map(|i| (0..b).flat_map(move |j| (0..c).map(move |k| (i, j, k)))) {
                values.push(element([offset[0] + i, offset[1] + j, offset[2] + k]));
            }
            values
        };
        let info = write_tensors(&path, &entries, values).unwrap();
        verify(&path, &info).unwrap();
        // The library agrees that this is a safetensors file.
        safetensors::SafeTensors::deserialize(&std::fs::read(&path).unwrap()).unwrap();
        let file = PieceFile::open(&path).unwrap();
        let mut whole = vec![f32::NAN; 60];
        for (name, (offset, extents)) in blocks.iter().enumerate() {
            let (file_name, name) = ("piece".to_owned(), name.to_string());
            let piece = Piece { file: file_name, name, offset: offset.to_vec(), shape: extents.to_vec() };
            file.read(&piece, &shape, &mut whole).unwrap();
        }
        assert!(whole.iter().enumerate().all(|(i, value)| *value == i as f32), "{whole:?}");
    }

    #[test]
    fn a_changed_or_shortened_file_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("piece");
        let info = write(&path, |out| out.write_all(b"0123456789")).unwrap();
        let reason = |content: &[u8]| {
            std::fs::write(&path, content).unwrap();
            verify(&path, &info).unwrap_err().to_string()
        };
        assert!(reason(b"0123456788").contains("checksum"));
        assert!(reason(b"012345678").contains("9 bytes instead of 10"));
        std::fs::remove_file(&path).unwrap();
        assert!(verify(&path, &info).unwrap_err().to_string().contains("is missing"));
    }
}
