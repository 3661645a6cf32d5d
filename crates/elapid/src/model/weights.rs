//! Tensors on disk: strided views of files, put together along an axis, and read a stretch at a time.
//!
//! Every reader of weights ends here, whatever the format: [`Weights`] holds tensors by their Hugging Face names, and
//! [`Weights::fit`] checks them against the layout table before the first value is read.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::{bf16, f16};
use memmap2::{Mmap, MmapOptions};
use safetensors::tensor::Dtype;
use safetensors::{SafeTensorError, SafeTensors};

use super::layout::Layout;
use crate::Error;

/// Elements that are in memory at a time while a tensor is gone through.
pub(crate) const PIECE: usize = 1 << 20;
pub(crate) const EMBEDDING: &str = "backbone.embeddings.weight";
/// What state-spaces calls [`EMBEDDING`]; transformers reads it too.
pub(super) const EMBEDDING_ALIAS: &str = "backbone.embedding.weight";
pub(crate) const HEAD: &str = "lm_head.weight";

/// Element type of weights on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileDType {
    /// `float32`.
    F32,
    /// `bfloat16`.
    Bf16,
    /// `float16`.
    F16,
}

impl FileDType {
    /// The name in a `config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
        }
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    /// The type that holds every value of both.
    pub(crate) fn or(self, other: Self) -> Self {
        if self == other { self } else { Self::F32 }
    }

    fn from_safetensors(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F32 => Some(Self::F32),
            Dtype::BF16 => Some(Self::Bf16),
            Dtype::F16 => Some(Self::F16),
            _ => None,
        }
    }

    pub(super) fn to_safetensors(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::Bf16 => Dtype::BF16,
            Self::F16 => Dtype::F16,
        }
    }

    /// Little-endian bytes to values, as many as there is room for.
    fn decode_into(self, bytes: &[u8], values: &mut [f32]) {
        let (quads, pairs) = (bytes.as_chunks::<4>().0, bytes.as_chunks::<2>().0);
        match self {
            Self::F32 => values.iter_mut().zip(quads).for_each(|(v, quad)| *v = f32::from_le_bytes(*quad)),
            Self::Bf16 => {
                values.iter_mut().zip(pairs).for_each(|(v, pair)| *v = bf16::from_le_bytes(*pair).to_f32())
            }
            Self::F16 => {
                values.iter_mut().zip(pairs).for_each(|(v, pair)| *v = f16::from_le_bytes(*pair).to_f32())
            }
        }
    }

    /// Little-endian bytes to values.
    pub(crate) fn decode(self, bytes: &[u8]) -> Vec<f32> {
        let mut values = vec![0.0; bytes.len() / self.size()];
        self.decode_into(bytes, &mut values);
        values
    }

    /// Values to little-endian bytes, rounded to nearest even.
    pub(crate) fn encode(self, values: &[f32]) -> Vec<u8> {
        match self {
            Self::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            Self::Bf16 => values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
            Self::F16 => values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect(),
        }
    }
}

/// A file that tensors lie in.
#[derive(Debug)]
pub(crate) struct Source {
    /// Where it is.
    pub(crate) path: PathBuf,
    file: File,
    /// Its length when it was opened.
    pub(crate) len: u64,
}

impl Source {
    pub(crate) fn open(path: &Path) -> Result<Arc<Self>, Error> {
        let file = File::open(path).map_err(|cause| Error::io("open", path, &cause))?;
        let len = file.metadata().map_err(|cause| Error::io("read", path, &cause))?.len();
        Ok(Arc::new(Self { path: path.to_owned(), file, len }))
    }

    /// The bytes from `start` on, refused where they go beyond the end of the file. Only what is looked at is read, and only while the map lives does it count as memory
    /// of this process.
    pub(crate) fn map(&self, start: u64, len: usize) -> Result<Mmap, Error> {
        if start.checked_add(len as u64).is_none_or(|end| end > self.len) {
            let path = self.path.display();
            return Err(Error::new(format!(
                "{path} has {} bytes, too few for what it says of itself",
                self.len
            ))
            .with_hint("the file is cut off or damaged; copy it again"));
        }
        // SAFETY: the map is read-only and short-lived. Elapid itself replaces model files by renaming, which leaves a
        // mapped file as it was; a foreign program that shrinks it meanwhile ends this process, as with any map.
        unsafe { MmapOptions::new().offset(start).len(len).map(&self.file) }
            .map_err(|cause| Error::io("map", &self.path, &cause))
    }
}

