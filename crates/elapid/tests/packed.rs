//! Cutting and joining sequences changes nothing: documents packed into one row, rows padded to one length, and pieces
//! that hand their states on. Each at random cuts, on the CPU in fp32 and on the oracle in f64.

mod run;

use std::fmt::Debug;
use std::ops::Range;

use elapid::config::ModelConfig;
use elapid::data::{Dataset, Order, Sample, Sampler};
use elapid::generate::{Sampling, generate};
use elapid::model::Mamba2ForCausalLM;
use elapid::model::init::Init;
use elapid::model::layout::Role;
use elapid::train::{Batch, Trainer};
use elapid_cpu::{CpuBackend, CpuOptions};
use elapid_tensor::oracle::OracleBackend;
use elapid_tensor::{
    AdamW, Backend, Checkpointing, DType, IGNORE_LABEL, Mamba2Weights, Slot, State, Tape, Var, Weight,
};
use proptest::collection::vec;
use proptest::prelude::Strategy;
use proptest::sample::select;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

/// What is special about a model.
#[derive(Clone, Debug)]
struct Shape {
    groups: usize,
    kernel: usize,
    chunk: usize,
    limit: (f64, f64),
    checkpointing: Checkpointing,
}

fn shapes() -> impl Strategy<Value = Shape> {
    let limits = select(vec![(0.0, f64::INFINITY), (0.1, 0.3)]);
    let checkpointing = select(vec![Checkpointing::None, Checkpointing::Block]);
    (select(vec![1, 2, 4]), 1..=4_usize, select(vec![4, 16, 64]), limits, checkpointing).prop_map(
        |(groups, kernel, chunk, limit, checkpointing)| Shape { groups, kernel, chunk, limit, checkpointing },
    )
}

impl Shape {
    fn config(&self) -> ModelConfig {
        let config = ModelConfig {
            hidden_size: 16,
            num_heads: 4,
            head_dim: 8,
            state_size: 8,
            vocab_size: run::VOCAB as usize,
            num_hidden_layers: 2,
            n_groups: self.groups,
            conv_kernel: self.kernel,
            chunk_size: self.chunk,
            time_step_limit: self.limit,
            ..ModelConfig::preset("tiny").unwrap()
        };
        config.validate().unwrap();
        config
    }

    /// With a scan that outweighs the skip: its memory is long, D is small, x, B and C are of the order of 1. Fresh
    /// models are near y = D·x, where the gated norm takes the size away again and the gradient of D is rounding.
    fn model<B: Backend>(&self, backend: &B) -> Mamba2ForCausalLM<B> {
        let mut model = Mamba2ForCausalLM::new(backend, &self.config(), DType::F32, Init::StateSpaces, 1);
        let slots: Vec<_> = model.layout().iter().map(|(_, slot, info)| (slot, info.role)).collect();
        for (slot, role) in slots {
            let old = model.parameter(backend, &slot);
            // From 0 to 1 over the heads, in another order in each row.
            let spread = |i: usize| ((i * 3 + slot.offset) % old.len()) as f32 / (old.len() - 1) as f32;
            let new = |i: usize| match role {
                Role::Embedding => 15.0 * old[i],
                Role::ConvWeight => 3.0 * old[i],
                Role::ALog => (0.05 + spread(i)).ln(),
                Role::DtBias => (0.05 + 0.4 * spread(i)).exp_m1().ln(),
                Role::D => 0.1 + 0.1 * spread(i),
                _ => old[i],
            };
            let values: Vec<f32> = (0..old.len()).map(new).collect();
            backend.write_slot(model.masters_mut(), &slot, &values);
        }
        model.refresh(backend);
        model
    }
}

/// Calls `test` with random `input`s, the same in every run; one that fails is made as small as it can be.
fn check<T: Debug>(input: impl Strategy<Value = T>, test: impl Fn(&T)) {
    let config = Config { cases: 48, failure_persistence: None, ..Config::default() };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let result = TestRunner::new_with_rng(config, rng).run(&input, |input| {
        test(&input);
        Ok(())
    });
    result.unwrap_or_else(|error| panic!("{error}"));
}

fn cpu() -> CpuBackend {
    CpuBackend::new(&CpuOptions { threads: Some(1), poison: true, ..CpuOptions::default() }).unwrap()
}

