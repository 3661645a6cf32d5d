//! Models of other programs (`golden/convert`, written by torch and safetensors): conversions and comparisons.
#![allow(missing_docs)]

mod common;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use common::{Room, failed_in_order, stderr};
use elapid::Error;
use elapid::config::ModelConfig;
use elapid::convert::{Conversion, Dimensions, Format, compare, convert};
use elapid::model::Mamba2ForCausalLM;
use elapid::model::pretrained::FileDType;
use elapid_cpu::{CpuBackend, CpuOptions};
use elapid_tensor::{Backend, DType};
use safetensors::SafeTensors;
use serde_json::{Value, json};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/convert").join(name)
}

const CASES: [(&str, Format); 9] = [
    ("ssm_g1_tied_fp32", Format::MambaSsm),
    ("ssm_g4_fp16", Format::MambaSsm),
    ("ssm_g4_tied_bf16", Format::MambaSsm),
    ("ssm_views", Format::MambaSsm),
    ("codestral", Format::Codestral),
    ("hf_split", Format::Hf),
    ("tp2", Format::NeuronTp),
    ("tp4", Format::NeuronTp),
    // Whole, and of transformers' own making.
    ("../models/groups", Format::Hf),
];

fn conversion(from: Format, to: Format, input: &Path, output: &Path) -> Conversion {
    Conversion {
        from,
        to,
        input: input.to_owned(),
        output: output.to_owned(),
        dtype: None,
        tokenizer: None,
        split_proj: false,
        dimensions: Dimensions::default(),
    }
}

fn converted(from: Format, to: Format, input: &Path, output: &Path) -> Result<(), Error> {
    convert(&conversion(from, to, input, output))
}

fn values(tensors: &SafeTensors<'_>, name: &str) -> (Vec<usize>, Vec<[u8; 4]>) {
    let tensor = tensors.tensor(name).unwrap();
    (tensor.shape().to_vec(), tensor.data().as_chunks().0.to_vec())
}