/// A tensor on disk.
pub(crate) trait Stored {
    /// Extents.
    fn shape(&self) -> &[usize];

    /// Element type; of several the one that holds them all.
    fn dtype(&self) -> FileDType;

    /// The file, or one of the files, that it lies in.
    fn path(&self) -> &Path;

    /// Reads the row-major elements from `first` on into `values`.
    fn read(&self, first: usize, values: &mut [f32]) -> Result<(), Error>;

    fn len(&self) -> usize {
        self.shape().iter().product()
    }
}

/// All values of a tensor in stretches of at most [`PIECE`], each with the place of its first element.
pub(crate) fn for_each_stretch(
    tensor: &dyn Stored,
    mut visit: impl FnMut(usize, &[f32]) -> Result<(), Error>,
) -> Result<(), Error> {
    let len = tensor.len();
    let mut values = vec![0.0; len.min(PIECE)];
    for first in (0..len).step_by(PIECE) {
        let values = &mut values[..PIECE.min(len - first)];
        tensor.read(first, values)?;
        visit(first, values)?;
    }
    Ok(())
}

/// A strided stretch of a file.
#[derive(Clone, Debug)]
pub(crate) struct View {
    source: Arc<Source>,
    dtype: FileDType,
    /// Byte of the first element.
    start: u64,
    shape: Vec<usize>,
    /// Elements from one index to the next, by axis.
    strides: Vec<usize>,
}

impl View {
    /// A view of a storage that takes the bytes `start..start + bytes` of the file, from its element `offset` on.
    ///
    /// # Errors
    /// What is wrong with it, as the end of a sentence about the tensor: it leaves the storage or the file, or has more
    /// elements than the storage.
    pub(crate) fn new(
        source: &Arc<Source>,
        dtype: FileDType,
        (start, bytes): (u64, u64),
        offset: usize,
        shape: &[usize],
        strides: &[usize],
    ) -> Result<Self, String> {
        let size = dtype.size();
        let capacity = bytes / size as u64;
        let elements = shape.iter().try_fold(1_usize, |product, extent| product.checked_mul(*extent));
        let last = shape.iter().zip(strides).try_fold(offset, |last, (extent, stride)| {
            stride.checked_mul(extent.saturating_sub(1))?.checked_add(last)
        });
        let in_file = start.checked_add(bytes).is_some_and(|end| end <= source.len);
        let inside = match (elements, last) {
            (Some(0), _) => true,
            (Some(elements), Some(last)) => (last as u64) < capacity && elements as u64 <= capacity,
            _ => false,
        };
        if !in_file || !inside || shape.len() != strides.len() {
            return Err(format!(
                "is {shape:?} with strides {strides:?} from element {offset} on, in a storage of {capacity}"
            ));
        }
        let start = start + (offset as u64).min(capacity) * size as u64;
        Ok(Self { source: source.clone(), dtype, start, shape: shape.to_vec(), strides: strides.to_vec() })
    }

    /// Indices `at..at + len` of an axis.
    pub(crate) fn slice(&self, axis: usize, at: usize, len: usize) -> Self {
        let mut part = self.clone();
        part.start += (at * self.strides[axis] * self.dtype.size()) as u64;
        part.shape[axis] = len;
        part
    }

    fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        self.shape.iter().zip(&self.strides).rev().all(|(extent, stride)| {
            let fits = *extent == 1 || *stride == expected;
            expected *= extent;
            fits
        })
    }
}

impl Stored for View {
    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn dtype(&self) -> FileDType {
        self.dtype
    }

    fn path(&self) -> &Path {
        &self.source.path
    }

