//! Ranks that are processes, over MPI.
//!
//! Sums and gathers go from rank to rank ([`Trade`]), so that it is known who is waited for; broadcasts and barriers are
//! MPI's own. Nothing blocks inside MPI: every wait is a
//! loop of `MPI_Test` that knows the time. A failure ends the whole run from here (`MPI_Abort`), since MPI may still be writing into memory that unwinding would give back.

use std::ffi::c_int;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mpi::ffi;

use super::trade::{self, Trade};
use super::{CommFailure, Communicator, FloatsMut, Reduce, Single};

/// Called with what ends the run, to say it, before the run is ended.
pub type Farewell = fn(&CommFailure);

/// The ranks that a launcher has started.
#[derive(Clone, Debug)]
pub struct World {
    group: MpiGroup,
}

impl World {
    /// Starts MPI.
    ///
    /// # Errors
    /// Its reason, in words.
    pub fn start(farewell: Farewell) -> Result<Self, String> {
        let mut provided = 0;
        // SAFETY: called once, by the caller's promise below; null arguments are allowed since MPI-2.
        let code = unsafe {
            let none = std::ptr::null_mut();
            ffi::MPI_Init_thread(none, none.cast(), ffi::RSMPI_THREAD_MULTIPLE, &mut provided)
        };
        if code != 0 {
            return Err(message(code));
        }
        // SAFETY: a constant of the library.
        if provided < unsafe { ffi::RSMPI_THREAD_MULTIPLE } {
            return Err("the MPI library does not allow calls from several threads".into());
        }
        // SAFETY: the world exists after the start.
        let group = unsafe { MpiGroup::new(ffi::RSMPI_COMM_WORLD, Duration::MAX, farewell, None) };
        Ok(Self { group })
    }

    /// The same ranks, which send no message of more than `bytes` (1 GiB unless given; MPI counts to 2³¹ − 1), but
    /// several.
    #[must_use]
    pub fn with_messages_of(&self, bytes: usize) -> Self {
        Self { group: MpiGroup { longest: bytes, ..self.group.clone() } }
    }

    /// This process's number.
    pub fn rank(&self) -> usize {
        self.group.rank
    }

    /// Number of processes.
    pub fn size(&self) -> usize {
        self.group.size
    }

    /// All ranks as one group; a rank waits at most `timeout` for the others.
    pub fn all(&self, timeout: Duration) -> Arc<dyn Communicator> {
        MpiGroup { timeout, ..self.group.clone() }.shared()
    }

    /// The ranks that give the same `color`, in the order of the world; all ranks call this together. `ranks` are their
    /// numbers in the world.
    pub fn split(&self, color: usize, ranks: Vec<usize>, timeout: Duration) -> Arc<dyn Communicator> {
        // SAFETY: a handle that the call fills in.
        let mut comm = unsafe { ffi::RSMPI_COMM_NULL };
        // SAFETY: all ranks of a living communicator call this.
        let code =
            unsafe { ffi::MPI_Comm_split(self.group.comm, color as c_int, self.rank() as c_int, &mut comm) };
        self.group.check("split", code);
        // SAFETY: made above.
        let group = unsafe { MpiGroup::new(comm, timeout, self.group.farewell, Some(ranks)) };
        MpiGroup { longest: self.group.longest, ..group }.shared()
    }

    /// Ends MPI; all ranks call this together, after the last collective.
    pub fn finish(&self) {
        // SAFETY: nothing calls MPI afterwards.
        unsafe { ffi::MPI_Finalize() };
    }

    /// Ends the run on all ranks.
    pub fn abort(&self) -> ! {
        self.group.abort()
    }
}

/// What MPI says of an error.
fn message(code: c_int) -> String {
    let mut text = vec![0u8; ffi::MPI_MAX_ERROR_STRING as usize];
    let mut length = 0;
    // SAFETY: the text is as long as MPI asks for.
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast(), &mut length) };
    String::from_utf8_lossy(&text[..length as usize]).into_owned()
}

#[derive(Clone, Debug)]
struct MpiGroup {
    comm: ffi::MPI_Comm,
    rank: usize,
    size: usize,
    /// By rank of the group, those of the world.
    ranks: Vec<usize>,
    timeout: Duration,
    farewell: Farewell,
    /// Bytes of the longest message.
    longest: usize,
}

// SAFETY: a communicator may be used from several threads (`MPI_THREAD_MULTIPLE` was granted); the handle itself never
// changes.
unsafe impl Send for MpiGroup {}
// SAFETY: as above.
unsafe impl Sync for MpiGroup {}

/// A transfer under way, and the rank at its other end; None: MPI knows.
struct Transfer {
    request: ffi::MPI_Request,
    with: Option<usize>,
}

impl MpiGroup {
    /// # Safety
    /// A communicator that is never freed.
    unsafe fn new(
        comm: ffi::MPI_Comm,
        timeout: Duration,
        farewell: Farewell,
        ranks: Option<Vec<usize>>,
    ) -> Self {
        let (mut rank, mut size) = (0, 0);
        // SAFETY: the communicator is alive.
        unsafe {
            ffi::MPI_Comm_set_errhandler(comm, ffi::RSMPI_ERRORS_RETURN);
            ffi::MPI_Comm_rank(comm, &mut rank);
            ffi::MPI_Comm_size(comm, &mut size);
        }
        let (rank, size) = (rank as usize, size as usize);
        let ranks = ranks.unwrap_or_else(|| (0..size).collect());
        Self { comm, rank, size, ranks, timeout, farewell, longest: 1 << 30 }
    }