/// T1, T10, T11, T13: any mistake in names, order, segments or norm shows in the logits.
#[test]
fn t1_t10_t13_logits_are_those_of_transformers() {
    let backend = CpuBackend::new(&CpuOptions { threads: Some(2), ..CpuOptions::default() }).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for (name, from) in CASES {
        let out = dir.path().join(name.replace("../", ""));
        converted(from, Format::Hf, &golden(name), &out).unwrap();
        let bytes = fs::read(golden(name).join("golden.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let (shape, ids) = values(&tensors, "input_ids");
        let ids: Vec<i32> = ids.into_iter().map(i32::from_le_bytes).collect();
        let expected: Vec<f32> = values(&tensors, "logits").1.into_iter().map(f32::from_le_bytes).collect();
        let model = Mamba2ForCausalLM::from_pretrained(&backend, &out, DType::F32).unwrap();
        let logits = model.logits(&backend, &backend.tensor_i32(&ids, &shape));
        assert_eq!(logits.len(), expected.len());
        let largest = expected.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
        let error = logits.iter().zip(&expected).fold(0.0_f32, |error, (a, b)| error.max((a - b).abs()));
        println!("{name}: {:.1e}", error / largest);
        assert!(error / largest < 5e-6, "{name}: {:.1e}", error / largest);
    }
}

#[test]
fn element_types_are_kept_unless_another_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    for (name, from, dtype) in [
        ("ssm_g1_tied_fp32", Format::MambaSsm, "float32"),
        ("ssm_g4_fp16", Format::MambaSsm, "float16"),
        ("ssm_g4_tied_bf16", Format::MambaSsm, "bfloat16"),
        ("codestral", Format::Codestral, "bfloat16"),
        ("tp4", Format::NeuronTp, "bfloat16"),
    ] {
        let out = dir.path().join(name);
        converted(from, Format::Hf, &golden(name), &out).unwrap();
        assert_eq!(ModelConfig::load(&out).unwrap().dtype.as_deref(), Some(dtype), "{name}");
        let found = compare(&golden(name), &out, &Dimensions::default()).unwrap();
        assert!(found.equal, "{name}: {found:?}");
    }
    let out = dir.path().join("narrow");
    let narrow = Conversion {
        dtype: Some(FileDType::F16),
        ..conversion(Format::MambaSsm, Format::Hf, &golden("ssm_g1_tied_fp32"), &out)
    };
    convert(&narrow).unwrap();
    let found = compare(&golden("ssm_g1_tied_fp32"), &out, &Dimensions::default()).unwrap();
    assert!(!found.equal);
    for tensor in found.tensors {
        assert_eq!(tensor.dtype, [Some("float32"), Some("float16")]);
        assert!(tensor.relative.unwrap() < 1.0 / 2048.0, "{tensor:?}");
    }
}

fn same_bytes(a: &Path, b: &Path) {
    assert!(fs::read(a).unwrap() == fs::read(b).unwrap(), "{} and {}", a.display(), b.display());
}

/// From transformers' own files through another format and back.
#[test]
fn round_trips_come_back_to_the_byte() {
    let dir = tempfile::tempdir().unwrap();
    let models = golden("../models");
    let mut done = 0;
    for case in fs::read_dir(models).unwrap().map(|entry| entry.unwrap()) {
        let at = |name: &str| dir.path().join(case.file_name()).join(name);
        let out = converted(Format::Hf, Format::MambaSsm, &case.path(), &at("ssm"));
        if ModelConfig::load(&case.path()).unwrap().layer_norm_epsilon != 1e-5 {
            assert!(out.unwrap_err().to_string().contains("layer_norm_epsilon is 1e-3"));
            assert!(!at("ssm").exists());
        } else {
            out.unwrap();
            converted(Format::MambaSsm, Format::Hf, &at("ssm"), &at("hf")).unwrap();
            same_bytes(&case.path().join("model.safetensors"), &at("hf/model.safetensors"));
            done += 1;
        }
        let split =
            Conversion { split_proj: true, ..conversion(Format::Hf, Format::Hf, &case.path(), &at("split")) };
        convert(&split).unwrap();
        converted(Format::Hf, Format::Hf, &at("split"), &at("whole")).unwrap();
        same_bytes(&case.path().join("model.safetensors"), &at("whole/model.safetensors"));
        assert_eq!(ModelConfig::load(&at("whole")).unwrap(), ModelConfig::load(&case.path()).unwrap());
        let error =
            compare(&at("split/model.safetensors"), &at("whole/model.safetensors"), &Dimensions::default());
        assert!(!error.unwrap().equal, "a split projection has other names in its file");
        assert!(compare(&at("split"), &at("whole"), &Dimensions::default()).unwrap().equal);
    }
    assert!(done >= 8, "only {done}");
    // Split by hand and whole as transformers saves it.
    converted(Format::Hf, Format::Hf, &golden("hf_split"), &dir.path().join("joined")).unwrap();
    same_bytes(&golden("hf_split_whole/model.safetensors"), &dir.path().join("joined/model.safetensors"));

    for (name, format) in [
        ("ssm_g1_tied_fp32", Format::MambaSsm),
        ("ssm_g4_fp16", Format::MambaSsm),
        ("ssm_g4_tied_bf16", Format::MambaSsm),
        ("codestral", Format::Codestral),
    ] {
        let at = |step: &str| dir.path().join(format!("{name}-{step}"));
        converted(format, Format::Hf, &golden(name), &at("hf")).unwrap();
        converted(Format::Hf, format, &at("hf"), &at("back")).unwrap();
        assert!(compare(&golden(name), &at("back"), &Dimensions::default()).unwrap().equal);
        converted(format, Format::Hf, &at("back"), &at("again")).unwrap();
        for file in ["model.safetensors", "config.json", "generation_config.json"] {
            same_bytes(&at("hf").join(file), &at("again").join(file));
        }
        converted(Format::Hf, format, &at("again"), &at("back-again")).unwrap();
        let file = if format == Format::Codestral { "consolidated.safetensors" } else { "pytorch_model.bin" };
        same_bytes(&at("back").join(file), &at("back-again").join(file));
        if format == Format::Codestral {
            assert_eq!(fs::read_to_string(at("back").join("tokenizer.model.v3")).unwrap().lines().count(), 1);
        }
    }
}

/// T14: what we write for state-spaces holds both names of a tied table in one storage, as torch does.
#[test]
fn t14_a_tied_head_shares_its_storage() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    converted(Format::MambaSsm, Format::MambaSsm, &golden("ssm_g1_tied_fp32"), &out).unwrap();
    let ours = out.join("pytorch_model.bin");
    assert!(
        compare(&golden("ssm_g1_tied_fp32/pytorch_model.bin"), &ours, &Dimensions::default()).unwrap().equal
    );
    let mut zip = zip::ZipArchive::new(fs::File::open(&ours).unwrap()).unwrap();
    let tensors = compare(&ours, &ours, &Dimensions::default()).unwrap().tensors.len();
    let storages = zip.file_names().filter(|name| name.as_ref().unwrap().contains("/data/")).count();
    assert_eq!(storages, tensors - 1);
    for index in 0..zip.len() {
        let file = zip.by_index(index).unwrap();
        assert_eq!(file.data_start().unwrap() % 64, 0, "{:?}", file.name());
    }
}

