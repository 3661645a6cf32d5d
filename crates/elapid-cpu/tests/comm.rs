//! Collectives, and the ops over them.

mod sockets;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use elapid_cpu::comm::{Abort, CommFailure, Communicator, FloatsMut, Groups, Reduce, threads};
use elapid_cpu::{CpuBackend, CpuOptions};
use elapid_tensor::{Backend, Clipping, Copies, DType, FlatShape, Group, Row, Slot};
use half::bf16;

type Comm = Arc<dyn Communicator>;

/// Calls `f` on every rank at once, as threads that share memory, and as threads that sockets connect.
fn on_ranks(size: usize, f: impl Fn(Comm) + Sync) {
    let ranks: Vec<_> = (0..size).collect();
    let shared = threads(&ranks, Duration::from_secs(60), &Abort::default());
    let connected = sockets::worlds(size, Duration::from_secs(60));
    let connected = connected.into_iter().map(|world| world.unwrap().all()).collect();
    for comms in [shared, connected] {
        std::thread::scope(|scope| comms.into_iter().for_each(|comm| drop(scope.spawn(|| f(comm)))));
    }
}

/// Numbers whose sums depend on the order of the terms.
fn number(rank: usize, place: usize) -> f32 {
    let mixed = (rank * 7919 + place).wrapping_mul(2_654_435_761) % 1_000_003;
    (mixed as f32 - 500_000.0) * 10f32.powi((mixed % 9) as i32 - 4)
}