/// Lengths that add up to `len`, at most `most` of them.
fn cuts(len: usize, most: usize) -> impl Strategy<Value = Vec<Range<usize>>> {
    vec(1..len.max(2), 0..most).prop_map(move |mut at| {
        at.extend([0, len]);
        at.retain(|&at| at <= len);
        at.sort_unstable();
        at.dedup();
        at.windows(2).map(|pair| pair[0]..pair[1]).collect()
    })
}

/// Token `place` of text `row`.
fn token(row: usize, place: usize) -> i32 {
    let x = (row as u64 * 1009 + place as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((x >> 40) % u64::from(run::VOCAB)) as i32
}

fn sample(row: usize, range: Range<usize>) -> Sample {
    let ids: Vec<i32> = range.map(|place| token(row, place)).collect();
    Sample { labels: ids.clone(), input_ids: ids, documents: None }
}

/// ‖a − b‖ / ‖b‖ is at most `limit`.
#[track_caller]
fn same(what: &str, a: &[f32], b: &[f32], limit: f64) {
    assert_eq!(a.len(), b.len(), "{what}");
    let square = |x: f32, y: f32| (f64::from(x) - f64::from(y)).powi(2);
    let difference: f64 = a.iter().zip(b).map(|(&a, &b)| square(a, b)).sum();
    let size: f64 = b.iter().map(|&b| square(b, 0.0)).sum();
    let error = (difference / size.max(1e-30)).sqrt();
    assert!(error <= limit, "{what}: relative error {error:e}");
}

/// Hidden states of each row, and the state after the last position of each row.
struct Forward {
    hidden: Vec<Vec<f32>>,
    states: Vec<Vec<f32>>,
}

fn forward<B: Backend>(
    backend: &B,
    model: &Mamba2ForCausalLM<B>,
    batch: &Batch,
    states: &mut Vec<State<B::Tensor>>,
) -> Forward {
    let device = |values: &[i32]| backend.tensor_i32(values, &[batch.size, batch.length]);
    let documents = batch.documents.as_deref().map(device);
    let mut tape = Tape::inference(backend);
    let hidden =
        model.hidden(&mut tape, &device(&batch.ids), documents.as_ref(), Some(states), Checkpointing::None);
    let rows = |tensor: &B::Tensor| -> Vec<Vec<f32>> {
        let values = backend.values(tensor);
        // A conv state of K = 1 holds nothing.
        (0..batch.size)
            .map(|b| values[b * values.len() / batch.size..][..values.len() / batch.size].to_vec())
            .collect()
    };
    let mut last = vec![Vec::new(); batch.size];
    for state in states.iter() {
        for tensor in [&state.conv, &state.ssm] {
            last.iter_mut().zip(rows(tensor)).for_each(|(all, row)| all.extend(row));
        }
    }
    Forward { hidden: rows(&hidden.value), states: last }
}

/// Sums over some batches: of token losses, of labels that count, and of every gradient.
struct Sums {
    loss: f32,
    valid: usize,
    gradients: Vec<(String, Vec<f32>)>,
}

impl Sums {
    fn of<B: Backend>(
        backend: &B,
        model: &Mamba2ForCausalLM<B>,
        batches: &[Batch],
        checkpointing: Checkpointing,
    ) -> Self {
        let mut buffer = backend.buffer(model.layout().flat, DType::F32);
        let mut loss = 0.0;
        for batch in batches {
            let mut tape = Tape::training(backend, &mut buffer);
            loss += backend.values(&batch.loss(&mut tape, model, None, checkpointing))[0];
            tape.backward(&[], &[]);
        }
        let gradients = gradients(backend, model, &buffer);
        Self { loss, valid: batches.iter().map(Batch::valid).sum(), gradients }
    }

    fn same(&self, other: &Self, limit: f64) {
        assert_eq!(self.valid, other.valid);
        same("loss", &[self.loss], &[other.loss], limit);
        same_gradients(&self.gradients, &other.gradients, limit);
    }
}

fn gradients<B: Backend>(
    backend: &B,
    model: &Mamba2ForCausalLM<B>,
    buffer: &B::Buffer,
) -> Vec<(String, Vec<f32>)> {
    let slots = model.layout().iter();
    slots.map(|(name, slot, _)| (name, backend.values(&backend.view(buffer, &slot)))).collect()
}

fn same_gradients(ours: &[(String, Vec<f32>)], theirs: &[(String, Vec<f32>)], limit: f64) {
    for ((name, ours), (_, theirs)) in ours.iter().zip(theirs) {
        // What reaches A and dt sums terms of both signs: a few roundings of the terms are more of the sum.
        let through_decay = name.ends_with("A_log") || name.ends_with("dt_bias");
        same(name, ours, theirs, if through_decay { 3.0 * limit } else { limit });
    }
}

/// Values cross from f64 to fp32 as they leave the oracle.
const EXACT: f64 = 2e-7;
const FP32: f64 = 1e-5;

/// T4: documents in one row are what each is by itself, and the first token of a document is nobody's label.
#[test]
fn t4_packed_equals_separate() {
    fn packed<B: Backend>(backend: &B, shape: &Shape, rows: &[Vec<Range<usize>>], limit: f64) {
        let model = shape.model(backend);
        let samples: Vec<Sample> = (0..)
            .zip(rows)
            .map(|(row, documents)| {
                let len = documents[documents.len() - 1].end;
                // Ids that come back after another document.
                let ids = documents.iter().enumerate().flat_map(|(i, d)| vec![i as i32 % 2; d.len()]);
                Sample { documents: Some(ids.collect()), ..sample(row, 0..len) }
            })
            .collect();
        let together = Batch::new(&samples);
        let alone: Vec<(usize, Batch)> = (0..)
            .zip(rows)
            .flat_map(|(row, documents)| {
                documents.iter().map(move |d| (row, Batch::new(&[sample(row, d.clone())])))
            })
            .collect();

        let found = forward(backend, &model, &together, &mut Vec::new());
        let (mut hidden, mut states) = (vec![Vec::new(); rows.len()], vec![Vec::new(); rows.len()]);
        for (row, batch) in &alone {
            let mut one = forward(backend, &model, batch, &mut Vec::new());
            hidden[*row].append(&mut one.hidden[0]);
            states[*row] = one.states.remove(0);
        }
        for row in 0..rows.len() {
            same("hidden", &found.hidden[row], &hidden[row], limit);
            same("state", &found.states[row], &states[row], limit);
        }
        let alone: Vec<Batch> = alone.into_iter().map(|(_, batch)| batch).collect();
        let found = Sums::of(backend, &model, &[together], shape.checkpointing);
        found.same(&Sums::of(backend, &model, &alone, shape.checkpointing), limit);
    }
    let rows = (1..=70_usize).prop_flat_map(|len| vec(cuts(len, 5), 1..=3));
    check((shapes(), rows), |(shape, rows)| {
        packed(&OracleBackend, shape, rows, EXACT);
        packed(&cpu(), shape, rows, FP32);
    });
}

/// T5: a row of a padded batch is what it is by itself, its state after the last token included.
#[test]
fn t5_padded_equals_unpadded() {
    fn padded<B: Backend>(backend: &B, shape: &Shape, lengths: &[usize], limit: f64) {
        let model = shape.model(backend);
        let samples: Vec<Sample> = (0..).zip(lengths).map(|(row, &len)| sample(row, 0..len)).collect();
        let together = Batch::new(&samples);
        let alone: Vec<Batch> =
            samples.iter().map(|sample| Batch::new(std::slice::from_ref(sample))).collect();
        let found = forward(backend, &model, &together, &mut Vec::new());
        for (row, batch) in alone.iter().enumerate() {
            let one = forward(backend, &model, batch, &mut Vec::new());
            let hidden = &found.hidden[row];
            same("hidden", &hidden[hidden.len() - one.hidden[0].len()..], &one.hidden[0], limit);
            same("state", &found.states[row], &one.states[0], limit);
        }
        let found = Sums::of(backend, &model, &[together], shape.checkpointing);
        found.same(&Sums::of(backend, &model, &alone, shape.checkpointing), limit);
    }
    check((shapes(), vec(1..=70_usize, 2..=4)), |(shape, lengths)| {
        padded(&OracleBackend, shape, lengths, EXACT);
        padded(&cpu(), shape, lengths, FP32);
    });
}

/// T5: prompts of unequal lengths in one batch are continued as each is alone.
#[test]
fn t5_generation_in_a_batch_equals_generation_alone() {
    let prompts = vec(1..=40_usize, 2..=4);
    check((shapes(), prompts, select(vec![0.0_f32, 1.0])), |(shape, lengths, temperature)| {
        let backend = cpu();
        let model = shape.model(&backend);
        let sampling = Sampling { temperature: *temperature, top_k: 0, top_p: 1.0, seed: 3 };
        let prompts: Vec<Vec<u32>> =
            (0..).zip(lengths).map(|(row, &len)| (0..len).map(|t| token(row, t) as u32).collect()).collect();
        // Some rows end before others.
        let continued = |prompts: &[Vec<u32>]| {
            generate(&backend, &model, prompts, 12, sampling, |id| id % 7 == 0, |_, _| ())
        };
        let together = continued(&prompts);
        for (prompt, found) in prompts.iter().zip(together) {
            assert_eq!(vec![found], continued(std::slice::from_ref(prompt)));
        }
    });
}

/// T16 and T17: a sequence read in pieces, single tokens among them, gives what it gives in one pass: every hidden state
/// and the states after the last token.
#[test]
fn t16_t17_prefill_in_pieces_equals_one_pass() {
    fn pieces<B: Backend>(backend: &B, shape: &Shape, pieces: &[Range<usize>], limit: f64) {
        let model = shape.model(backend);
        let rows = 0..2_usize;
        let batch = |range: &Range<usize>| {
            Batch::new(&rows.clone().map(|row| sample(row, range.clone())).collect::<Vec<_>>())
        };
        let len = pieces[pieces.len() - 1].end;
        let whole = forward(backend, &model, &batch(&(0..len)), &mut Vec::new());
        let (mut states, mut hidden, mut last) = (Vec::new(), vec![Vec::new(); 2], Vec::new());
        for piece in pieces {
            let read = forward(backend, &model, &batch(piece), &mut states);
            hidden.iter_mut().zip(read.hidden).for_each(|(all, row)| all.extend(row));
            last = read.states;
        }
        for row in rows {
            same("hidden", &hidden[row], &whole.hidden[row], limit);
            same("state", &last[row], &whole.states[row], limit);
        }
    }
    let len = (1..=80_usize).prop_flat_map(|len| cuts(len, 8));
    check((shapes(), len), |(shape, ranges)| {
        pieces(&OracleBackend, shape, ranges, EXACT);
        pieces(&cpu(), shape, ranges, FP32);
    });
}

/// The loss of `batch` read in `pieces`, with the states handed from piece to piece as variables of one tape, so that
/// gradients flow back through every cut.
fn chained<B: Backend>(
    backend: &B,
    model: &Mamba2ForCausalLM<B>,
    batch: &Batch,
    pieces: &[Range<usize>],
    grads: &mut B::Buffer,
) -> f32 {
    let (config, layout) = (model.config(), model.layout());
    let eps = config.layer_norm_epsilon as f32;
    let weight = |slot: Slot| Weight { value: backend.view(model.masters(), &slot), slot };
    let cut = |values: &[i32], piece: &Range<usize>| {
        let rows = values.chunks_exact(batch.length);
        let values: Vec<i32> = rows.flat_map(|row| row[piece.clone()].to_vec()).collect();
        backend.tensor_i32(&values, &[batch.size, piece.len()])
    };
    let mut tape = Tape::training(backend, grads);
    let shared = layout.shared();
    let embedding = weight(shared.embedding);
    let mut stream: Vec<_> =
        pieces.iter().map(|piece| tape.embedding(&embedding, &cut(&batch.ids, piece), DType::F32)).collect();
    for layer in 0..layout.flat.layers {
        let slots = layout.layer(layer);
        let [norm, in_proj, out_proj] = [slots.norm, slots.in_proj, slots.out_proj].map(weight);
        let mixer = Mamba2Weights {
            conv_weight: weight(slots.conv_weight),
            conv_bias: slots.conv_bias.map(weight),
            dt_bias: weight(slots.dt_bias),
            a_log: weight(slots.a_log),
            d: weight(slots.d),
            norm_weight: weight(slots.norm_weight),
        };
        let mut before: Option<State<Var<B::Tensor>>> = None;
        for x in &mut stream {
            let normed = tape.rms_norm(x, &norm, eps, DType::F32);
            let projected = tape.linear(&normed, &in_proj, None);
            let (y, after) = tape.mamba2(&config.spec(), &projected, None, before.take(), &mixer);
            let out = tape.linear(&y, &out_proj, None);
            *x = tape.add(x, &out);
            before = Some(after);
        }
    }
    let norm_f = weight(shared.norm_f);
    let mut loss = 0.0;
    for (x, piece) in stream.iter().zip(pieces) {
        let hidden = tape.rms_norm(x, &norm_f, eps, DType::F32);
        let sum = tape.head_loss(&hidden, &embedding, &cut(&batch.labels, piece), config.vocab_size);
        loss += backend.values(&sum)[0];
    }
    tape.backward(&[], &[]);
    loss
}

/// T16: back-propagation through carried states over the full horizon is that of one long sequence.
#[test]
fn t16_gradients_flow_through_carried_states() {
    fn horizon<B: Backend>(backend: &B, shape: &Shape, pieces: &[Range<usize>], limit: f64) {
        let model = shape.model(backend);
        let len = pieces[pieces.len() - 1].end;
        let batch = Batch::new(&[sample(0, 0..len), sample(1, 0..len)]);
        let mut grads = backend.buffer(model.layout().flat, DType::F32);
        let loss = chained(backend, &model, &batch, pieces, &mut grads);
        let whole = Sums::of(backend, &model, &[batch], shape.checkpointing);
        same("loss", &[loss], &[whole.loss], limit);
        same_gradients(&gradients(backend, &model, &grads), &whole.gradients, limit);
    }
    let len = (2..=80_usize).prop_flat_map(|len| cuts(len, 6));
    check((shapes(), len), |(shape, ranges)| {
        horizon(&OracleBackend, shape, ranges, EXACT);
        horizon(&cpu(), shape, ranges, FP32);
    });
}

/// Training with carried states reads block after block and comes to the loss of the long sequence that the blocks are
/// cut from; the labels across their ends do not count.
#[test]
fn t16_carried_training_has_the_loss_of_the_long_sequence() {
    fn carried(data: &Dataset, shape: &Shape, rows: usize, steps: u64) {
        let sampler = Sampler {
            len: data.len(),
            batch: rows,
            dp: 1,
            rank: 0,
            accum: 1,
            order: Order::Stretches,
            from: (0, 0),
        };
        let backend = cpu();
        let fresh = || shape.model(&backend);
        let still = AdamW { lr: 0.0, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0, step: 1 };

        let mut trainer = Trainer::new(&backend, fresh(), shape.checkpointing).with_carried_states();
        let mut long = vec![Sample { input_ids: vec![], labels: vec![], documents: Some(vec![]) }; rows];
        let mut valid = 0;
        for step in 0..steps {
            let places = sampler.places(step, 0);
            let batch = Batch::read(data, &places).unwrap();
            trainer.micro_step(&batch);
            valid += batch.valid();
            for (long, place) in long.iter_mut().zip(places) {
                let block = data.sample(place.index).unwrap();
                long.labels.push(IGNORE_LABEL);
                long.labels.extend(&block.labels[1..]);
                let one = vec![0; block.input_ids.len()];
                long.documents.as_mut().unwrap().extend(block.documents.unwrap_or(one));
                long.input_ids.extend(block.input_ids);
            }
        }
        let carried = trainer.update(&still, 0.0, valid);

        let mut trainer = Trainer::new(&backend, fresh(), shape.checkpointing);
        let batch = Batch::new(&long);
        assert_eq!(batch.valid(), valid);
        trainer.micro_step(&batch);
        let whole = trainer.update(&still, 0.0, valid);
        same("loss", &[carried.loss as f32], &[whole.loss as f32], 1e-6);

        // And not that of blocks that begin anew, where they all go on.
        let mut trainer = Trainer::new(&backend, fresh(), shape.checkpointing);
        (0..steps).for_each(|s| trainer.micro_step(&Batch::read(data, &sampler.places(s, 0)).unwrap()));
        let anew = trainer.update(&still, 0.0, valid);
        let goes_on = steps > 1 && !data.knows_documents();
        assert!(!goes_on || (anew.loss / whole.loss - 1.0).abs() > 1e-6, "{} {}", anew.loss, whole.loss);
    }
    let dir = tempfile::tempdir().unwrap();
    let data = [false, true].map(|documents| {
        let path = dir.path().join(documents.to_string());
        run::dataset(&path, 4, 37, documents);
        Dataset::open(&path).unwrap()
    });
    check((select(vec![0, 1]), shapes(), 1..=3_usize, 1..=6_u64), |(documents, shape, rows, steps)| {
        carried(&data[*documents], shape, *rows, *steps);
    });
}