#[test]
fn checkpoints_become_the_models_that_their_runs_exported() {
    let room = Room::with_data();
    room.ok(&format!("{} --save-last-step --output-dir run", common::TRAIN));
    // The tokenizer is in the checkpoint.
    let same = |of: &str| {
        assert_eq!(room.names(of), room.names("run/hf"));
        for name in room.names(of) {
            same_bytes(&room.path(&format!("{of}/{name}")), &room.path(&format!("run/hf/{name}")));
        }
    };
    room.ok("convert --from elapid -i run/checkpoints -o out");
    same("out");
    assert!(room.ok("diff run/checkpoints out").starts_with("equal: "));

    // And back: weights that a run can begin with, in either of three ways.
    room.ok("convert --from hf --to elapid -i out -o back");
    room.ok("convert --from elapid -i back -o again");
    same("again");
    for (name, flags) in [
        ("init", "--init-from out"),
        ("load", "--checkpoint-load --checkpoint-load-dir back"),
        ("resume", "--resume back"),
    ] {
        let train = if name == "init" {
            common::TRAIN.replace("--model tiny.json ", "")
        } else {
            common::TRAIN.into()
        };
        room.ok(&format!("{train} {flags} --output-dir {name}"));
        assert_eq!(room.losses(name), room.losses("init"), "{name}");
    }
    assert_eq!(room.json("inspect back --verify --json")["step"], 0);
}

#[test]
fn the_replaced_script_s_command_line_works() {
    let room = Room::with_data();
    let input = golden("ssm_g1_tied_fp32");
    let line = format!("convert -m mamba_ssm -p fp16 -i {} -o out --split_proj", input.display());
    let output = room.run(&line);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("warning:") && stderr(&output).contains("no tokenizer"));
    let bytes = fs::read(room.path("out/model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let shape = |part: &str| {
        tensors.tensor(&format!("backbone.layers.0.mixer.in_proj_{part}.weight")).unwrap().shape().to_vec()
    };
    assert_eq!((shape("z"), shape("xBC"), shape("dt")), (vec![32, 16], vec![48, 16], vec![4, 16]));
    assert!(tensors.iter().all(|(_, tensor)| tensor.dtype() == safetensors::Dtype::F16));

    let long = "--mamba2_model_type mamba_ssm --precision bf16 --mamba2_checkpoint_directory";
    room.ok(&format!("convert {long} {} --output_dir out2", input.display()));
    assert_eq!(room.names("out2"), ["config.json", "generation_config.json", "model.safetensors"]);
    // 257 tokens do not fit into 48 rows.
    let said = room.refuses(
        &format!("convert -m mamba_ssm -i {} -o out3 -t data/tokenizer", input.display()),
        &["257 tokens"],
    );
    assert!(said.contains("but the model 48"), "{said}");
    assert!(!room.path("out3").exists());
}

#[test]
fn ranks_without_a_configuration_need_flags() {
    let room = Room::new();
    fs::create_dir(room.path("ranks")).unwrap();
    for entry in fs::read_dir(golden("tp2/model")).unwrap().map(|entry| entry.unwrap()) {
        fs::copy(entry.path(), room.path("ranks").join(entry.file_name())).unwrap();
    }
    let line = "convert --from neuron-tp -i ranks -o out";
    let said = room.refuses(line, &["does not say which model"]);
    assert!(said.contains("--model"));
    fs::copy(golden("tp2/config.json"), room.path("model.json")).unwrap();
    room.refuses(
        &format!("{line} --model model.json --n-groups 2"),
        &["in_proj_xBC.weight is", "on each of 2 ranks"],
    );
    room.refuses(
        &format!("{line} --model model.json --vocab-size 64"),
        &["embeddings.weight is [24, 16]", "[32, 16]"],
    );
    room.refuses(&format!("{line} --model Mamba130M"), &["[768, 768] on each of 2 ranks"]);
    room.ok(&format!("{line} --model model.json"));
    room.ok("diff ranks out --model model.json");
    fs::remove_file(room.path("ranks/dp_rank_00_tp_rank_00_pp_rank_00.pt")).unwrap();
    room.refuses(&format!("{line}2 --model model.json"), &["none of tp_rank_00"]);
    room.write("ranks/dp_rank_00_tp_rank_00_pp_rank_01.pt", "");
    room.refuses(&format!("{line}2 --model model.json"), &["pipeline of several stages"]);
}

