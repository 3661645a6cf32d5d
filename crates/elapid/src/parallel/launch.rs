//! Starting the ranks of a run.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::time::Duration;

use elapid_cpu::comm::{Abort, CommFailure, Communicator, Groups, Single, bytes_mut, threads};
use elapid_cpu::{CpuBackend, CpuOptions};
use elapid_xla::driver::neuron::Place;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Mesh, processes};
use crate::Error;
use crate::error;

/// How ranks are started.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// Their arrangement.
    pub mesh: Mesh,
    /// Worker threads of all ranks of this process together; None: one a core.
    pub threads: Option<usize>,
    /// How long a rank waits for the others.
    pub timeout: Duration,
}

/// One rank of a run, as it sees itself and the others.
#[derive(Debug)]
pub struct Rank {
    pub(super) mesh: Mesh,
    /// All ranks.
    pub(super) world: Arc<dyn Communicator>,
    pub(super) groups: Groups,
    /// Worker threads.
    pub(super) threads: Option<usize>,
    pub(super) ranks_here: usize,
}

impl Rank {
    /// A rank alone.
    pub fn single(threads: Option<usize>) -> Self {
        Self {
            mesh: Mesh::SINGLE,
            world: Arc::new(Single),
            groups: Groups::default(),
            threads,
            ranks_here: 1,
        }
    }

    /// This rank, with its two groups seen through `wrap`.
    pub fn with_groups(&self, wrap: impl Fn(Arc<dyn Communicator>) -> Arc<dyn Communicator>) -> Self {
        let groups = Groups { tp: wrap(self.groups.tp.clone()), dp: wrap(self.groups.dp.clone()) };
        Self { groups, world: self.world.clone(), ..*self }
    }

    /// All ranks as one group.
    pub fn world(&self) -> &dyn Communicator {
        &*self.world
    }

    /// The arrangement of all ranks.
    pub fn mesh(&self) -> Mesh {
        self.mesh
    }

    /// This rank's number, from 0.
    pub fn number(&self) -> usize {
        self.world.rank()
    }

    /// Whether this is the rank that speaks, and writes what there is one of.
    pub fn is_first(&self) -> bool {
        self.number() == 0
    }

    /// How many ranks share this process's memory.
    pub fn ranks_here(&self) -> usize {
        self.ranks_here
    }

    /// How many processes with as many ranks each share this machine, where the launcher says so.
    pub fn on_host(&self) -> usize {
        let place = processes::place().ok().flatten();
        place.and_then(|place| place.local_ranks).unwrap_or(1)
    }

    /// This rank's place among those that share the samples.
    pub fn dp_rank(&self) -> usize {
        self.groups.dp.rank()
    }

    /// A CPU backend of this rank, with its share of the threads.
    ///
    /// # Errors
    /// The threads cannot be started.
    pub fn cpu(&self) -> Result<CpuBackend, Error> {
        let options =
            CpuOptions { threads: self.threads, groups: self.groups.clone(), ..CpuOptions::default() };
        CpuBackend::new(&options).map_err(|cause| {
            Error::new(cause.to_string()).with_hint("give fewer --threads, or free some on this machine")
        })
    }

    /// What `value` is on the first rank, on every rank; it is asked for on no other.
    ///
    /// # Errors
    /// That of `value`, on the first rank, which ends the others.
    pub fn from_first<T: Serialize + DeserializeOwned>(
        &self,
        value: impl FnOnce() -> Result<T, Error>,
    ) -> Result<T, Error> {
        if self.world.size() == 1 {
            return value();
        }
        let own = if self.is_first() { Some(value()?) } else { None };
        let mut text = own.as_ref().map_or_else(Vec::new, json);
        let mut length = (text.len() as u64).to_le_bytes();
        self.world.broadcast(&mut length, 0);
        text.resize(u64::from_le_bytes(length) as usize, 0);
        self.world.broadcast(&mut text, 0);
        Ok(own.unwrap_or_else(|| parsed(&text)))
    }

    /// What `value` is on every rank, in rank order.
    pub fn gather<T: Serialize + DeserializeOwned>(&self, value: T) -> Vec<T> {
        let size = self.world.size();
        if size == 1 {
            return vec![value];
        }
        let text = json(&value);
        let lengths = self.gather_numbers(text.len() as u64);
        let longest = lengths.iter().copied().max().unwrap_or(0) as usize;
        let mut all = vec![0; size * longest];
        all[self.number() * longest..][..text.len()].copy_from_slice(&text);
        self.world.all_gather(&mut all);
        lengths
            .iter()
            .enumerate()
            .map(|(rank, len)| parsed(&all[rank * longest..][..*len as usize]))
            .collect()
    }

