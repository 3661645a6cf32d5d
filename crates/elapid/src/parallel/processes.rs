//! This process as a rank among those that a launcher has started, where MPI does not connect them: they speak over sockets.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use elapid_cpu::comm::sockets::{self, World};
use elapid_cpu::comm::{CommFailure, Groups};
use elapid_xla::driver::neuron::Place;

use super::launch::comm_error;
use super::{Launch, Mesh, Rank};
use crate::Error;
use crate::error::{self, say};

/// How long the others wait for the first rank to speak.
const FIRST: Duration = Duration::from_secs(3);

/// How long a rank may take to end after another has.
const GRACE: Duration = Duration::from_secs(30);

/// The first rank has said why the run ends.
static SPOKEN: AtomicBool = AtomicBool::new(false);

/// Which of the processes this is; None: a process alone.
///
/// # Errors
/// A launcher's variables that do not fit together.
pub(crate) fn place() -> Result<Option<Place>, Error> {
    Ok(Place::find(|name| std::env::var(name).ok())?.filter(|place| place.ranks > 1))
}

/// Before `error` is said: a rank that is not the first waits whether that one says it. What stands before its own.
pub(super) fn let_the_first_speak(error: &Error) -> String {
    match place() {
        Ok(Some(place)) if error::quiet() && !SPOKEN.load(Ordering::SeqCst) => {
            // A launcher ends all ranks when one ends.
            std::thread::sleep(FIRST);
            // Where a signal has stopped them, one rank speaks for all.
            error::set_quiet(error.signal().is_some());
            format!("rank {}: ", place.rank)
        }
        _ => String::new(),
    }
}

/// Runs `f` on this rank of the mesh.
pub(super) fn launch<T>(
    place: Place,
    launch: &Launch,
    f: impl Fn(&Rank) -> Result<T, Error>,
) -> Result<Vec<T>, Error> {
    let Place { rank: number, ranks, root, port, .. } = place;
    let place = sockets::Place { rank: number, ranks, root, port };
    let world = Arc::new(World::meet(place, launch.timeout).map_err(|failure| comm_error(&failure))?);
    let _watch = Watch::start(&world, launch.timeout.min(GRACE));
    let (failure, error) = match catch_unwind(AssertUnwindSafe(|| f(&rank(&world, launch)?))) {
        Ok(Ok(value)) => {
            world.finish();
            return Ok(vec![value]);
        }
        // All ranks stop together.
        Ok(Err(error)) if error.signal().is_some() => {
            world.finish();
            return Err(error);
        }
        Ok(Err(error)) => {
            let own = CommFailure { rank: number, message: format!("rank {number}: {error}") };
            match world.fate_of_others() {
                // What another rank has met first led to this one's error, unless it is the same.
                Some(first) if !first.message.ends_with(&error.to_string()) => {
                    let message = format!("{}; then {}", first.message, own.message);
                    (first.clone(), comm_error(&CommFailure { message, ..first }))
                }
                _ => (own, error),
            }
        }
        Err(payload) => match payload.downcast::<CommFailure>() {
            Ok(failure) => (*failure.clone(), comm_error(&failure)),
            Err(payload) => {
                world.leave(&CommFailure { rank: number, message: format!("rank {number}: a panic") });
                resume_unwind(payload)
            }
        },
    };
    world.leave(&failure);
    if number == 0 {
        return Err(error);
    }
    if world.the_first_has_spoken(FIRST) {
        SPOKEN.store(true, Ordering::SeqCst);
        return Err(error);
    }
    error::set_quiet(false);
    Err(error.at(format!("rank {number}")))
}

/// Ends the process where it does not end by itself: what a device's runtime waits for may never come.
struct Watch(Arc<AtomicBool>);

impl Watch {
    fn start(world: &Arc<World>, grace: Duration) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let (watch, world) = (over.clone(), world.clone());
        std::thread::spawn(move || {
            let mut lost: Option<(CommFailure, Instant)> = None;
            while !watch.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(100));
                match &lost {
                    None => lost = world.lost().map(|failure| (failure, Instant::now() + grace)),
                    Some((failure, end)) if Instant::now() > *end => {
                        world.leave(failure);
                        if world.place().rank == 0 || !world.the_first_has_spoken(FIRST) {
                            let what =
                                format!("{}; rank {} has waited for it", failure.message, world.place().rank);
                            let error = comm_error(&CommFailure { message: what, ..failure.clone() });
                            say(format_args!("error: {error}"));
                            say(format_args!("hint: {}", error.hint().unwrap_or_default()));
                        }
                        std::process::exit(1);
                    }
                    Some(_) => {}
                }
            }
        });
        Self(over)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// This rank, with its groups, once all are known to mean the same mesh.
fn rank(world: &World, launch: &Launch) -> Result<Rank, Error> {
    let Launch { mesh, threads, .. } = *launch;
    let number = world.place().rank;
    let alone = |comm| Rank { mesh, world: comm, groups: Groups::default(), threads, ranks_here: 1 };
    for (other, theirs) in alone(world.all()).gather(mesh).into_iter().enumerate() {
        if theirs != mesh {
            let words = |mesh: Mesh| format!("--tp {} --dp {}", mesh.tp, mesh.dp);
            return Err(Error::new(format!(
                "rank {number} has {}, rank {other} has {}",
                words(mesh),
                words(theirs)
            ))
            .with_hint("start all ranks with the same flags"));
        }
    }
    let group = |ranks: Vec<usize>, id| world.group(&ranks, id).map_err(|failure| comm_error(&failure));
    let groups = Groups { tp: group(mesh.tp_group(number), 1)?, dp: group(mesh.dp_group(number), 2)? };
    Ok(Rank { groups, ..alone(world.all()) })
}