/// T12: copies that should be equal are compared.
#[test]
fn t12_replicated_tensors_that_drifted_apart_are_reported() {
    let room = Room::new();
    fs::create_dir(room.path("ranks")).unwrap();
    fs::copy(golden("tp2/config.json"), room.path("ranks/config.json")).unwrap();
    for rank in ["00", "01"] {
        let name = format!("dp_rank_00_tp_rank_{rank}_pp_rank_00.pt");
        fs::copy(golden("tp2/model").join(&name), room.path("ranks").join(&name)).unwrap();
    }
    room.ok("convert --from neuron-tp -i ranks -o same");
    let model = golden("tp2/model/dp_rank_00_tp_rank_01_pp_rank_00.pt");
    let changed = rewritten(&model, |name, bytes| {
        // 16 elements of bf16: the norms of width D.
        if name.contains("/data/") && bytes.len() == 32 {
            bytes[0] ^= 1;
        }
    });
    fs::write(room.path("ranks/dp_rank_00_tp_rank_01_pp_rank_00.pt"), changed).unwrap();
    let output = room.run("convert --from neuron-tp -i ranks -o out");
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(
        stderr(&output).contains("warning: backbone.norm_f.weight should be the same on all ranks"),
        "{}",
        stderr(&output)
    );
}

/// The archive after a change of its files, with checksums that fit.
fn rewritten(path: &Path, mut change: impl FnMut(&str, &mut Vec<u8>)) -> Vec<u8> {
    let mut old = zip::ZipArchive::new(fs::File::open(path).unwrap()).unwrap();
    let mut new = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for index in 0..old.len() {
        let mut file = old.by_index(index).unwrap();
        let (name, mut bytes) = (file.name().unwrap().into_owned(), Vec::new());
        std::io::Read::read_to_end(&mut file, &mut bytes).unwrap();
        change(&name, &mut bytes);
        new.start_file(name, stored).unwrap();
        new.write_all(&bytes).unwrap();
    }
    new.finish().unwrap().into_inner()
}

#[test]
fn pickles_that_run_code_are_refused_and_not_run() {
    let room = Room::new();
    let refused = golden("refused");
    for (name, expected) in [
        ("evil.bin", "refers to posix.system"),
        ("module.bin", "refers to torch.nn.modules.linear.Linear"),
        ("legacy.bin", "before version 1.6"),
        ("double.bin", "holds weight as DoubleStorage"),
        ("expanded.bin", "[1099511627776] with strides [0]"),
    ] {
        let mut said = Vec::new();
        let path = refused.join(name);
        let output = room.run(&format!("diff {0} {0}", path.display()));
        assert_eq!(output.status.code(), Some(2));
        said.push(failed_in_order(&output));
        fs::create_dir_all(room.path("model")).unwrap();
        fs::copy(golden("ssm_g1_tied_fp32/config.json"), room.path("model/config.json")).unwrap();
        fs::copy(&path, room.path("model/pytorch_model.bin")).unwrap();
        said.push(room.refuses("convert -m mamba_ssm -i model -o out", &[]));
        assert!(said.iter().all(|said| said.contains(expected)), "{said:?}");
        assert!(!room.path("out").exists());
    }
    assert!(!Path::new("/tmp/elapid-was-here").exists());
}