    /// For a backend. A group of one has nothing to copy or to wait for.
    fn shared(self) -> Arc<dyn Communicator> {
        if self.size == 1 { Arc::new(Single) } else { Arc::new(self) }
    }

    fn fail(&self, what: String) -> ! {
        let rank = self.ranks[self.rank];
        (self.farewell)(&CommFailure { rank, message: format!("rank {rank} {what}") });
        self.abort()
    }

    fn abort(&self) -> ! {
        // SAFETY: MPI is running. It does not come back.
        unsafe { ffi::MPI_Abort(self.comm, 1) };
        std::process::exit(1)
    }

    fn check(&self, what: &str, code: c_int) {
        if code != 0 {
            self.fail(format!("failed in {what}: {}", message(code)));
        }
    }

    /// Waits until all transfers are done. Their memory stays where it is: this does not unwind.
    fn wait(&self, what: &str, mut transfers: Vec<Transfer>) {
        let start = Instant::now();
        let mut idle = 0u32;
        loop {
            transfers.retain_mut(|transfer| {
                let mut done = 0;
                // SAFETY: Open MPI and MPICH write no more than a status, and this is one.
                let code = unsafe {
                    let mut status = std::mem::zeroed();
                    ffi::MPI_Test(&mut transfer.request, &mut done, &mut status)
                };
                self.check(what, code);
                done == 0
            });
            if transfers.is_empty() {
                return;
            }
            if start.elapsed() > self.timeout {
                let mut late: Vec<_> =
                    transfers.iter().filter_map(|t| t.with.map(|peer| self.ranks[peer])).collect();
                late.sort_unstable();
                late.dedup();
                let others: Vec<_> = late.iter().map(usize::to_string).collect();
                let whom =
                    if late.is_empty() { "the others".into() } else { format!("rank {}", others.join(", ")) };
                self.fail(format!(
                    "waited {} s in {what} for {whom}, which did not come",
                    self.timeout.as_secs_f32()
                ));
            }
            // At first at once again, then without taking a core from the ranks that are waited for.
            idle = idle.saturating_add(1);
            match idle {
                ..200 => std::hint::spin_loop(),
                200..2000 => std::thread::yield_now(),
                _ => std::thread::sleep(Duration::from_micros(100)),
            }
        }
    }

    fn start(
        &self,
        what: &str,
        peer: usize,
        transfers: &mut Vec<Transfer>,
        call: impl FnOnce(ffi::MPI_Comm, c_int, &mut ffi::MPI_Request) -> c_int,
    ) {
        // SAFETY: a constant of the library.
        let mut request = unsafe { ffi::RSMPI_REQUEST_NULL };
        let code = call(self.comm, peer as c_int, &mut request);
        self.check(what, code);
        transfers.push(Transfer { request, with: Some(peer) });
    }

    /// Starts a collective of MPI's own and waits for it.
    fn collective(&self, what: &str, call: impl FnOnce(ffi::MPI_Comm, &mut ffi::MPI_Request) -> c_int) {
        // SAFETY: a constant of the library.
        let mut request = unsafe { ffi::RSMPI_REQUEST_NULL };
        let code = call(self.comm, &mut request);
        self.check(what, code);
        self.wait(what, vec![Transfer { request, with: None }]);
    }
}

impl Trade for MpiGroup {
    fn trade(&self, what: &'static str, out: &[&[u8]], into: Vec<&mut [u8]>) {
        let mut transfers = Vec::new();
        for (peer, (into, out)) in into.into_iter().zip(out).enumerate() {
            for message in into.chunks_mut(self.longest) {
                self.start(what, peer, &mut transfers, |comm, peer, request| {
                    let (to, count) = (message.as_mut_ptr().cast(), message.len() as c_int);
                    // SAFETY: the memory is borrowed until this returns, and `wait` below sees the transfer done.
                    unsafe { ffi::MPI_Irecv(to, count, ffi::RSMPI_UINT8_T, peer, 0, comm, request) }
                });
            }
            for message in out.chunks(self.longest) {
                self.start(what, peer, &mut transfers, |comm, peer, request| {
                    let (from, count) = (message.as_ptr().cast(), message.len() as c_int);
                    // SAFETY: as above.
                    unsafe { ffi::MPI_Isend(from, count, ffi::RSMPI_UINT8_T, peer, 0, comm, request) }
                });
            }
        }
        self.wait(what, transfers);
    }
}

impl Communicator for MpiGroup {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_reduce(&self, data: FloatsMut<'_>, how: Reduce) {
        trade::all_reduce(self, data, how);
    }

    fn reduce_scatter(&self, data: FloatsMut<'_>) {
        trade::reduce_scatter(self, data);
    }

    fn all_gather(&self, data: &mut [u8]) {
        trade::all_gather(self, data);
    }

    fn broadcast(&self, data: &mut [u8], root: usize) {
        for message in data.chunks_mut(self.longest) {
            self.collective("broadcast", |comm, request| {
                // SAFETY: the memory lives until the collective is done.
                unsafe {
                    let (data, count) = (message.as_mut_ptr().cast(), message.len() as c_int);
                    ffi::MPI_Ibcast(data, count, ffi::RSMPI_UINT8_T, root as c_int, comm, request)
                }
            });
        }
    }

    fn barrier(&self) {
        // SAFETY: the request lives until the barrier is done.
        self.collective("barrier", |comm, request| unsafe { ffi::MPI_Ibarrier(comm, request) });
    }
}
