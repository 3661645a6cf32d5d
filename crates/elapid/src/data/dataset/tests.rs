//! Datasets of several parts, masks, and Megatron's files.

use std::fs;
use std::sync::Arc;

use arrow_array::types::Int32Type;
use arrow_array::{ArrayRef, BooleanArray, ListArray, RecordBatch};
use arrow_buffer::OffsetBuffer;
use arrow_ipc::writer::StreamWriter;
use arrow_schema::{DataType, Field};

use super::*;
use crate::data::{DatasetWriter, Sampler};

const NONE: i32 = elapid_tensor::IGNORE_LABEL;

fn lists(rows: &[&[i32]]) -> ArrayRef {
    let rows = rows.iter().map(|row| Some(row.iter().copied().map(Some)));
    Arc::new(ListArray::from_iter_primitive::<Int32Type, _, _>(rows))
}

fn write(dir: &Path, columns: &[(&str, ArrayRef)]) {
    fs::create_dir_all(dir).unwrap();
    let batch = RecordBatch::try_from_iter(columns.iter().cloned()).unwrap();
    let file = fs::File::create(dir.join("data-00000-of-00001.arrow")).unwrap();
    let mut writer = StreamWriter::try_new(file, &batch.schema()).unwrap();
    writer.write(&batch).unwrap();
    writer.finish().unwrap();
    fs::write(
        dir.join(STATE),
        r#"{"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "f"}"#,
    )
    .unwrap();
}

#[test]
fn masks_take_labels_away() {
    let dir = tempfile::tempdir().unwrap();
    let ids = lists(&[&[1, 2, 3, 4], &[5, 6, 7, 8]]);
    let bools = BooleanArray::from(vec![false, true, true, false, true, true, true, true]);
    let item = Arc::new(Field::new("item", DataType::Boolean, true));
    let bools = ListArray::new(item, OffsetBuffer::from_lengths([4, 4]), Arc::new(bools), None);
    write(&dir.path().join("loss"), &[("input_ids", ids.clone()), ("loss_mask", Arc::new(bools))]);
    let data = Dataset::open(&dir.path().join("loss")).unwrap();
    assert_eq!(data.sample(0).unwrap().labels, [NONE, 2, 3, NONE]);
    assert_eq!(data.sample(1).unwrap(), Sample::new(&[5, 6, 7, 8]));

    let mask = lists(&[&[0, 0, 1, 1], &[1, 1, 1, 0]]);
    write(&dir.path().join("attention"), &[("input_ids", ids), ("attention_mask", mask)]);
    let data = Dataset::open(&dir.path().join("attention")).unwrap();
    let sample = data.sample(0).unwrap();
    assert_eq!(sample.labels, [NONE, NONE, 3, 4]);
    // T5: padding is a document of its own, so it leaves no state.
    assert_eq!(sample.documents, Some(vec![PAD_DOCUMENT, PAD_DOCUMENT, 0, 0]));
    assert_eq!(data.sample(1).unwrap().labels, [5, 6, 7, NONE]);
    data.prefetch([0, 1]);
}

/// A dataset of `rows` blocks of 4, whose first token is `tag` and second one the row.
fn counted(dir: &Path, name: &str, tag: u32, rows: u32, card: &Card) {
    let mut writer = DatasetWriter::create(&dir.join(name), 4, true).unwrap();
    for row in 0..rows {
        writer.push(&[tag, row, 0, 0], Some(&[row as i32 / 2; 4])).unwrap();
    }
    let card = Card { vocab_size: 100, seq_len: 4, tokens: u64::from(rows) * 4, ..card.clone() };
    writer.finish(&card).unwrap();
}

fn open(dir: &Path, spec: &str) -> Result<Dataset, Error> {
    let parts: Vec<String> = spec.split(',').map(|part| dir.join(part).display().to_string()).collect();
    Dataset::open_blocks(Path::new(&parts.join(",")), Some(4))
}