    /// A number of every rank, in rank order.
    pub fn gather_numbers(&self, number: u64) -> Vec<u64> {
        let mut all = vec![0; self.world.size()];
        all[self.number()] = number;
        self.world.all_gather(bytes_mut(&mut all));
        all
    }

    /// Σ of a number over the ranks that share the samples.
    pub fn sum_over_samples(&self, number: u64) -> u64 {
        let dp = &self.groups.dp;
        let mut all = vec![0; dp.size()];
        all[dp.rank()] = number;
        dp.all_gather(bytes_mut(&mut all));
        all.iter().sum()
    }

    /// Each of `numbers` becomes its sum over all ranks, in their order.
    pub fn sum(&self, numbers: &mut [f64]) {
        sum(&*self.world, numbers);
    }

    /// Each of `numbers` becomes its sum over the ranks that share the samples, in their order.
    pub fn sum_all_over_samples(&self, numbers: &mut [f64]) {
        sum(&*self.groups.dp, numbers);
    }

    /// Returns when all ranks have come here.
    pub fn barrier(&self) {
        self.world.barrier();
    }
}

fn sum(comm: &dyn Communicator, numbers: &mut [f64]) {
    let len = numbers.len();
    let mut all = vec![0; comm.size() * len];
    let own = all[comm.rank() * len..].iter_mut().zip(&*numbers);
    own.for_each(|(place, number)| *place = number.to_bits());
    comm.all_gather(bytes_mut(&mut all));
    for (i, number) in numbers.iter_mut().enumerate() {
        // The first number itself and not 0 before it: −0 stays.
        let terms = all[i..].iter().step_by(len).map(|bits| f64::from_bits(*bits));
        *number = terms.reduce(|sum, term| sum + term).unwrap_or_default();
    }
}

/// Variables of launchers that say too little to do without MPI, and who sets them.
const STARTERS: [(&str, &str); 4] = [
    ("OMPI_COMM_WORLD_RANK", "mpirun"),
    ("PMI_RANK", "mpirun"),
    ("PMIX_RANK", "mpirun"),
    ("SLURM_PROCID", "srun"),
];

/// Number of ranks that a launcher has started as processes; None where this process makes its ranks itself.
///
/// # Errors
/// A launcher that this build cannot work with.
pub fn world_size() -> Result<Option<usize>, Error> {
    let started_by = STARTERS.iter().find(|(variable, _)| std::env::var_os(variable).is_some());
    #[cfg(feature = "mpi")]
    if started_by.is_some() {
        return Ok(Some(mpi::world()?.size()));
    }
    let place = Place::find(|name| std::env::var(name).ok())?;
    error::set_quiet(place.as_ref().is_some_and(|place| place.rank > 0));
    match (place, started_by) {
        (Some(place), _) => Ok(Some(place.ranks)),
        (None, None) => Ok(None),
        (None, Some((variable, starter))) => Err(Error::new(format!(
            "{variable} is set, as {starter} does, but not how many ranks there are and which of its host this is"
        ))
        .with_hint("start elapid by torchrun's variables (docs/distributed.md), or build it with `cargo build --release --features mpi`")),
    }
}

fn json<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("plain data")
}

fn parsed<T: DeserializeOwned>(text: &[u8]) -> T {
    serde_json::from_slice(text).expect("what another rank of this program wrote")
}