fn numbers(rank: usize, len: usize) -> Vec<f32> {
    (0..len).map(|place| number(rank, place)).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

const SIZES: [usize; 5] = [1, 2, 3, 4, 8];
const LENGTHS: [usize; 6] = [0, 1, 7, 24, 2049, 20_000];

#[test]
fn sums_are_in_rank_order_on_every_rank() {
    for size in SIZES {
        for len in LENGTHS {
            let in_order: Vec<f32> =
                (0..len).map(|i| (1..size).fold(number(0, i), |sum, rank| sum + number(rank, i))).collect();
            let rounded = |rank, i| bf16::from_f32(number(rank, i)).to_f32();
            let in_bf16: Vec<bf16> = (0..len)
                .map(|i| bf16::from_f32((1..size).fold(rounded(0, i), |sum, rank| sum + rounded(rank, i))))
                .collect();
            let largest: Vec<f32> =
                (0..len).map(|i| (0..size).map(|rank| number(rank, i)).fold(f32::MIN, f32::max)).collect();
            on_ranks(size, |comm| {
                let mut data = numbers(comm.rank(), len);
                comm.all_reduce(FloatsMut::F32(&mut data), Reduce::Sum);
                assert_eq!(bits(&data), bits(&in_order), "{size} ranks, {len} numbers");

                let mut data = numbers(comm.rank(), len);
                comm.all_reduce(FloatsMut::F32(&mut data), Reduce::Max);
                assert_eq!(bits(&data), bits(&largest), "{size} ranks, {len} numbers");

                let mut data: Vec<_> = numbers(comm.rank(), len).into_iter().map(bf16::from_f32).collect();
                comm.all_reduce(FloatsMut::Bf16(&mut data), Reduce::Sum);
                assert_eq!(data, in_bf16, "{size} ranks, {len} numbers");

                if len % size == 0 {
                    let mut data = numbers(comm.rank(), len);
                    comm.reduce_scatter(FloatsMut::F32(&mut data));
                    let mine = comm.rank() * len / size..(comm.rank() + 1) * len / size;
                    assert_eq!(bits(&data[mine.clone()]), bits(&in_order[mine]));
                }
            });
        }
    }
}

#[test]
fn gathers_and_broadcasts_move_bytes() {
    for size in SIZES {
        on_ranks(size, |comm| {
            for each in [0, 1, 5, 3000] {
                let byte = |rank: usize, i: usize| (rank * 31 + i) as u8;
                let mut data = vec![0xee; each * size];
                let rank = comm.rank();
                (0..each).for_each(|i| data[rank * each + i] = byte(rank, i));
                comm.all_gather(&mut data);
                assert!(data.iter().enumerate().all(|(i, x)| *x == byte(i / each, i % each)));
                for root in 0..size {
                    let mut data: Vec<_> = (0..each).map(|i| byte(rank, i)).collect();
                    comm.broadcast(&mut data, root);
                    assert!(data.iter().enumerate().all(|(i, x)| *x == byte(root, i)));
                }
                comm.barrier();
            }
        });
    }
}

fn failure(payload: Box<dyn Any + Send>) -> CommFailure {
    *payload.downcast().expect("a collective unwinds with a CommFailure")
}

/// Runs `f` on three ranks; how each ended, and after how long.
fn endings(timeout: Duration, f: impl Fn(&Comm, &Abort) + Sync) -> Vec<(Option<CommFailure>, Duration)> {
    let abort = Abort::default();
    let comms = threads(&[3, 4, 5], timeout, &abort);
    let run = |comm: Comm| {
        let start = Instant::now();
        let end = catch_unwind(AssertUnwindSafe(|| f(&comm, &abort))).err().map(failure);
        (end, start.elapsed())
    };
    std::thread::scope(|scope| {
        let run = &run;
        let running: Vec<_> = comms.into_iter().map(|comm| scope.spawn(move || run(comm))).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    let ends = endings(Duration::from_millis(300), |comm, _| {
        if comm.rank() != 1 {
            comm.all_reduce(FloatsMut::F32(&mut [1.0; 100]), Reduce::Sum);
        }
    });
    for rank in [0, 2] {
        let failure = ends[rank].0.as_ref().unwrap();
        assert!(failure.message.contains("in all_reduce for rank 4, which did not come"), "{failure:?}");
        assert!(ends[rank].1 < Duration::from_secs(5));
    }
    assert_eq!(ends[1].0, None);
}

#[test]
fn a_failed_rank_ends_the_others_with_its_failure() {
    let of_rank_5 = CommFailure { rank: 5, message: "the disk is full".into() };
    let ends = endings(Duration::from_secs(600), |comm, abort| {
        comm.barrier();
        if comm.rank() == 2 {
            abort.raise(of_rank_5.clone());
        } else {
            comm.barrier();
        }
    });
    assert_eq!(ends[0].0, Some(of_rank_5.clone()));
    assert_eq!(ends[1].0, Some(of_rank_5));
    assert!(ends.iter().all(|(_, took)| *took < Duration::from_secs(5)));
}

#[test]
fn ranks_that_disagree_are_told() {
    let ends = endings(Duration::from_secs(600), |comm, _| match comm.rank() {
        0 => comm.broadcast(&mut [0; 8], 0),
        _ => comm.all_gather(&mut [0; 12]),
    });
    for (end, _) in ends {
        let message = end.unwrap().message;
        assert!(message.contains("broadcast") && message.contains("all_gather"), "{message}");
    }
}

/// Runs `f` on backends of one group of `size`, tensor-parallel and data-parallel at once.
fn on_backends(size: usize, f: impl Fn(&CpuBackend) + Sync) {
    on_ranks(size, |comm| {
        let groups = Groups { tp: comm.clone(), dp: comm };
        let options = CpuOptions { threads: Some(2), poison: true, groups, ..CpuOptions::default() };
        f(&CpuBackend::new(&options).unwrap());
    });
}

#[test]
fn tensors_are_gathered_and_scattered_along_any_axis() {
    for (size, dtype) in [(1, DType::F32), (2, DType::F32), (2, DType::Bf16), (4, DType::F32)] {
        on_backends(size, |backend| {
            let rank = backend.group_rank(Group::Tp);
            assert_eq!(backend.group_size(Group::Tp), size);
            let shape = [3, 4 * size, 5];
            // Small whole numbers: exact in bf16, and so are their sums.
            let whole: Vec<f32> = (0..shape.iter().product()).map(|i| (i % 61) as f32).collect();
            let part: Vec<f32> = (0..3)
                .flat_map(|i| (0..4).flat_map(move |j| (0..5).map(move |k| (i, 4 * rank + j, k))))
                .map(|(i, j, k)| whole[(i * 4 * size + j) * 5 + k])
                .collect();
            let tensor = backend.tensor(&part, &[3, 4, 5], dtype);
            let all = backend.all_gather(&tensor, 1, Group::Tp);
            assert_eq!((backend.shape(&all), backend.values(&all)), (shape.to_vec(), whole.clone()));
            assert_eq!(backend.dtype(&all), dtype);

            let back = backend.reduce_scatter(&all, 1, Group::Tp);
            let times: Vec<f32> = part.iter().map(|x| x * size as f32).collect();
            assert_eq!((backend.shape(&back), backend.values(&back)), (vec![3, 4, 5], times.clone()));

            let sum = backend.all_reduce(&backend.all_gather(&tensor, 0, Group::Tp), Group::Dp);
            assert_eq!(backend.shape(&sum), [3 * size, 4, 5]);
            assert_eq!(backend.values(&sum)[rank * 60..][..60], times);

            let max =
                backend.all_reduce_max(&backend.tensor(&[rank as f32, -1.0], &[2], DType::F32), Group::Tp);
            assert_eq!(backend.values(&max), [size as f32 - 1.0, -1.0]);
        });
    }
}

#[test]
fn rows_are_scattered_reduced_and_gathered() {
    let size = 4;
    let flat = FlatShape { layers: 2, row: 64, shared: 32 };
    on_backends(size, |backend| {
        let rank = backend.group_rank(Group::Dp);
        let mut grads = backend.buffer(flat, DType::F32);
        let mut shard = backend.buffer(flat.shard(size), DType::F32);
        for row in flat.rows() {
            let slot = flat.whole(row);
            let values: Vec<_> = (0..slot.len()).map(|i| (i * (rank + 1)) as f32).collect();
            backend.write_slot(&mut grads, &slot, &values);
            backend.reduce_scatter_row(&mut grads, row, &mut shard, Group::Dp);
        }
        // 1 + 2 + 3 + 4 times the place in the row.
        for dtype in [DType::F32, DType::Bf16] {
            let mut whole = backend.buffer(flat, dtype);
            let mut ends = backend.buffer(FlatShape { layers: 2, row: 21, shared: 9 }, DType::F32);
            for row in flat.rows() {
                backend.all_gather_row(&shard, row, &mut whole, Group::Dp);
                backend.all_gather_row(&shard, row, &mut ends, Group::Dp);
                let (slot, end) = (flat.whole(row), if row == Row::Shared { 9 } else { 21 });
                let want: Vec<_> = (0..slot.len()).map(|i| (10 * i) as f32).collect();
                let rounded = backend.values(&backend.tensor(&want, &slot.shape, dtype));
                assert_eq!(backend.values(&backend.view(&whole, &slot)), rounded);
                let slot = Slot { row, offset: 0, shape: vec![end] };
                assert_eq!(backend.values(&backend.view(&ends, &slot)), want[want.len() - end..]);
            }
        }
    });
}

#[test]
fn a_norm_counts_every_element_once() {
    let flat = FlatShape { layers: 1, row: 100_000, shared: 16 };
    on_backends(2, |backend| {
        // 300 on both ranks, counted by rank 0; 100 016 − 300 on each.
        let mut grads = backend.buffer(flat, DType::F32);
        for row in flat.rows() {
            let slot = flat.whole(row);
            backend.write_slot(&mut grads, &slot, &vec![2.0; slot.len()]);
        }
        let copies = [10..110, 65_500..65_700].map(|range| Copies { range, ranks: 2 });
        let clipping = Clipping { scale: 0.5, max_norm: 1.0, copies: (&copies, &[]), over: &[Group::Tp] };
        let loss = backend.tensor(&[1.0], &[], DType::F32);
        let got = backend.values(&backend.clip(&grads, &loss, &clipping));
        let norm = (2.0 * 100_016.0 - 300.0f64).sqrt() as f32;
        assert_eq!(got, [norm, 0.5 * (1.0 / (norm + 1e-6)), 1.0]);

        // A number that is not finite on one rank is known on all.
        if backend.group_rank(Group::Tp) == 1 {
            let slot = Slot { row: Row::Layer(0), offset: 5, shape: vec![1] };
            backend.write_slot(&mut grads, &slot, &[f32::INFINITY]);
        }
        assert_eq!(backend.values(&backend.clip(&grads, &loss, &clipping))[2], 0.0);
    });
}
