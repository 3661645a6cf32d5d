//! A thread that carries rows between the ranks while the rank goes on computing.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use elapid_tensor::{Group, Row};

use crate::CpuBackend;
use crate::comm::{Communicator, FloatsMut, Reduce};
use crate::memory::Block;
use crate::tensor::Buffer;

/// A row to be summed, and to whom the sum goes.
struct Job {
    comm: Arc<dyn Communicator>,
    row: Block,
    len: usize,
    scatter: bool,
    done: Sender<Result<Block, Box<dyn Any + Send>>>,
}

/// The thread, which ends with this.
pub(crate) struct Courier(Mutex<Sender<Job>>);

/// A row that is being summed.
pub struct Pending {
    row: Row,
    len: usize,
    rank: usize,
    done: Receiver<Result<Block, Box<dyn Any + Send>>>,
}

impl Courier {
    pub(crate) fn new() -> Self {
        let (jobs, orders) = channel::<Job>();
        std::thread::spawn(move || {
            for Job { comm, mut row, len, scatter, done } in orders {
                // A failed collective ends the rank where it waits for the row.
                let sum = catch_unwind(AssertUnwindSafe(|| {
                    let data = FloatsMut::F32(row.as_mut_slice(len));
                    if scatter {
                        comm.reduce_scatter(data)
                    } else {
                        comm.all_reduce(data, Reduce::Sum)
                    }
                    row
                }));
                // Nobody waits where the rank has ended already.
                let _ = done.send(sum);
            }
        });
        Self(Mutex::new(jobs))
    }

    /// Sends a copy of the row: the buffer is written on while the copy travels.
    pub(crate) fn start(
        &self,
        backend: &CpuBackend,
        buffer: &Buffer,
        row: Row,
        scatter: bool,
        group: Group,
    ) -> Pending {
        let comm = backend.group(group).clone();
        let slot = buffer.shape().whole(row);
        let (len, rank) = (slot.len(), comm.rank());
        let mut copy = backend.pool.take::<f32>(len);
        copy.as_mut_slice(len).copy_from_slice(&buffer.f32()[buffer.shape().range(&slot)]);
        let (done, sum) = channel();
        let job = Job { comm, row: copy, len, scatter, done };
        self.0.lock().expect("no panic inside the lock").send(job).expect("the thread lives as long as this");
        Pending { row, len, rank, done: sum }
    }
}

impl Pending {
    pub(crate) fn finish(self, to: &mut Buffer) {
        let sum =
            self.done.recv().expect("the thread answers every job").unwrap_or_else(|why| resume_unwind(why));
        let slot = to.shape().whole(self.row);
        let start = if slot.len() == self.len { 0 } else { self.rank * slot.len() };
        to.slot_mut(&slot).copy_from_slice(&sum.as_slice::<f32>(self.len)[start..start + slot.len()]);
    }
}
