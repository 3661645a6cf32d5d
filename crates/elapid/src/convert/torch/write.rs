//! Writing what `torch.load` reads, with `weights_only=True` as well.

use std::collections::BTreeMap;
use std::io::Write;

use zip::result::ZipError;
use zip::write::{SimpleFileOptions, ZipWriter};

use crate::model::pretrained::{Out, Values, WriteError, Written, write_values};
use crate::model::weights::{FileDType, row_major};

/// An archive as `torch.save` makes it of a dictionary of tensors. `aliases` are further names of tensors, which share
/// their storage: (name, of).
pub(crate) fn write(
    out: &mut Out,
    tensors: &BTreeMap<String, Vec<usize>>,
    aliases: &[(&str, &str)],
    dtype: FileDType,
    source: &mut Values<'_>,
) -> Written {
    // Storages begin at multiples of 64 bytes, as torch's own do; entries above 4 GiB need the long form.
    let options = |bytes: u64| {
        SimpleFileOptions::default()
            .compression_method(zip::CompressionMethod::Stored)
            .with_alignment(64)
            .large_file(bytes >= u32::MAX.into())
    };
    let mut zip = ZipWriter::new(out);
    let small = |zip: &mut ZipWriter<_>, name: &str, content: &[u8]| -> Written {
        zip.start_file(format!("archive/{name}"), options(content.len() as u64)).map_err(zip_error)?;
        Ok(zip.write_all(content)?)
    };
    small(&mut zip, "data.pkl", &program(tensors, aliases, dtype))?;
    small(&mut zip, "byteorder", b"little")?;
    for (key, (name, shape)) in tensors.iter().enumerate() {
        let bytes = shape.iter().product::<usize>() as u64 * dtype.size() as u64;
        zip.start_file(format!("archive/data/{key}"), options(bytes)).map_err(zip_error)?;
        write_values(&mut zip, name, shape, dtype, source)?;
    }
    small(&mut zip, "version", b"3\n")?;
    zip.finish().map_err(zip_error)?;
    Ok(())
}

fn zip_error(cause: ZipError) -> WriteError {
    WriteError::Io(match cause {
        ZipError::Io(cause) => cause,
        other => std::io::Error::other(other.to_string()),
    })
}

/// The pickle: an `OrderedDict` of `_rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())`.
fn program(tensors: &BTreeMap<String, Vec<usize>>, aliases: &[(&str, &str)], dtype: FileDType) -> Vec<u8> {
    const EMPTY_DICT: &[u8] = b"ccollections\nOrderedDict\n)R";
    let class = match dtype {
        FileDType::F32 => "FloatStorage",
        FileDType::Bf16 => "BFloat16Storage",
        FileDType::F16 => "HalfStorage",
    };
    let mut bytes = [b"\x80\x02", EMPTY_DICT, b"("].concat();
    let names = tensors.keys().map(|name| (name.as_str(), name.as_str())).chain(aliases.iter().copied());
    for (name, of) in names {
        let key = tensors.keys().position(|tensor| tensor == of).expect("an alias is of one of the tensors");
        let shape = &tensors[of];
        text(&mut bytes, name);
        bytes.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut bytes, "storage");
        bytes.extend(format!("ctorch\n{class}\n").bytes());
        text(&mut bytes, &key.to_string());
        text(&mut bytes, "cpu");
        number(&mut bytes, shape.iter().product());
        bytes.extend(b"tQ");
        number(&mut bytes, 0);
        tuple(&mut bytes, shape);
        tuple(&mut bytes, &row_major(shape));
        bytes.push(0x89);
        bytes.extend(EMPTY_DICT);
        bytes.extend(b"tR");
    }
    bytes.extend(b"u.");
    bytes
}

fn text(bytes: &mut Vec<u8>, text: &str) {
    bytes.push(b'X');
    bytes.extend((text.len() as u32).to_le_bytes());
    bytes.extend(text.bytes());
}

fn number(bytes: &mut Vec<u8>, value: usize) {
    match i32::try_from(value) {
        Ok(value) => {
            bytes.push(b'J');
            bytes.extend(value.to_le_bytes());
        }
        Err(_) => {
            bytes.extend([0x8a, 8]);
            bytes.extend((value as i64).to_le_bytes());
        }
    }
}

fn tuple(bytes: &mut Vec<u8>, items: &[usize]) {
    bytes.push(b'(');
    items.iter().for_each(|item| number(bytes, *item));
    bytes.push(b't');
}
