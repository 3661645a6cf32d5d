//! The time that collectives take, and how much of it the rank itself spends in them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use elapid_cpu::comm::{Communicator, FloatsMut, Reduce};

/// Nanoseconds in collectives of one rank: called on its own thread, and on the one that carries rows meanwhile.
#[derive(Debug, Default)]
pub(super) struct Account {
    own: AtomicU64,
    carried: AtomicU64,
}

impl Account {
    /// (on the rank's own thread, on another) since the last call.
    pub(super) fn take(&self) -> [Duration; 2] {
        [&self.own, &self.carried].map(|nanos| Duration::from_nanos(nanos.swap(0, Ordering::Relaxed)))
    }
}

/// A communicator that books its time.
#[derive(Debug)]
pub(super) struct Metered {
    inner: Arc<dyn Communicator>,
    account: Arc<Account>,
    own: ThreadId,
}

impl Metered {
    /// Made on the rank's own thread.
    pub(super) fn new(inner: Arc<dyn Communicator>, account: &Arc<Account>) -> Self {
        Self { inner, account: account.clone(), own: std::thread::current().id() }
    }

    fn book(&self, run: impl FnOnce(&dyn Communicator)) {
        let start = Instant::now();
        run(&*self.inner);
        let mine = std::thread::current().id() == self.own;
        let to = if mine { &self.account.own } else { &self.account.carried };
        to.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
    }
}

impl Communicator for Metered {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn all_reduce(&self, data: FloatsMut<'_>, reduce: Reduce) {
        self.book(|inner| inner.all_reduce(data, reduce));
    }

    fn reduce_scatter(&self, data: FloatsMut<'_>) {
        self.book(|inner| inner.reduce_scatter(data));
    }

    fn all_gather(&self, data: &mut [u8]) {
        self.book(|inner| inner.all_gather(data));
    }

    fn broadcast(&self, data: &mut [u8], root: usize) {
        self.book(|inner| inner.broadcast(data, root));
    }

    fn barrier(&self) {
        self.book(|inner| inner.barrier());
    }
}