/// Runs `f` on every rank of the mesh, each on a thread of its own, and gives what it gives, by rank. A mesh of one rank
/// runs on this thread. Where a rank fails all others leave their collectives, and its error is the answer.
///
/// # Errors
/// The first that a rank ends with.
pub fn launch<T: Send>(
    launch: &Launch,
    f: impl Fn(&Rank) -> Result<T, Error> + Sync,
) -> Result<Vec<T>, Error> {
    let Launch { mesh, timeout, .. } = *launch;
    #[cfg(feature = "mpi")]
    if let Some(world) = mpi::started() {
        return mpi::launch(world, launch, f);
    }
    if let Some(place) = processes::place()? {
        return processes::launch(place, launch, f);
    }
    if mesh.size() == 1 {
        return f(&Rank::single(launch.threads)).map(|value| vec![value]);
    }
    let abort = Abort::default();
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    let each = (launch.threads.unwrap_or_else(cores) / mesh.size()).max(1);
    let ranks = ranks(mesh, Some(each), timeout, &abort);
    let quiet = error::quiet();
    let ends: Vec<_> = std::thread::scope(|scope| {
        let (f, abort) = (&f, &abort);
        let run = move |rank: Rank| {
            error::set_quiet(quiet || !rank.is_first());
            let end = catch_unwind(AssertUnwindSafe(|| f(&rank)));
            match &end {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => abort.raise(failure(&rank, error.to_string())),
                Err(_) => abort.raise(failure(&rank, "a panic".into())),
            }
            end
        };
        let started: Vec<_> = ranks
            .into_iter()
            .map(|rank| {
                let name = format!("rank {}", rank.number());
                std::thread::Builder::new().name(name).spawn_scoped(scope, move || run(rank))
            })
            .collect();
        // Where one could not be started the others are not to wait for it.
        if let Some(Err(cause)) = started.iter().find(|thread| thread.is_err()) {
            let message = format!("the threads of the ranks could not be started: {cause}");
            abort.raise(CommFailure { rank: 0, message });
        }
        let end = |thread: std::thread::ScopedJoinHandle<'_, _>| thread.join().unwrap_or_else(Err);
        started.into_iter().flatten().map(end).collect()
    });
    outcome(ends, &abort)
}

fn failure(rank: &Rank, message: String) -> CommFailure {
    CommFailure { rank: rank.number(), message }
}

type End<T> = Result<Result<T, Error>, Box<dyn Any + Send>>;

/// What the ranks came to: all values, or the error of the rank that failed first. A panic goes on here.
fn outcome<T>(ends: Vec<End<T>>, abort: &Abort) -> Result<Vec<T>, Error> {
    let (mut values, mut errors) = (Vec::new(), Vec::new());
    for (rank, end) in ends.into_iter().enumerate() {
        match end {
            Ok(Ok(value)) => values.push(value),
            Ok(Err(error)) => errors.push((rank, error)),
            // The others say why they left.
            Err(payload) if payload.is::<CommFailure>() => {}
            Err(payload) => resume_unwind(payload),
        }
    }
    let Some(first) = abort.failure() else { return Ok(values) };
    let at = errors.iter().position(|(rank, _)| *rank == first.rank).unwrap_or(0);
    if at < errors.len() {
        return Err(errors.swap_remove(at).1);
    }
    Err(comm_error(first))
}

/// A failed collective, or a rank that has told why it ends, as an error for people.
pub(super) fn comm_error(failure: &CommFailure) -> Error {
    Error::new(failure.message.clone()).with_hint(
        "is that rank still alive, and is its machine not overloaded? --comm-timeout says how long to wait",
    )
}

/// All ranks of a mesh, as threads of this process.
fn ranks(mesh: Mesh, each: Option<usize>, timeout: Duration, abort: &Abort) -> Vec<Rank> {
    let all: Vec<_> = (0..mesh.size()).collect();
    let world = threads(&all, timeout, abort);
    // By their first ranks: tensor-parallel groups lie side by side, data-parallel ones are interleaved.
    let tp: Vec<_> = (0..mesh.dp).map(|i| threads(&mesh.tp_group(i * mesh.tp), timeout, abort)).collect();
    let dp: Vec<_> = (0..mesh.tp).map(|i| threads(&mesh.dp_group(i), timeout, abort)).collect();
    let rank = |(number, world): (usize, Arc<dyn Communicator>)| {
        let (row, column) = mesh.place(number);
        let groups = Groups { tp: tp[row][column].clone(), dp: dp[column][row].clone() };
        Rank { mesh, world, groups, threads: each, ranks_here: mesh.size() }
    };
    world.into_iter().enumerate().map(rank).collect()
}

/// Ends what a launcher has started, after the last rank has come here with its work done.
pub fn finish() {
    #[cfg(feature = "mpi")]
    if let Some(world) = mpi::started() {
        world.finish();
    }
}

/// Before a process that is not the first rank ends with an error: the first one may be about to say the same, and a
/// launcher ends all ranks when one ends. Gives what stands before this one's own.
pub fn let_the_first_speak(error: &Error) -> String {
    #[cfg(feature = "mpi")]
    if mpi::started().is_some() {
        if error::quiet() {
            std::thread::sleep(Duration::from_secs(3));
        }
        return String::new();
    }
    processes::let_the_first_speak(error)
}

