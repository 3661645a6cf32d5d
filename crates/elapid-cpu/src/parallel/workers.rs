//! The worker threads of one rank: the thread that asks and its helpers.
//!
//! Decoding hands over work some seventy times a token, each time for some microseconds, and to wake a thread that sleeps takes tens
//! of them. So helpers look out for the next task for a while before they sleep, and the thread that asks works itself.

use std::any::Any;
use std::cell::UnsafeCell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};

/// A pool of worker threads of one rank.
pub(crate) struct Workers {
    board: Arc<Board>,
    helpers: Vec<JoinHandle<()>>,
    /// Set while the helpers have a task.
    busy: AtomicBool,
}

impl Workers {
    pub(crate) fn new(threads: usize) -> io::Result<Self> {
        let board = Arc::new(Board::new(threads));
        let mut workers = Self { board, helpers: Vec::new(), busy: AtomicBool::new(false) };
        for place in 1..threads {
            let board = workers.board.clone();
            workers.helpers.push(thread::Builder::new().spawn(move || board.help(place))?);
        }
        Ok(workers)
    }

    pub(crate) fn threads(&self) -> usize {
        self.board.shares.len()
    }

    /// Calls `f` for 0 to `pieces` − 1, in any order, on any thread.
    pub(crate) fn each(&self, pieces: usize, f: impl Fn(usize) + Sync) {
        // Inside of a piece of another task every thread has its work already; a second thread that asks meanwhile works alone.
        if pieces <= 1 || self.threads() == 1 || self.busy.swap(true, SeqCst) {
            return (0..pieces).for_each(f);
        }
        let result = self.board.run(pieces, &f);
        self.busy.store(false, SeqCst);
        result.unwrap_or_else(|why| resume_unwind(why));
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.board.closing.store(true, SeqCst);
        self.board.posted.ring();
        for helper in self.helpers.drain(..) {
            helper.join().expect("a helper catches what its pieces panic with");
        }
    }
}

type Panic = Box<dyn Any + Send>;

/// So many calls of a function that lives until the task is over.
#[derive(Clone, Copy)]
struct Task {
    pieces: usize,
    f: *const (dyn Fn(usize) + Sync),
}

/// The next piece of a thread's share, on a cache line of its own.
#[repr(align(64))]
struct Share(AtomicUsize);

/// Where tasks are posted, one at a time.
struct Board {
    task: UnsafeCell<Task>,
    /// The number of the task, a multiple of [`TASK`]; [`OPEN`] while helpers may join it; and how many are in it.
    state: AtomicUsize,
    /// One for each thread, that of the one that asks first.
    shares: Vec<Share>,
    /// What a helper's piece panicked with.
    panicked: Mutex<Option<Panic>>,
    closing: AtomicBool,
    posted: Bell,
    left: Bell,
}

const OPEN: usize = 1 << 15;
const TASK: usize = 1 << 16;

// SAFETY: `task` is written while no task is open and no helper is in one, and read by helpers that are; its function may be
// called from any thread.
unsafe impl Send for Board {}
// SAFETY: as above.
unsafe impl Sync for Board {}

impl Board {
    fn new(threads: usize) -> Self {
        Self {
            task: UnsafeCell::new(Task { pieces: 0, f: &|_| () }),
            state: AtomicUsize::new(0),
            shares: (0..threads).map(|_| Share(AtomicUsize::new(0))).collect(),
            panicked: Mutex::new(None),
            closing: AtomicBool::new(false),
            posted: Bell::default(),
            left: Bell::default(),
        }
    }

    /// The first piece of a share; that of the next is behind its last.
    fn first(&self, share: usize, pieces: usize) -> usize {
        share * pieces / self.shares.len()
    }