    fn read(&self, first: usize, values: &mut [f32]) -> Result<(), Error> {
        if values.is_empty() {
            return Ok(());
        }
        let size = self.dtype.size();
        if self.is_contiguous() {
            let bytes = self.source.map(self.start + (first * size) as u64, values.len() * size)?;
            self.dtype.decode_into(&bytes, values);
            return Ok(());
        }
        let last: usize =
            self.shape.iter().zip(&self.strides).map(|(extent, stride)| (extent - 1) * stride).sum();
        let bytes = self.source.map(self.start, (last + 1) * size)?;
        for (place, value) in (first..).zip(values) {
            let mut rest = place;
            let mut at = 0;
            for (extent, stride) in self.shape.iter().zip(&self.strides).rev() {
                at += rest % extent * stride;
                rest /= extent;
            }
            self.dtype.decode_into(&bytes[at * size..][..size], std::slice::from_mut(value));
        }
        Ok(())
    }
}

/// Tensors side by side along an axis.
#[derive(Debug)]
pub(crate) struct Joined {
    axis: usize,
    shape: Vec<usize>,
    parts: Vec<View>,
}

impl Joined {
    /// The parts in their order, at least one; they agree in all other axes.
    pub(crate) fn new(axis: usize, parts: Vec<View>) -> Self {
        let mut shape = parts[0].shape.clone();
        shape[axis] = parts.iter().map(|part| part.shape[axis]).sum();
        Self { axis, shape, parts }
    }
}

impl Stored for Joined {
    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn dtype(&self) -> FileDType {
        self.parts.iter().map(|part| part.dtype).reduce(FileDType::or).expect("at least one part")
    }

    fn path(&self) -> &Path {
        self.parts[0].path()
    }

    fn read(&self, first: usize, values: &mut [f32]) -> Result<(), Error> {
        // All axes before the joined one make rows, the others the width of an index.
        let width: usize = self.shape[self.axis..].iter().product();
        let end = first + values.len();
        let mut from = 0;
        for part in &self.parts {
            let wide: usize = part.shape[self.axis..].iter().product();
            // Elements of this part that come before the element `at` of the whole.
            let before = |at: usize| at / width * wide + (at % width).saturating_sub(from).min(wide);
            let (start, stop) = (before(first), before(end));
            let mut taken = vec![0.0; stop - start];
            part.read(start, &mut taken)?;
            for (element, value) in (start..stop).zip(taken) {
                values[element / wide * width + from + element % wide - first] = value;
            }
            from += wide;
        }
        Ok(())
    }
}

/// Tensors by name.
#[derive(Default)]
pub(crate) struct Weights(pub(crate) BTreeMap<String, Box<dyn Stored>>);

impl From<BTreeMap<String, View>> for Weights {
    fn from(views: BTreeMap<String, View>) -> Self {
        Self(views.into_iter().map(|(name, view)| (name, Box::new(view) as Box<dyn Stored>)).collect())
    }
}

impl Weights {
    /// Every parameter of the layout and nothing else, all of the right shape. `place` is where the tensors come from,
    /// `config` what the layout was made of; both for messages.
    ///
    /// # Errors
    /// Tensors missing, unexpected or of another shape; a `lm_head.weight` that differs from the embedding it is tied
    /// to.
    pub(crate) fn fit(mut self, place: &Path, config: &str, layout: &Layout) -> Result<Self, Error> {
        // Else the names of what is missing could be millions.
        if layout.flat.layers > self.0.len() {
            let (place, layers, tensors) = (place.display(), layout.flat.layers, self.0.len());
            return Err(Error::new(format!(
                "the weights in {place} do not fit {config}: it makes {layers} layers, but there are {tensors} tensors"
            ))
            .with_hint(format!("{config} and weights belong to different models; copy both from the same place")));
        }
        let tied_head = if layout.shared().head.is_none() { self.0.remove(HEAD) } else { None };
        check_names(place, config, layout, &self.0)?;
        let check_shape = |name: &str, tensor: &dyn Stored, shape: &[usize]| {
            if tensor.shape() == shape {
                return Ok(());
            }
            let (found, path) = (tensor.shape(), tensor.path().display());
            Err(Error::new(format!("{name} is {found:?} in {path}, but {config} makes it {shape:?}"))
                .with_hint(format!(
                    "{config} and weights belong to different models; copy both from the same place"
                )))
        };
        for (name, _, info) in layout.iter() {
            check_shape(&name, &*self.0[&name], &info.shape)?;
        }
        if let Some(head) = tied_head {
            let embedding = &self.0[EMBEDDING];
            check_shape(HEAD, &*head, embedding.shape())?;
            let mut expected = vec![0.0; PIECE.min(head.len())];
            for_each_stretch(&*head, |first, values| {
                let expected = &mut expected[..values.len()];
                embedding.read(first, expected)?;
                let differs = values != expected;
                // What is not finite differs from itself; that has a message of its own.
                check_finite(HEAD, head.shape(), first, values)
                    .map_err(|error| error.at(head.path().display()))?;
                if !differs {
                    return Ok(());
                }
                let path = head.path().display();
                Err(Error::new(format!("{HEAD} in {path} differs from {EMBEDDING}, to which {config} ties it"))
                    .with_hint(format!("untie them in {config} to keep both (\"tie_word_embeddings\": false), or remove lm_head.weight")))
            })?;
        }
        Ok(self)
    }
}

