//! The tape's ops between tensor-parallel ranks: what they give, and that forward and adjoint are conjugate,
//! ⟨op(x), dy⟩ = ⟨x, adjoint(dy)⟩, where what is the same on all ranks counts once.

use std::time::Duration;

use elapid_cpu::comm::{Abort, Groups, threads};
use elapid_cpu::{CpuBackend, CpuOptions, Tensor};
use elapid_tensor::{Backend, DType, FlatShape, Tape, Var};

const B: usize = 2;
const D: usize = 3;

/// Runs `body` on ranks that are threads.
fn on_ranks<T: Send>(ranks: usize, body: impl Fn(usize, &CpuBackend) -> T + Sync) -> Vec<T> {
    let group = threads(&(0..ranks).collect::<Vec<_>>(), Duration::from_secs(20), &Abort::default());
    std::thread::scope(|scope| {
        let body = &body;
        let start = |(rank, tp)| {
            let groups = Groups { tp, ..Groups::default() };
            let options = CpuOptions { threads: Some(1), poison: true, groups, ..CpuOptions::default() };
            scope.spawn(move || body(rank, &CpuBackend::new(&options).unwrap()))
        };
        let running: Vec<_> = group.into_iter().enumerate().map(start).collect();
        running.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// Whole numbers, so that sums are exact in both dtypes; `salt` tells ranks apart.
fn numbers(len: usize, salt: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7 + salt * 5) % 11) as f32 - 5.0).collect()
}

/// Output and cotangent of the input, and what they came from.
struct Found {
    x: Vec<f32>,
    y: Vec<f32>,
    dy: Vec<f32>,
    dx: Vec<f32>,
}