#[test]
fn archives_that_claim_what_they_do_not_hold_are_refused() {
    let room = Room::new();
    let good = golden("ssm_g1_tied_fp32/pytorch_model.bin");
    let diff = |bytes: &[u8]| {
        fs::write(room.path("model.bin"), bytes).unwrap();
        let output = room.run("diff model.bin model.bin");
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        failed_in_order(&output)
    };
    let whole = fs::read(&good).unwrap();
    for length in [0, 3, 100, whole.len() / 2, whole.len() - 1] {
        assert!(diff(&whole[..length]).contains("model.bin"));
    }
    // A flipped bit in a weight.
    let mut flipped = whole.clone();
    let at = whole.len() / 2;
    flipped[at] ^= 1;
    assert!(diff(&flipped).contains("checksum"), "{}", diff(&flipped));
    let short = rewritten(&good, |name, bytes| {
        if name.ends_with("/data/0") {
            bytes.truncate(8);
        }
    });
    assert!(diff(&short).contains("data/0 has 8 bytes"));
    let big = rewritten(&good, |name, bytes| {
        if name.ends_with("/byteorder") {
            *bytes = b"big".to_vec();
        }
    });
    assert!(diff(&big).contains("big-endian"));
    let huge = rewritten(&good, |name, bytes| {
        if name.ends_with("/data.pkl") {
            bytes.resize(17 << 20, b'N');
        }
    });
    assert!(diff(&huge).contains("data.pkl of 17825792 bytes"));
    let none = rewritten(&golden("refused/double.bin"), |name, bytes| {
        if name.ends_with("/data.pkl") {
            *bytes = b"\x80\x02}.".to_vec();
        }
    });
    fs::write(room.path("none.bin"), none).unwrap();
    assert!(room.ok("diff none.bin none.bin").contains("equal: 0 tensors"));
}

#[test]
fn safetensors_that_overlap_or_lead_outside_are_refused() {
    let room = Room::new();
    let file = |header: Value, data: usize| {
        let header = header.to_string();
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat()
    };
    let tensor = |start: u64, end: u64, shape: &[u64]| json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, end] });
    for (header, data) in [
        (json!({ "a": tensor(0, 8, &[2]), "b": tensor(4, 12, &[2]) }), 12),
        (json!({ "a": tensor(0, 8, &[2]), "b": tensor(12, 16, &[1]) }), 16),
        (json!({ "a": tensor(0, 80, &[20]) }), 8),
        (json!({ "a": tensor(0, 8, &[1 << 40]) }), 8),
        (json!({ "a": tensor(0, 8, &[u64::MAX, 2]) }), 8),
        (json!({ "a": tensor(8, 0, &[2]) }), 8),
        (json!({ "a": tensor(0, 8, &[2]) }), 9),
    ] {
        fs::write(room.path("x.safetensors"), file(header.clone(), data)).unwrap();
        let output = room.run("diff x.safetensors x.safetensors");
        assert_eq!(output.status.code(), Some(2), "{header}");
        assert!(failed_in_order(&output).contains("x.safetensors ("), "{}", stderr(&output));
    }
    for header in [u64::MAX, 1 << 40, 200_000_000] {
        fs::write(room.path("x.safetensors"), [&header.to_le_bytes()[..], b"{}"].concat()).unwrap();
        assert!(
            failed_in_order(&room.run("diff x.safetensors x.safetensors"))
                .contains("not a whole safetensors file")
        );
    }
}

#[test]
fn indices_do_not_lead_out_of_their_folder() {
    let room = Room::new();
    fs::create_dir(room.path("model")).unwrap();
    fs::copy(golden("ssm_g1_tied_fp32/config.json"), room.path("model/config.json")).unwrap();
    for (index, single) in
        [("model.safetensors.index.json", "x.safetensors"), ("pytorch_model.bin.index.json", "x.bin")]
    {
        for name in [
            format!("../{single}"),
            format!("/{single}"),
            format!("a/../{single}"),
            "..".into(),
            String::new(),
        ] {
            room.write(&format!("model/{index}"), &json!({ "weight_map": { "a": name } }).to_string());
            room.refuses(
                "convert -m mamba_ssm -i model -o out",
                &["no weight_map from tensors to files of this folder"],
            );
        }
        fs::remove_file(room.path(&format!("model/{index}"))).unwrap();
    }
    // Pieces of torch.save under an index are read.
    fs::copy(
        golden("ssm_g1_tied_fp32/pytorch_model.bin"),
        room.path("model/pytorch_model-00001-of-00001.bin"),
    )
    .unwrap();
    let map = json!({ "weight_map": { "a": "pytorch_model-00001-of-00001.bin" } });
    room.write("model/pytorch_model.bin.index.json", &map.to_string());
    room.ok("convert -m mamba_ssm -i model -o out");
}