/// `values` are those from element `first` of the tensor on.
pub(super) fn check_finite(name: &str, shape: &[usize], first: usize, values: &[f32]) -> Result<(), Error> {
    let Some(at) = values.iter().position(|value| !value.is_finite()) else { return Ok(()) };
    let value = values[at];
    let mut at = first + at;
    let mut index = vec![0; shape.len()];
    for (axis, extent) in shape.iter().enumerate().rev() {
        index[axis] = at % extent;
        at /= extent;
    }
    Err(Error::new(format!("{name}{index:?} is {value}"))
        .with_hint("the model diverged before it was saved, or the values do not fit the element type; use an earlier checkpoint"))
}

/// Every parameter is there and nothing else.
fn check_names(
    place: &Path,
    config: &str,
    layout: &Layout,
    found: &BTreeMap<String, Box<dyn Stored>>,
) -> Result<(), Error> {
    let expected: BTreeSet<String> = layout.iter().map(|(name, _, _)| name).collect();
    let missing: Vec<&str> =
        expected.iter().filter(|name| !found.contains_key(*name)).map(String::as_str).collect();
    let unexpected: Vec<&str> =
        found.keys().filter(|name| !expected.contains(*name)).map(String::as_str).collect();
    if missing.is_empty() && unexpected.is_empty() {
        return Ok(());
    }
    let mut message = format!("the weights in {} do not fit {config}:", place.display());
    for (what, names) in [("missing", &missing), ("unexpected", &unexpected)] {
        if !names.is_empty() {
            message += &format!(" {} {what} ({})", names.len(), names.join(", "));
        }
    }
    let headless =
        || missing.iter().all(|name| *name == HEAD || found.contains_key(&name["backbone.".len()..]));
    let hint = if missing == [HEAD] {
        "the head seems to be the embedding: set \"tie_word_embeddings\": true in config.json"
    } else if !missing.is_empty() && headless() {
        "the names lack \"backbone.\": save the model from Mamba2ForCausalLM, not from Mamba2Model"
    } else if unexpected.iter().any(|name| name.contains(".in_proj_z.")) {
        "its projections are split; join them with elapid convert --from hf --to hf"
    } else {
        "compare num_hidden_layers, use_bias, use_conv_bias and tie_word_embeddings in config.json with the weights"
    };
    Err(Error::new(message).with_hint(hint))
}

/// Views of all tensors of safetensors files, by name.
///
/// # Errors
/// A damaged file, an element type other than fp32, bf16 and fp16, a tensor that is in two files.
pub(crate) fn open_safetensors(files: &[PathBuf]) -> Result<BTreeMap<String, View>, Error> {
    let mut found: BTreeMap<String, View> = BTreeMap::new();
    for path in files {
        let source = Source::open(path)?;
        let damaged = |cause: String| {
            Error::new(format!(
                "{} ({} bytes) is not a whole safetensors file: {cause}",
                path.display(),
                source.len
            ))
            .with_hint("the file is cut off or damaged; copy it again")
        };
        let (header, metadata) = {
            let bytes = if source.len == 0 { None } else { Some(source.map(0, source.len as usize)?) };
            let bytes = bytes.as_deref().unwrap_or_default();
            SafeTensors::read_metadata(bytes).map_err(|cause: SafeTensorError| damaged(cause.to_string()))?
        };
        for (name, info) in metadata.tensors() {
            let dtype = FileDType::from_safetensors(info.dtype).ok_or_else(|| {
                Error::new(format!("{name} in {} has element type {}", path.display(), info.dtype))
                    .with_hint("supported are F32, BF16 and F16; save the model in one of them")
            })?;
            let (start, end) = info.data_offsets;
            let range = ((8 + header + start) as u64, (end - start) as u64);
            let view = View::new(&source, dtype, range, 0, &info.shape, &row_major(&info.shape))
                .map_err(|what| damaged(format!("{name} {what}")))?;
            insert(&mut found, name, view)?;
        }
    }
    Ok(found)
}