#[test]
fn parts_stand_end_to_end_or_are_mixed() {
    let dir = tempfile::tempdir().unwrap();
    let card = Card { documents: 3, bytes: 10, tokenizer_sha256: Some("x".into()), ..Card::default() };
    counted(dir.path(), "a", 1, 5, &card);
    counted(dir.path(), "b", 2, 3, &card);
    let rows = |data: &Dataset, indices: &[usize]| -> Vec<[i32; 2]> {
        let row = |&index: &usize| data.sample(index).unwrap().input_ids[..2].try_into().unwrap();
        indices.iter().map(row).collect()
    };
    let data = open(dir.path(), "a,b").unwrap();
    assert_eq!((data.len(), data.samples()), (8, 8));
    assert_eq!(rows(&data, &[0, 4, 5, 7]), [[1, 0], [1, 4], [2, 0], [2, 2]]);
    let card = data.card().unwrap();
    assert_eq!((card.documents, card.bytes, card.tokens), (6, 20, 32));
    // Neither document 2 of the first nor document 0 of the second goes on.
    let continues: Vec<bool> = (0..8).map(|i| data.continues(i).unwrap()).collect();
    assert_eq!(continues, [false, true, false, true, false, false, true, false]);

    let mut data = open(dir.path(), "a:3,b:1").unwrap();
    assert!(data.is_mixture() && data.len() == 8);
    let one = rows(&data, &[0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(one.iter().filter(|row| row[0] == 1).count(), 6);
    let ordered: Vec<i32> = one.iter().filter(|row| row[0] == 1).map(|row| row[1]).collect();
    assert_eq!(ordered, [0, 1, 2, 3, 4, 0]);
    let before = data.fingerprint().unwrap().to_owned();
    data.shuffle_parts(7);
    assert_ne!(data.fingerprint().unwrap(), before);
    assert_ne!(open(dir.path(), "a:2,b:1").unwrap().fingerprint().unwrap(), before);

    // T24: any number of ranks reads the same samples.
    let order = |dp: usize, batch: usize| -> Vec<[i32; 2]> {
        let sampler = |rank| Sampler {
            len: data.samples(),
            batch,
            dp,
            rank,
            accum: 2,
            order: crate::data::Order::Dataset,
            from: (0, 0),
        };
        let indices =
            (0..6).flat_map(|i| (0..dp).flat_map(move |rank| sampler(rank).indices(i / 2, i as usize % 2)));
        rows(&data, &indices.collect::<Vec<_>>())
    };
    assert_eq!(order(1, 4), order(4, 1));
    assert_eq!(order(1, 4), order(2, 2));
}

#[test]
fn parts_that_do_not_go_together_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let card = |tokenizer: &str| Card {
        tokenizer: tokenizer.into(),
        tokenizer_sha256: Some(tokenizer.into()),
        ..Card::default()
    };
    counted(dir.path(), "a", 1, 5, &card("one"));
    counted(dir.path(), "b", 1, 5, &card("two"));
    let error = open(dir.path(), "a,b").err().unwrap();
    assert!(error.to_string().contains("different tokenizers (one and two)"), "{error}");
    write(&dir.path().join("c"), &[("input_ids", lists(&[&[1, 2]]))]);
    let error = open(dir.path(), "a,c").err().unwrap();
    assert!(error.to_string().contains("blocks of 4 tokens, but") && error.hint().is_some(), "{error}");
    let mut data = open(dir.path(), "a").unwrap();
    let error = data.check_vocab(99).unwrap_err();
    assert!(error.to_string().contains("(one) has 100 tokens, but the model's vocabulary has 99"), "{error}");
}

/// Megatron's two files: `sequences` of tokens, of which documents begin at these.
fn megatron(dir: &Path, sequences: &[&[u16]], documents: &[i64]) {
    let tokens: Vec<u8> = sequences.concat().iter().flat_map(|id| id.to_le_bytes()).collect();
    let mut index = b"MMIDIDX\0\0".to_vec();
    index.extend(1u64.to_le_bytes());
    index.push(8);
    index.extend((sequences.len() as u64).to_le_bytes());
    index.extend((documents.len() as u64).to_le_bytes());
    index.extend(sequences.iter().flat_map(|s| (s.len() as i32).to_le_bytes()));
    let starts = sequences.iter().scan(0, |at, s| {
        *at += 2 * s.len() as i64;
        Some(*at - 2 * s.len() as i64)
    });
    index.extend(starts.flat_map(i64::to_le_bytes));
    index.extend(documents.iter().flat_map(|d| d.to_le_bytes()));
    fs::write(dir.join("m.bin"), tokens).unwrap();
    fs::write(dir.join("m.idx"), index).unwrap();
}

#[test]
fn megatrons_files_are_cut_into_blocks() {
    let dir = tempfile::tempdir().unwrap();
    megatron(dir.path(), &[&[1, 2, 3], &[40_000, 5], &[], &[6, 7, 8, 9, 10]], &[0, 2, 2, 3, 4]);
    for name in ["m", "m.bin", "m.idx"] {
        let data = open(dir.path(), name).unwrap();
        assert_eq!((data.len(), data.seq_len()), (2, 4));
        assert_eq!(
            data.sample(0).unwrap(),
            Sample { documents: Some(vec![1; 4]), ..Sample::new(&[1, 2, 3, 40_000]) }
        );
        let second = data.sample(1).unwrap();
        assert_eq!(second.input_ids, [5, 6, 7, 8]);
        let documents = second.documents.unwrap();
        assert!(
            documents[0] == 1 && documents[1] > 1 && documents[1..] == [documents[1]; 3],
            "{documents:?}"
        );
        assert!(data.continues(1).unwrap());
        data.prefetch([0, 1]);
    }
    let mut data = open(dir.path(), "m").unwrap();
    let error = data.check_vocab(40_000).unwrap_err();
    assert!(error.to_string().contains("row 0 has token 40000 at position 3"), "{error}");
    let unsaid = Dataset::open(&dir.path().join("m.idx")).err().unwrap();
    assert!(unsaid.hint().unwrap().contains("--seq-len"), "{unsaid}");
}

#[test]
fn damaged_megatron_files_are_refused_or_read_as_other_data() {
    let dir = tempfile::tempdir().unwrap();
    megatron(dir.path(), &[&[1, 2, 3, 4], &[5, 6, 7, 8]], &[0, 1, 2]);
    let index = fs::read(dir.path().join("m.idx")).unwrap();
    let read = |bytes: &[u8]| -> Result<(), Error> {
        fs::write(dir.path().join("m.idx"), bytes).unwrap();
        let data = open(dir.path(), "m")?;
        (0..data.len()).try_for_each(|row| data.sample(row).map(|_| ()))
    };
    assert!(read(&index).is_ok());
    for length in 0..index.len() {
        assert!(read(&index[..length]).unwrap_err().hint().is_some(), "cut to {length}");
    }
    for at in 0..index.len() {
        let mut damaged = index.clone();
        damaged[at] ^= 0x81;
        let _ = read(&damaged);
    }
    assert!(read(&index).is_ok());
    fs::write(dir.path().join("m.bin"), [0; 14]).unwrap();
    assert!(read(&index).unwrap_err().to_string().contains("8 tokens of 2 bytes, but"));
}