    /// Calls `f` for all pieces, with those helpers that come in time. For one thread at a time.
    fn run(&self, pieces: usize, f: &(dyn Fn(usize) + Sync)) -> Result<(), Panic> {
        // SAFETY: only the lifetime changes, and this function returns when nobody is in the task any more.
        let f = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(f) };
        let task = Task { pieces, f };
        // SAFETY: nobody is in the last task, and none is open.
        unsafe { *self.task.get() = task };
        for (share, next) in self.shares.iter().enumerate() {
            next.0.store(self.first(share, pieces), SeqCst);
        }
        let last = self.state.load(SeqCst);
        self.state.store(last.wrapping_add(TASK) | OPEN, SeqCst);
        self.posted.ring();
        let own = catch_unwind(AssertUnwindSafe(|| self.work(0, task)));
        self.state.fetch_and(!OPEN, SeqCst);
        self.left.wait(|| self.state.load(SeqCst).is_multiple_of(OPEN));
        let others = self.panicked.lock().expect("no panic inside the lock").take();
        own.and(others.map_or(Ok(()), Err))
    }

    /// The pieces of the share at `place`, then what is left of the others'. Neighbouring pieces mostly have neighbouring
    /// memory, so that what the CPU fetches ahead is what comes next.
    fn work(&self, place: usize, task: Task) {
        for share in (place..self.shares.len()).chain(0..place) {
            let end = self.first(share + 1, task.pieces);
            loop {
                let piece = self.shares[share].0.fetch_add(1, SeqCst);
                if piece >= end {
                    break;
                }
                // SAFETY: this thread is in the task, whose function lives as long.
                unsafe { (*task.f)(piece) };
            }
        }
    }

    /// The life of the helper at `place`.
    fn help(&self, place: usize) {
        let mut last = 0;
        loop {
            let is_new = |state: usize| state & OPEN != 0 && state / TASK != last;
            self.posted.wait(|| is_new(self.state.load(SeqCst)) || self.closing.load(SeqCst));
            if self.closing.load(SeqCst) {
                return;
            }
            let join = |state| is_new(state).then_some(state + 1);
            let Ok(state) = self.state.fetch_update(SeqCst, SeqCst, join) else { continue };
            last = state / TASK;
            // SAFETY: the task was open as this thread joined it.
            let task = unsafe { *self.task.get() };
            if let Err(why) = catch_unwind(AssertUnwindSafe(|| self.work(place, task))) {
                *self.panicked.lock().expect("no panic inside the lock") = Some(why);
            }
            self.state.fetch_sub(1, SeqCst);
            self.left.ring();
        }
    }
}

/// What wakes threads that wait for something.
#[derive(Default)]
struct Bell {
    lock: Mutex<()>,
    rung: Condvar,
    /// Threads that sleep, or are about to.
    asleep: AtomicUsize,
}

impl Bell {
    /// Returns when `done` holds: looks again and again at first, about 100 µs long on an Intel CPU, then whenever the bell is rung.
    fn wait(&self, done: impl Fn() -> bool) {
        for look in 1..2048 {
            if done() {
                return;
            }
            // Others may have to run before `done` can hold.
            if look % 64 == 0 { thread::yield_now() } else { std::hint::spin_loop() }
        }
        let mut guard = self.lock.lock().expect("no panic inside the lock");
        self.asleep.fetch_add(1, SeqCst);
        while !done() {
            guard = self.rung.wait(guard).expect("no panic inside the lock");
        }
        self.asleep.fetch_sub(1, SeqCst);
    }

    /// Due after every change that makes `done` hold.
    fn ring(&self) {
        if self.asleep.load(SeqCst) > 0 {
            // Who is about to sleep holds the lock until it sleeps.
            drop(self.lock.lock().expect("no panic inside the lock"));
            self.rung.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn every_piece_runs_once_whatever_the_pieces_and_threads() {
        for threads in [1, 2, 3, 8] {
            let workers = Workers::new(threads).unwrap();
            for pieces in (0..40).chain([1000]).cycle().take(2000) {
                let calls: Vec<_> = (0..pieces).map(|_| AtomicUsize::new(0)).collect();
                workers.each(pieces, |piece| {
                    calls[piece].fetch_add(1, SeqCst);
                });
                assert!(
                    calls.iter().all(|calls| calls.load(SeqCst) == 1),
                    "{threads} threads, {pieces} pieces"
                );
            }
        }
    }

    #[test]
    fn helpers_that_sleep_are_woken() {
        let workers = Workers::new(2).unwrap();
        for _ in 0..20 {
            thread::sleep(Duration::from_millis(3));
            // Each piece waits for the other, so two threads must have come.
            let arrived = AtomicUsize::new(0);
            workers.each(2, |_| {
                arrived.fetch_add(1, SeqCst);
                while arrived.load(SeqCst) < 2 {
                    thread::yield_now();
                }
            });
        }
    }

    #[test]
    fn work_inside_of_work_is_done() {
        let workers = Workers::new(3).unwrap();
        let calls = AtomicUsize::new(0);
        workers.each(5, |_| {
            workers.each(7, |_| {
                calls.fetch_add(1, SeqCst);
            });
        });
        assert_eq!(calls.load(SeqCst), 35);
    }

    #[test]
    fn a_panic_comes_to_who_asked_and_leaves_the_workers_whole() {
        let workers = Workers::new(2).unwrap();
        for bad in 0..8 {
            let result = catch_unwind(AssertUnwindSafe(|| workers.each(8, |piece| assert_ne!(piece, bad))));
            assert!(result.is_err(), "piece {bad}");
            let calls = AtomicUsize::new(0);
            workers.each(8, |_| {
                calls.fetch_add(1, SeqCst);
            });
            assert_eq!(calls.load(SeqCst), 8);
        }
    }
}