/// Adds a tensor that is not there yet.
pub(crate) fn insert(found: &mut BTreeMap<String, View>, name: String, view: View) -> Result<(), Error> {
    if let Some(other) = found.get(&name) {
        let (a, b) = (other.path().display(), view.path().display());
        return Err(Error::new(format!("{name} is in {a} and in {b}"))
            .with_hint("remove files that do not belong to this model"));
    }
    found.insert(name, view);
    Ok(())
}

/// The strides of a tensor that lies in one piece. Extents whose product overflows give strides that fit nowhere.
pub(crate) fn row_major(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = shape[axis].saturating_mul(strides[axis]);
    }
    strides
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 24 elements 0, 1, 2 … after 8 bytes of something else.
    fn source() -> (tempfile::TempDir, Arc<Source>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let values: Vec<f32> = (0..24).map(|value| value as f32).collect();
        std::fs::write(&path, [vec![0xff; 8], FileDType::F32.encode(&values)].concat()).unwrap();
        let source = Source::open(&path).unwrap();
        (dir, source)
    }

    fn view(source: &Arc<Source>, offset: usize, shape: &[usize], strides: &[usize]) -> Result<View, String> {
        View::new(source, FileDType::F32, (8, 96), offset, shape, strides)
    }

    fn values(tensor: &dyn Stored) -> Vec<f32> {
        let mut values = vec![0.0; tensor.len()];
        tensor.read(0, &mut values).unwrap();
        // Any stretch is that stretch of the whole.
        for (first, len) in [(1, values.len() - 1), (2, 3), (values.len() - 1, 1)] {
            let mut stretch = vec![0.0; len];
            tensor.read(first, &mut stretch).unwrap();
            assert_eq!(stretch, values[first..first + len]);
        }
        values
    }

    #[test]
    fn views_are_read_through_their_strides() {
        let (_dir, source) = source();
        assert_eq!(values(&view(&source, 3, &[2, 3], &[3, 1]).unwrap()), [3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
        assert_eq!(values(&view(&source, 0, &[3, 2], &[1, 12]).unwrap()), [0.0, 12.0, 1.0, 13.0, 2.0, 14.0]);
        let whole = view(&source, 0, &[4, 6], &[6, 1]).unwrap();
        assert_eq!(values(&whole.slice(0, 2, 1)), [12.0, 13.0, 14.0, 15.0, 16.0, 17.0]);
        assert_eq!(values(&whole.slice(1, 4, 2)), [4.0, 5.0, 10.0, 11.0, 16.0, 17.0, 22.0, 23.0]);
    }

    #[test]
    fn views_stay_inside_of_their_storage() {
        let (_dir, source) = source();
        for (offset, shape, strides) in [
            (1, vec![24], vec![1]),
            (usize::MAX, vec![1], vec![1]),
            (0, vec![2, 24], vec![0, 1]),
            (0, vec![usize::MAX, 2], vec![1, 1]),
            (0, vec![2], vec![usize::MAX]),
            (0, vec![2, 2], vec![1]),
        ] {
            let error = view(&source, offset, &shape, &strides).unwrap_err();
            assert!(error.contains("in a storage of 24"), "{error}");
        }
        assert!(View::new(&source, FileDType::F32, (9, 96), 0, &[1], &[1]).is_err());
        assert_eq!(view(&source, 24, &[0], &[1]).unwrap().len(), 0);
    }

    #[test]
    fn joined_parts_interleave_along_any_axis() {
        let (_dir, source) = source();
        let whole = view(&source, 0, &[2, 4, 3], &[12, 3, 1]).unwrap();
        let expected = values(&whole);
        for axis in 0..3 {
            let extent = whole.shape[axis];
            let parts = [whole.slice(axis, 0, 1), whole.slice(axis, 1, extent - 1)];
            assert_eq!(values(&Joined::new(axis, parts.to_vec())), expected, "axis {axis}");
        }
    }
}