#[test]
fn what_cannot_be_converted_is_refused_and_leaves_nothing() {
    let room = Room::new();
    let ssm = golden("ssm_g1_tied_fp32");
    let before = room.names(".");
    let from = |flags: &str| format!("convert -i {} -o out {flags}", ssm.display());
    room.refuses(&from("--from mamba_ssm --to neuron-tp"), &["--to neuron-tp is not implemented"]);
    room.refuses(&from("--from mamba_ssm --to elapid -p bf16"), &["the masters in a checkpoint are fp32"]);
    room.refuses(&from("--from mamba_ssm --to mamba_ssm --split-proj"), &["--split-proj"]);
    room.refuses(&from("--from mamba_ssm --to codestral"), &["d_state is 8"]);
    room.refuses(&from("--from mamba_ssm --n-groups 2"), &["--n-groups does not go with"]);
    room.refuses(&from("--from hf"), &["config.json", "state-spaces"]);
    room.refuses(&from("--from codestral"), &["params.json"]);
    room.refuses(&from("--from elapid"), &["there is no checkpoint"]);
    room.refuses(&from("--from neuron-tp"), &["dp_rank_00_tp_rank_00"]);
    room.refuses(&from("--from mamba_ssm -t ./nowhere"), &["there is no tokenizer ./nowhere"]);
    room.refuses("convert -m mamba_ssm -i nowhere -o out", &["nowhere"]);
    room.refuses(&from("--from mamba_ssm -o tiny.json"), &["tiny.json exists already"]);
    assert_eq!(room.names("."), before);
    room.ok(&from("--from mamba_ssm"));
    room.refuses(&from("--from mamba_ssm"), &["out exists already"]);
    // Weights that are of another model.
    fs::create_dir(room.path("model")).unwrap();
    room.write(
        "model/config.json",
        &fs::read_to_string(ssm.join("config.json")).unwrap().replace("\"d_state\": 8", "\"d_state\": 9"),
    );
    fs::copy(ssm.join("pytorch_model.bin"), room.path("model/pytorch_model.bin")).unwrap();
    room.refuses("convert -m mamba_ssm -i model -o out2", &["in_proj.weight is [84, 16]", "[86, 16]"]);
}

#[test]
fn differences_are_counted_and_told_by_the_exit_code() {
    let room = Room::new();
    room.ok(&format!("convert -m mamba_ssm -i {} -o a", golden("ssm_g1_tied_fp32").display()));
    room.ok(&format!("convert -m mamba_ssm -i {} -o b", golden("ssm_g1_tied_fp32").display()));
    let path = room.path("b/model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let end = bytes.len();
    // The last element of norm_f: its sign.
    bytes[end - 1] ^= 0x80;
    fs::write(&path, &bytes).unwrap();
    let output = room.run("diff a b --json");
    assert_eq!(output.status.code(), Some(1));
    let found = common::one_object(std::str::from_utf8(&output.stdout).unwrap());
    let value = f32::from_le_bytes(
        fs::read(room.path("a/model.safetensors")).unwrap()[end - 4..].try_into().unwrap(),
    );
    let different: Vec<_> =
        found["tensors"].as_array().unwrap().iter().filter(|t| t["equal"] == false).collect();
    assert_eq!(different.len(), 1);
    assert_eq!(different[0]["name"], "backbone.norm_f.weight");
    assert_eq!(different[0]["different"], 1);
    assert_eq!(different[0]["max_abs"], json!(2.0 * f64::from(value.abs())));
    let output = room.run("diff a b");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("backbone.norm_f.weight: 1 of 16 elements")
            && text.ends_with("1 of 20 tensors differ\n"),
        "{text}"
    );
    assert_eq!(room.run("diff a a").status.code(), Some(0));
    assert_eq!(room.json("diff a a --json")["equal"], true);
    assert_eq!(room.run("diff a nowhere").status.code(), Some(2));
    // A NaN differs from a number, and not from itself.
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, &bytes).unwrap();
    let output = room.run("diff a b --json");
    let found = common::one_object(std::str::from_utf8(&output.stdout).unwrap());
    assert!(
        found["tensors"].as_array().unwrap().iter().any(|t| t["different"] == 1 && t["max_abs"].is_null())
    );
    assert_eq!(room.run("diff b b").status.code(), Some(0));
    // Missing on either side, and of another shape.
    let groups = golden("ssm_g4_fp16");
    let text = String::from_utf8(room.run(&format!("diff a {}", groups.display())).stdout).unwrap();
    assert!(
        text.contains("lm_head.weight: missing in A") && text.contains("shape [84, 16] and [132, 16]"),
        "{text}"
    );
}
