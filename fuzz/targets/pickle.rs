//! The pickle in an archive of `torch.save`, with storages that it may speak of.
#![no_main]

use std::io::{Cursor, Write};

use elapid::convert::{Dimensions, compare};
use libfuzzer_sys::fuzz_target;
use zip::write::{SimpleFileOptions, ZipWriter};

fuzz_target!(|pickle: &[u8]| {
    let options = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    let mut archive = ZipWriter::new(Cursor::new(Vec::new()));
    let storage = [1; 64];
    let files = [("data.pkl", pickle), ("data/0", &storage), ("data/1", &storage[..8]), ("version", b"3\n")];
    for (name, bytes) in files {
        archive.start_file(format!("archive/{name}"), options).unwrap();
        archive.write_all(bytes).unwrap();
    }
    let archive = archive.finish().unwrap().into_inner();
    elapid_fuzz::with_files(&[("model.bin", &archive)], |dir| {
        let path = dir.join("model.bin");
        let _ = compare(&path, &path, &Dimensions::default());
    });
});
