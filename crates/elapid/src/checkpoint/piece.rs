//! The files of a checkpoint: written in one stream with their checksum, read one block at a time.

use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::ops::Range;
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

/// Takes values, a stretch at a time.
pub(super) type Sink<'a> = &'a mut dyn FnMut(&[f32]) -> std::io::Result<()>;

/// A safetensors file of fp32 tensors, of which `values` gives one at a time by its place in `entries`; their checksums, too.
/// Format: the safetensors README (length of the header as u64, JSON header, data).
pub(super) fn write_tensors(
    path: &Path,
    entries: &[(String, Vec<usize>)],
    values: impl Fn(usize, Sink<'_>) -> std::io::Result<()>,
) -> Result<(FileInfo, Vec<String>), Error> {
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
    let mut sums = Vec::with_capacity(entries.len());
    let info = write(path, |out| {
        out.write_all(&((header.len() + blanks) as u64).to_le_bytes())?;
        write!(out, "{header}{:blanks$}", "")?;
        let mut bytes = Vec::with_capacity(CHUNK);
        for place in 0..entries.len() {
            let mut crc = Hasher::new();
            values(place, &mut |part| {
                for part in part.chunks(CHUNK / 4) {
                    bytes.clear();
                    bytes.extend(part.iter().flat_map(|value| value.to_le_bytes()));
                    crc.update(&bytes);
                    out.write_all(&bytes)?;
                }
                Ok(())
            })?;
            sums.push(hex(crc));
        }
        Ok(())
    })?;
    Ok((info, sums))
}

fn damaged(path: &Path, what: impl std::fmt::Display) -> Error {
    Error::new(format!("{} {what}", path.display()))
        .with_hint("the checkpoint is damaged; take an earlier one, or --resume auto, which finds one")
}

/// Reads the whole file and compares it with what the manifest says: its length and checksum. Where that is not right, the
/// error names those of its `pieces` that are damaged.
pub(super) fn verify<'a>(
    path: &Path,
    info: &FileInfo,
    pieces: impl Iterator<Item = &'a Piece>,
) -> Result<(), Error> {
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
    let crc = checksum(&mut file).map_err(|cause| Error::io("read", path, &cause))?;
    if crc == info.crc32 {
        return Ok(());
    }
    let what = format!("has checksum {crc} instead of {}", info.crc32);
    let Ok(file) = PieceFile::open(path) else { return Err(damaged(path, what)) };
    let names: Vec<_> =
        pieces.filter(|piece| !file.is_whole(piece)).map(|piece| piece.name.as_str()).collect();
    Err(damaged(
        path,
        match names.len() {
            0 => format!("{what}: its header is not the one that was written"),
            1..=NAMED => format!("{what}: {} is damaged", names.join(", ")),
            count => format!("{what}: {} and {} more are damaged", names[..NAMED].join(", "), count - NAMED),
        },
    ))
}

/// Damaged tensors that a message names.
const NAMED: usize = 4;

