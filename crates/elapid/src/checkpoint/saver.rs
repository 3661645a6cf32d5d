//! Saves that go on while the run trains.
//!
//! A save begins with a copy of masters and moments. A thread on every rank writes what that rank holds, which takes no part
//! in any collective. At the end of each step the ranks tell each other whether theirs is done, along with what they tell
//! each other anyway; once all are, the first rank puts the checkpoint into its place, on a thread again.

use std::thread::{Builder, Scope, ScopedJoinHandle};

use elapid_tensor::{Backend, DType};

use super::store::{Aside, aside, begin, earlier_ones_stay};
use super::write::{Description, Pieces, write_pieces};
use super::{Progress, State, Store, agree};
use crate::Error;
use crate::parallel::Rank;

/// Room for a copy of masters and moments.
type Copies<B> = [<B as Backend>::Buffer; 3];

/// The saves of one rank, of which one is under way at a time.
pub struct Saver<'scope, 'env, B: Backend>
where
    B::Buffer: 'scope,
{
    scope: &'scope Scope<'scope, 'env>,
    store: &'env Store,
    rank: &'env Rank,
    backend: &'env B,
    /// Between saves, where this rank writes any of it.
    copies: Option<Copies<B>>,
    under_way: UnderWay<'scope, B>,
}

enum UnderWay<'scope, B: Backend> {
    Nothing,
    /// On every rank: its own file.
    Writing(ScopedJoinHandle<'scope, Written<B>>, Box<Rest>),
    /// On the first rank: all other files, and the rename.
    Committing(ScopedJoinHandle<'scope, Result<(), Error>>),
}

struct Written<B: Backend> {
    pieces: Result<Pieces, Error>,
    copies: Option<Copies<B>>,
}

/// What the first rank needs to complete a checkpoint.
struct Rest {
    step: u64,
    description: Description,
    /// On the first rank.
    aside: Option<Aside>,
}

impl<'scope, 'env, B: Backend> Saver<'scope, 'env, B>
where
    B::Buffer: 'scope,
{
    /// Nothing is being saved. Threads are started in `scope`, which ends after them.
    pub fn new(
        scope: &'scope Scope<'scope, 'env>,
        store: &'env Store,
        rank: &'env Rank,
        backend: &'env B,
    ) -> Self {
        Self { scope, store, rank, backend, copies: None, under_way: UnderWay::Nothing }
    }

    /// Makes room for the copies of such states, so that the first save takes no longer than others.
    pub fn reserve(&mut self, state: &State<'_, B>) {
        if !state.held(self.backend).is_empty() {
            self.copies = Some(self.copy(state));
        }
    }

    fn copy(&mut self, state: &State<'_, B>) -> Copies<B> {
        let backend = self.backend;
        let flat = state.model.layout().flat.shard(state.model.part(backend).0);
        let room = || std::array::from_fn(|_| backend.buffer(flat, DType::F32));
        let mut copies = self.copies.take().unwrap_or_else(room);
        for (from, to) in state.buffers.iter().zip(&mut copies) {
            backend.cast_buffer(from, to);
        }
        copies
    }

    /// Begins to write a checkpoint of `state`, and returns when it has been copied. Waits for the save before it. All ranks
    /// call this together.
    ///
    /// # Errors
    /// That of the save before; or there is no room for a folder, or no thread.
    pub fn start(&mut self, state: &State<'_, B>, progress: Progress) -> Result<(), Error> {
        self.finish()?;
        let Self { scope, store, rank, backend, .. } = *self;
        let (step, name) = (progress.step, store.name(progress.step));
        let made = begin(rank, store.dir(), &name).map_err(earlier_ones_stay)?;
        let held = state.held(backend);
        let copies = (!held.is_empty()).then(|| self.copy(state));
        let dir = aside(store.dir(), &name);
        let write = move || {
            let pieces = match &copies {
                None => Ok(Pieces::none()),
                Some(copies) => write_pieces(&dir, rank.number(), backend, held, copies.each_ref()),
            };
            Written { pieces, copies }
        };
        let description = Description::new(rank.mesh(), state, progress);
        let rest = Rest { step, description, aside: made };
        self.under_way = UnderWay::Writing(spawn(scope, write)?, Box::new(rest));
        Ok(())
    }

    /// Whether this rank's part of a save is done, and the others are to know.
    pub fn is_written(&self) -> bool {
        matches!(&self.under_way, UnderWay::Writing(thread, _) if thread.is_finished())
    }

    /// Takes a save a step further where that can be done without waiting. All ranks call this together; `all` says that
    /// [`Self::is_written`] holds on each of them.
    ///
    /// # Errors
    /// That of the save.
    pub fn advance(&mut self, all: bool) -> Result<(), Error> {
        if all {
            self.commit()?;
        }
        match &self.under_way {
            UnderWay::Committing(thread) if thread.is_finished() => self.end(),
            _ => Ok(()),
        }
    }

    /// Waits until nothing is under way. All ranks call this together.
    ///
    /// # Errors
    /// That of the save that was under way.
    pub fn finish(&mut self) -> Result<(), Error> {
        self.commit()?;
        let rank = self.rank;
        rank.from_first(|| self.end())
    }

    /// Where files are being written: waits for those of all ranks and has the first rank complete the checkpoint.
    fn commit(&mut self) -> Result<(), Error> {
        let (thread, rest) = match std::mem::replace(&mut self.under_way, UnderWay::Nothing) {
            UnderWay::Writing(thread, rest) => (thread, *rest),
            other => {
                self.under_way = other;
                return Ok(());
            }
        };
        let Written { pieces, copies } = join(thread);
        self.copies = copies;
        // Until all have come here: no rank removes the folder that another one writes into.
        let pieces = agree(self.rank, pieces).map_err(earlier_ones_stay)?;
        let pieces = self.rank.gather(pieces);
        if self.rank.is_first() {
            let (store, Rest { step, description, aside: made }) = (self.store, rest);
            let commit = move || {
                let _made = made;
                let dir = aside(store.dir(), &store.name(step));
                description.write(&dir, pieces).and_then(|()| store.commit(step)).map_err(earlier_ones_stay)
            };
            self.under_way = UnderWay::Committing(spawn(self.scope, commit)?);
        }
        Ok(())
    }

    /// Waits until the first rank has completed a checkpoint.
    fn end(&mut self) -> Result<(), Error> {
        match std::mem::replace(&mut self.under_way, UnderWay::Nothing) {
            UnderWay::Committing(thread) => join(thread),
            _ => Ok(()),
        }
    }
}

impl<B: Backend> Drop for Saver<'_, '_, B> {
    /// A run that ends with an error keeps what it was saving; of several ranks the others may not come to help.
    fn drop(&mut self) {
        if self.rank.mesh().size() == 1 && !std::thread::panicking() {
            // The run's own error is the one to speak of.
            let _ = self.finish();
        }
    }
}

fn spawn<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    work: impl FnOnce() -> T + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, T>, Error> {
    Builder::new().name("save".into()).spawn_scoped(scope, work).map_err(|cause| {
        Error::new(format!("the thread that writes checkpoints cannot be started: {cause}"))
            .with_hint("free some threads on this machine, or give --no-async-save")
    })
}

fn join<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
