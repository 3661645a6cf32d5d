//! Collectives between ranks beside copies in memory.

use std::time::{Duration, Instant};

use elapid_cpu::comm::{FloatsMut, Reduce};
use half::bf16;
use serde_json::{Value, json};

use super::median;
use crate::Error;
use crate::error::say;
use crate::parallel::{Launch, Mesh, Rank, engine, launch, world_size};

/// Measured in turn, each up to the largest that was asked for.
const SIZES: [usize; 6] = [4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20, 256 << 20];
/// A collective is repeated until so many bytes have passed, between 3 and 100 times.
const PASSED: usize = 256 << 20;

/// Measures collectives over all ranks, `ranks` threads of this process or those that a launcher has started, on up to
/// `largest` bytes: the object that `elapid bench comm --json` prints.
///
/// # Errors
/// There is one rank only, or another number than was started; a collective does not compute what it should.
pub fn comm(ranks: Option<usize>, largest: usize) -> Result<Value, Error> {
    let world = world_size()?;
    let mesh = Mesh::new(1, ranks.or(world.is_none().then_some(2)), world)?;
    if mesh.size() == 1 {
        return Err(Error::new("one rank has nobody to speak with").with_hint("give --dp 2 or more"));
    }
    let start = Launch { mesh, threads: Some(mesh.size()), timeout: Duration::from_secs(600) };
    let engine = engine()?;
    Ok(launch(&start, |rank| measure(rank, engine, largest))?.swap_remove(0))
}

fn measure(rank: &Rank, engine: &str, largest: usize) -> Result<Value, Error> {
    let ranks = rank.world().size() as f64;
    let (mut copies, mut rows) = (Vec::new(), Vec::new());
    for size in SIZES.into_iter().filter(|size| *size <= largest) {
        say(format_args!("measuring collectives of {size} bytes"));
        let from = vec![1u8; size];
        let copy = timed(rank, size, &mut vec![0; size], |to| to.fill(0), |to| to.copy_from_slice(&from));
        let copied = size as f64 / copy.median / 1e9;
        copies.push(json!({ "bytes": size, "median_s": copy.median, "gb_per_s": copied }));
        // Of the data's bytes, how many a rank of a ring sends.
        let over = (ranks - 1.0) / ranks;
        let sum = ranks as f32;
        let measured = [
            ("all_reduce", "float32", 2.0 * over, reduced(rank, size, false, 1.0, sum, fp32)?),
            (
                "all_reduce",
                "bfloat16",
                2.0 * over,
                reduced(rank, size, false, bf16::ONE, bf16::from_f32(sum), half)?,
            ),
            ("reduce_scatter", "float32", over, reduced(rank, size, true, 1.0, sum, fp32)?),
            (
                "reduce_scatter",
                "bfloat16",
                over,
                reduced(rank, size, true, bf16::ONE, bf16::from_f32(sum), half)?,
            ),
            ("all_gather", "bytes", over, moved(rank, size, true)?),
            ("broadcast", "bytes", 1.0, moved(rank, size, false)?),
        ];
        for (name, of, sent, took) in measured {
            let bus = sent * size as f64 / took.median / 1e9;
            rows.push(json!({
                "collective": name,
                "of": of,
                "bytes": size,
                "repetitions": took.repetitions,
                "best_s": took.best,
                "median_s": took.median,
                "bus_gb_per_s": bus,
                "copy_share": bus / copied,
            }));
        }
    }
    Ok(
        json!({ "bench": "comm", "engine": engine, "ranks": rank.world().size(), "copies": copies, "collectives": rows }),
    )
}

struct Took {
    repetitions: usize,
    best: f64,
    median: f64,
}

/// All ranks do the same at the same time, and a repetition takes as long as the slowest.
fn timed<D>(rank: &Rank, size: usize, data: &mut D, prepare: impl Fn(&mut D), run: impl Fn(&mut D)) -> Took {
    let repetitions = (PASSED / size).clamp(3, 100);
    // The first one finds cold caches and pages that are not there yet.
    let once = |_| {
        prepare(data);
        rank.barrier();
        let start = Instant::now();
        run(std::hint::black_box(data));
        start.elapsed().as_secs_f64()
    };
    let own: Vec<f64> = (0..=repetitions).map(once).skip(1).collect();
    let all = rank.gather(own);
    let slowest = |i| all.iter().map(|times| times[i]).fold(0.0, f64::max);
    let times: Vec<f64> = (0..repetitions).map(slowest).collect();
    Took { repetitions, best: times.iter().copied().fold(f64::INFINITY, f64::min), median: median(times) }
}

/// The sum of `one` over all ranks, in the place of the data or only in this rank's piece.
fn reduced<T: Copy + PartialEq>(
    rank: &Rank,
    size: usize,
    scatter: bool,
    one: T,
    sum: T,
    floats: fn(&mut [T]) -> FloatsMut<'_>,
) -> Result<Took, Error> {
    let comm = rank.world();
    let mut data = vec![one; (size / size_of::<T>()).next_multiple_of(comm.size())];
    let run = |data: &mut Vec<T>| match scatter {
        true => comm.reduce_scatter(floats(data)),
        false => comm.all_reduce(floats(data), Reduce::Sum),
    };
    let took = timed(rank, size, &mut data, |data| data.fill(one), run);
    let each = data.len() / comm.size();
    let piece = if scatter { &data[comm.rank() * each..][..each] } else { &data[..] };
    right(if scatter { "reduce_scatter" } else { "all_reduce" }, piece.iter().all(|x| *x == sum))
        .map(|()| took)
}

/// Every rank's piece to all of them, or all of the first rank's.
fn moved(rank: &Rank, size: usize, gather: bool) -> Result<Took, Error> {
    let comm = rank.world();
    let mut data = vec![0; size.next_multiple_of(comm.size())];
    let own = comm.rank() as u8;
    let run = |data: &mut Vec<u8>| match gather {
        true => comm.all_gather(data),
        false => comm.broadcast(data, 0),
    };
    let took = timed(rank, size, &mut data, |data| data.fill(own), run);
    let each = data.len() / comm.size();
    let of = |i: usize| if gather { (i / each) as u8 } else { 0 };
    right(if gather { "all_gather" } else { "broadcast" }, data.iter().enumerate().all(|(i, x)| *x == of(i)))
        .map(|()| took)
}

fn fp32(data: &mut [f32]) -> FloatsMut<'_> {
    FloatsMut::F32(data)
}

fn half(data: &mut [bf16]) -> FloatsMut<'_> {
    FloatsMut::Bf16(data)
}

/// No figure is given of what is wrong.
fn right(what: &str, is: bool) -> Result<(), Error> {
    if is {
        return Ok(());
    }
    Err(Error::new(format!("{what} does not give what it should"))
        .with_hint("please report this, with the MPI library's version"))
}