/// Runs one op on every rank. `x` and `dy` have `lengths` (of the sequence) before and after it, and are different on
/// every rank where `differ` says so.
fn run(
    ranks: usize,
    dtype: DType,
    lengths: (usize, usize),
    differ: (bool, bool),
    op: impl Fn(&mut Tape<'_, CpuBackend>, &Var<Tensor>) -> Var<Tensor> + Sync,
) -> Vec<Found> {
    on_ranks(ranks, |rank, backend| {
        let make = |len, differ, salt| {
            let values = numbers(B * len * D, if differ { 2 * rank + salt } else { salt });
            backend.tensor(&values, &[B, len, D], dtype)
        };
        let (x, dy) = (make(lengths.0, differ.0, 0), make(lengths.1, differ.1, 1));
        let mut grads = backend.buffer(FlatShape { layers: 0, row: 0, shared: 0 }, DType::F32);
        let mut tape = Tape::training(backend, &mut grads);
        let leaf = tape.leaf(x.clone());
        let y = op(&mut tape, &leaf);
        assert_eq!(backend.shape(&y.value), [B, lengths.1, D]);
        assert_eq!(backend.dtype(&y.value), dtype);
        let dx = tape.backward(&[(&y, dy.clone())], &[&leaf]).remove(0).unwrap();
        let [x, y, dy, dx] = [&x, &y.value, &dy, &dx].map(|tensor| backend.values(tensor));
        Found { x, y, dy, dx }
    })
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Σ over ranks, or the first of them where all are the same.
fn total(found: &[Found], differ: bool, of: impl Fn(&Found) -> f32) -> f32 {
    if differ { found.iter().map(of).sum() } else { of(&found[0]) }
}

fn assert_conjugate(found: &[Found], differ: (bool, bool)) {
    let (forward, back) =
        (total(found, differ.1, |f| dot(&f.y, &f.dy)), total(found, differ.0, |f| dot(&f.x, &f.dx)));
    assert!(forward != 0.0);
    assert_eq!(forward, back);
}

fn sum(found: &[Found], of: impl Fn(&Found) -> &[f32]) -> Vec<f32> {
    let len = of(&found[0]).len();
    (0..len).map(|i| found.iter().map(|f| of(f)[i]).sum()).collect()
}

#[test]
fn copy_and_reduce_are_conjugate() {
    for (ranks, dtype) in [(2, DType::F32), (3, DType::Bf16), (4, DType::F32)] {
        let found = run(ranks, dtype, (5, 5), (false, true), |tape, x| tape.copy_to_tp(x));
        let dx = sum(&found, |f| &f.dy);
        assert!(found.iter().all(|f| f.y == f.x && f.dx == dx));
        assert_conjugate(&found, (false, true));

        let found = run(ranks, dtype, (5, 5), (true, false), |tape, x| tape.reduce_from_tp(x));
        let y = sum(&found, |f| &f.x);
        assert!(found.iter().all(|f| f.y == y && f.dx == f.dy));
        assert_conjugate(&found, (true, false));
    }
}

/// Positions `from..to` of `[B, L, D]`; zeros beyond its end.
fn positions(x: &[f32], from: usize, to: usize) -> Vec<f32> {
    let row = |row: &[f32]| {
        let mut row = row.to_vec();
        row.resize((to * D).max(row.len()), 0.0);
        row[from * D..to * D].to_vec()
    };
    x.chunks(x.len() / B).flat_map(row).collect()
}

#[test]
fn t17_sequences_of_any_length_are_scattered_and_gathered() {
    for (ranks, length) in [(2, 6), (2, 7), (3, 7), (4, 2), (4, 9usize)] {
        for dtype in [DType::F32, DType::Bf16] {
            let part = length.div_ceil(ranks);
            let found =
                run(ranks, dtype, (length, part), (true, true), |tape, x| tape.reduce_scatter_sequence(x));
            let y = sum(&found, |f| &f.x);
            for (rank, f) in found.iter().enumerate() {
                assert_eq!(f.y, positions(&y, rank * part, (rank + 1) * part), "{ranks} ranks, L {length}");
            }
            assert_conjugate(&found, (true, true));

            let found =
                run(ranks, dtype, (part, length), (true, true), |tape, x| tape.gather_sequence(x, length));
            let dy = sum(&found, |f| &f.dy);
            for (rank, f) in found.iter().enumerate() {
                let held = length.saturating_sub(rank * part).min(part);
                assert_eq!(positions(&f.y, rank * part, rank * part + held), positions(&f.x, 0, held));
                assert_eq!(f.dx, positions(&dy, rank * part, (rank + 1) * part), "{ranks} ranks, L {length}");
            }
            assert_conjugate(&found, (true, true));
        }
    }
}

#[test]
fn a_single_rank_keeps_its_tensors() {
    let found = run(1, DType::F32, (5, 5), (true, true), |tape, x| {
        let x = tape.copy_to_tp(x);
        let x = tape.reduce_from_tp(&x);
        let x = tape.reduce_scatter_sequence(&x);
        tape.gather_sequence(&x, 5)
    });
    assert!(found[0].y == found[0].x && found[0].dx == found[0].dy);
}

#[test]
fn neighbours_sum_among_themselves() {
    let shape = FlatShape { layers: 1, row: 5, shared: 0 };
    let slot = elapid_tensor::Slot { row: elapid_tensor::Row::Layer(0), offset: 1, shape: vec![3] };
    for (ranks, together) in [(4, 2), (6, 3), (6, 1), (3, 3)] {
        let found = on_ranks(ranks, |rank, backend| {
            let mut buffer = backend.buffer(shape, DType::F32);
            backend.write_slot(&mut buffer, &shape.whole(slot.row), &numbers(5, rank));
            backend.sum_slot_over_neighbours(&mut buffer, &slot, together);
            backend.values(&backend.view(&buffer, &shape.whole(slot.row)))
        });
        for (rank, found) in found.iter().enumerate() {
            let first = rank / together * together;
            let mut want = numbers(5, rank);
            for (i, value) in want.iter_mut().enumerate().take(4).skip(1) {
                *value = (first..first + together).map(|rank| numbers(5, rank)[i]).sum();
            }
            assert_eq!(*found, want, "rank {rank} of {ranks}");
        }
    }
}