fn checksum(from: &mut impl Read) -> std::io::Result<String> {
    let (mut crc, mut chunk) = (Hasher::new(), vec![0; CHUNK]);
    loop {
        match from.read(&mut chunk)? {
            0 => return Ok(hex(crc)),
            read => crc.update(&chunk[..read]),
        }
    }
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

    /// Where the bytes of a block begin in the file.
    fn start(&self, piece: &Piece) -> Result<u64, Error> {
        let Piece { name, shape, .. } = piece;
        let info = self.header.info(name).ok_or_else(|| damaged(&self.path, format!("holds no {name}")))?;
        if info.dtype != Dtype::F32 || info.shape != *shape {
            let what = format!("holds {name} as {} {:?}", info.dtype, info.shape);
            return Err(damaged(&self.path, format!("{what} instead of F32 {shape:?}")));
        }
        Ok(self.data + info.data_offsets.0 as u64)
    }

    /// Whether a block is as it was written.
    fn is_whole(&self, piece: &Piece) -> bool {
        let bytes = 4 * piece.shape.iter().product::<usize>() as u64;
        let mut file = &self.file;
        let start = self.start(piece).and_then(|start| {
            file.seek(SeekFrom::Start(start)).map_err(|cause| Error::io("read", &self.path, &cause))
        });
        start.is_ok() && checksum(&mut file.take(bytes)).is_ok_and(|crc| crc == piece.crc32)
    }

    /// Copies elements `from` of a block, stretch by stretch, to the stretches `to` of `values`: as many in all.
    pub(super) fn read(
        &self,
        piece: &Piece,
        from: Vec<Range<usize>>,
        to: Vec<Range<usize>>,
        values: &mut [f32],
    ) -> Result<(), Error> {
        let start = self.start(piece)?;
        let io = |cause| Error::io("read", &self.path, &cause);
        let mut bytes = Vec::new();
        let mut to = to.into_iter();
        let mut free = 0..0;
        for run in from {
            let mut file = &self.file;
            file.seek(SeekFrom::Start(start + 4 * run.start as u64)).map_err(io)?;
            let mut rest = run.len();
            while rest > 0 {
                if free.is_empty() {
                    free = to.next().expect("as many elements on either side");
                }
                let len = rest.min(free.len()).min(CHUNK / 4);
                bytes.resize(4 * len, 0);
                file.read_exact(&mut bytes).map_err(io)?;
                for (value, quad) in values[free.start..][..len].iter_mut().zip(bytes.as_chunks().0) {
                    *value = f32::from_le_bytes(*quad);
                }
                free.start += len;
                rest -= len;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever part of a block is asked for, these elements are read and come to their places.
    #[test]
    fn stretches_go_to_their_places() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("piece");
        let entries: Vec<_> = ["a", "b"].map(|name| (name.to_owned(), vec![6, 5])).into();
        let (info, sums) = write_tensors(&path, &entries, |place, sink| {
            let values: Vec<f32> = (0..30).map(|i| (100 * place + i) as f32).collect();
            values.chunks(7).try_for_each(sink)
        })
        .unwrap();
        // The library agrees that this is a safetensors file.
        safetensors::SafeTensors::deserialize(&std::fs::read(&path).unwrap()).unwrap();
        let piece = |place: usize| Piece {
            file: "piece".into(),
            name: entries[place].0.clone(),
            offset: vec![0, 0],
            shape: vec![6, 5],
            crc32: sums[place].clone(),
        };
        verify(&path, &info, [piece(0), piece(1)].iter()).unwrap();
        let file = PieceFile::open(&path).unwrap();
        assert!(file.is_whole(&piece(0)) && file.is_whole(&piece(1)));
        let mut values = vec![-1.0; 8];
        file.read(&piece(1), vec![3..5, 20..24], vec![1..2, 4..8, 0..1], &mut values).unwrap();
        assert_eq!(values, [123.0, 103.0, -1.0, -1.0, 104.0, 120.0, 121.0, 122.0]);

        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 4;
        std::fs::write(&path, bytes).unwrap();
        let error = verify(&path, &info, [piece(0), piece(1)].iter()).unwrap_err().to_string();
        assert!(error.ends_with(": b is damaged"), "{error}");
    }

    #[test]
    fn a_changed_or_shortened_file_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("piece");
        let info = write(&path, |out| out.write_all(b"0123456789")).unwrap();
        let reason = |content: &[u8]| {
            std::fs::write(&path, content).unwrap();
            verify(&path, &info, [].iter()).unwrap_err().to_string()
        };
        assert!(reason(b"0123456788").contains("checksum"));
        assert!(reason(b"012345678").contains("9 bytes instead of 10"));
        std::fs::remove_file(&path).unwrap();
        assert!(verify(&path, &info, [].iter()).unwrap_err().to_string().contains("is missing"));
    }
}