/// What connects the ranks, in a word.
pub fn engine() -> Result<&'static str, Error> {
    #[cfg(feature = "mpi")]
    if mpi::started().is_some() {
        return Ok("mpi");
    }
    Ok(if processes::place()?.is_some() { "sockets" } else { "threads" })
}

/// This process as a rank among those that mpirun or srun has started.
#[cfg(feature = "mpi")]
mod mpi {
    use std::sync::Mutex;

    use elapid_cpu::comm::mpi::World;

    use super::*;
    use crate::error::say;

    static WORLD: Mutex<Option<World>> = Mutex::new(None);

    /// The world, where it was looked for.
    pub(super) fn started() -> Option<World> {
        WORLD.lock().expect("no panic inside the lock").clone()
    }

    pub(super) fn world() -> Result<World, Error> {
        let mut world = WORLD.lock().expect("no panic inside the lock");
        if let Some(world) = &*world {
            return Ok(world.clone());
        }
        let started = World::start(|failure| {
            error::set_quiet(false);
            let error = comm_error(failure);
            say(format_args!("error: {error}"));
            say(format_args!("hint: {}", error.hint().unwrap_or_default()));
        })
        .map_err(|cause| {
            Error::new(format!("MPI does not start: {cause}")).with_hint("check the MPI installation")
        })?;
        error::set_quiet(started.rank() > 0);
        Ok(world.insert(started).clone())
    }

    pub(super) fn launch<T>(
        world: World,
        launch: &Launch,
        f: impl Fn(&Rank) -> Result<T, Error>,
    ) -> Result<Vec<T>, Error> {
        let Launch { mesh, threads, timeout } = *launch;
        let number = world.rank();
        let (row, column) = mesh.place(number);
        let groups = Groups {
            tp: world.split(row, mesh.tp_group(number), timeout),
            dp: world.split(column, mesh.dp_group(number), timeout),
        };
        let rank = Rank { mesh, world: world.all(timeout), groups, threads, ranks_here: 1 };
        match f(&rank) {
            Err(error) if !rank.is_first() && error.signal().is_none() => {
                let_the_first_speak(&error);
                error::set_quiet(false);
                say(format_args!("error: rank {number}: {error}"));
                say(format_args!("hint: {}", error.hint().unwrap_or_default()));
                world.abort()
            }
            end => end.map(|value| vec![value]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn four(timeout: u64) -> Launch {
        Launch { mesh: Mesh { dp: 2, tp: 2 }, threads: Some(2), timeout: Duration::from_secs(timeout) }
    }

    #[test]
    fn ranks_find_each_other() {
        let found = launch(&four(60), |rank| {
            assert_eq!(rank.mesh(), Mesh { dp: 2, tp: 2 });
            let word = rank.from_first(|| {
                assert!(rank.is_first());
                Ok("of the first".to_owned())
            })?;
            let numbers = rank.gather("x".repeat(rank.number()));
            Ok((word, numbers, rank.sum_over_samples(10u64.pow(rank.number() as u32))))
        });
        for (rank, (word, numbers, sum)) in found.unwrap().into_iter().enumerate() {
            assert_eq!(word, "of the first");
            assert_eq!(numbers, ["", "x", "xx", "xxx"]);
            assert_eq!(sum, [101, 1010][rank % 2]);
        }
    }

    #[test]
    fn the_error_of_the_rank_that_failed_is_the_answer() {
        let start = Instant::now();
        let result = launch(&four(600), |rank| {
            if rank.number() == 2 {
                return Err(Error::new("no space left").with_hint("free some"));
            }
            rank.barrier();
            rank.gather(1);
            Ok(())
        });
        let error = result.unwrap_err();
        assert_eq!((error.to_string().as_str(), error.hint()), ("no space left", Some("free some")));
        assert!(start.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_rank_that_does_not_come_is_an_error() {
        let result = launch(&four(1), |rank| {
            if rank.number() != 1 {
                rank.barrier();
            }
            Ok(())
        });
        let error = result.unwrap_err();
        assert!(error.to_string().contains("in barrier for rank 1"), "{error}");
        assert!(error.hint().unwrap().contains("--comm-timeout"));
    }

    #[test]
    #[should_panic(expected = "a fault of ours")]
    fn a_panic_goes_on() {
        let _ = launch(&four(600), |rank| {
            if rank.number() == 3 {
                panic!("a fault of ours");
            }
            rank.barrier();
            Ok(())
        });
    }
}
