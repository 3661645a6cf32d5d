//! Ranks that are threads of one process: they read each other's memory.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::{Abort, CommFailure, Communicator, FloatsMut, Number, Reduce, Single, piece, reduce};

/// How often a waiting rank looks whether another one has failed.
const LOOK: Duration = Duration::from_millis(20);

/// A group of ranks that are threads, in rank order. `ranks` are their numbers in the whole run, for messages; `abort`
/// is shared with the other groups of the run; a rank waits at most `timeout` for the others.
pub fn threads(ranks: &[usize], timeout: Duration, abort: &Abort) -> Vec<Arc<dyn Communicator>> {
    if ranks.len() == 1 {
        return vec![Arc::new(Single)];
    }
    let meeting = Arc::new(Meeting {
        ranks: ranks.to_vec(),
        timeout,
        abort: abort.clone(),
        state: Mutex::new(State { posts: vec![None; ranks.len()], round: 0, met: Vec::new(), broken: false }),
        turn: Condvar::new(),
    });
    (0..ranks.len()).map(|rank| Arc::new(Threads { rank, meeting: meeting.clone() }) as _).collect()
}

/// What a rank brings to a meeting.
#[derive(Clone, Copy, Debug)]
struct Post {
    what: &'static str,
    data: *mut u8,
    bytes: usize,
}

// SAFETY: the pointer is used between the meeting that it was brought to and the next one of the same collective, while
// its owner waits inside of the collective.
unsafe impl Send for Post {}

#[derive(Debug)]
struct State {
    /// Those that are there.
    posts: Vec<Option<Post>>,
    /// Counts meetings.
    round: u64,
    /// What was brought to the last meeting.
    met: Vec<Post>,
    /// A rank has left without the others: there is no meeting any more.
    broken: bool,
}

#[derive(Debug)]
struct Meeting {
    ranks: Vec<usize>,
    timeout: Duration,
    abort: Abort,
    state: Mutex<State>,
    turn: Condvar,
}

#[derive(Debug)]
struct Threads {
    rank: usize,
    meeting: Arc<Meeting>,
}

impl Threads {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.meeting.state.lock().expect("no panic inside the lock")
    }

    /// Takes the seat; true where this was the last one.
    fn arrive(&self, state: &mut State, post: Post) -> bool {
        state.posts[self.rank] = Some(post);
        let all = state.posts.iter().all(Option::is_some);
        if all {
            state.met = state.posts.iter_mut().filter_map(Option::take).collect();
            state.round += 1;
            self.meeting.turn.notify_all();
        }
        all
    }

    /// Waits until all ranks have brought their data to the same collective.
    fn meet(&self, what: &'static str, data: *mut u8, bytes: usize) -> Vec<Post> {
        let start = Instant::now();
        let mut state = self.lock();
        let round = state.round;
        if state.broken || self.meeting.abort.failure().is_some() {
            self.part(state);
        }
        if !self.arrive(&mut state, Post { what, data, bytes }) {
            while state.round == round {
                if state.broken || self.meeting.abort.failure().is_some() {
                    self.part(state);
                }
                if start.elapsed() > self.meeting.timeout {
                    let late = self.meeting.ranks.iter().zip(&state.posts);
                    let late: Vec<_> =
                        late.filter(|(_, post)| post.is_none()).map(|(rank, _)| rank.to_string()).collect();
                    let (rank, seconds) = (self.meeting.ranks[self.rank], self.meeting.timeout.as_secs_f32());
                    let message = format!(
                        "rank {rank} waited {seconds} s in {what} for rank {}, which did not come",
                        late.join(", ")
                    );
                    self.meeting.abort.raise(CommFailure { rank, message });
                    self.part(state);
                }
                state = self.meeting.turn.wait_timeout(state, LOOK).expect("no panic inside the lock").0;
            }
        }
        let met = state.met.clone();
        drop(state);
        if let Some(other) = met.iter().position(|post| (post.what, post.bytes) != (what, bytes)) {
            // All ranks see the same posts and leave before anybody's memory is touched.
            let (rank, other_rank) = (self.meeting.ranks[self.rank], self.meeting.ranks[other]);
            let Post { what: other_what, bytes: other_bytes, .. } = met[other];
            let message = format!(
                "rank {rank} is in {what} of {bytes} bytes, rank {other_rank} in {other_what} of {other_bytes}"
            );
            self.meeting.abort.raise(CommFailure { rank, message });
            self.part(self.lock());
        }
        met
    }

    /// Waits until all ranks have come as far. Between two meetings of a collective no rank waits for anything else or
    /// fails, so this wait is short, and it must not be cut short: the others are reading this rank's memory.
    fn leave(&self) {
        let mut state = self.lock();
        let round = state.round;
        if !self.arrive(&mut state, Post { what: "", data: std::ptr::null_mut(), bytes: 0 }) {
            while state.round == round {
                state = self.meeting.turn.wait(state).expect("no panic inside the lock");
            }
        }
    }

    /// Leaves without the others.
    fn part(&self, mut state: MutexGuard<'_, State>) -> ! {
        state.broken = true;
        drop(state);
        let failure = self.meeting.abort.failure().cloned();
        failure.expect("a meeting is broken after a failure is known").leave()
    }

    /// Reduces the piece of this rank into this rank's data, calls `then` with what all ranks brought, and leaves.
    fn reduce_mine<T: Number>(
        &self,
        what: &'static str,
        data: &mut [T],
        how: Reduce,
        then: impl FnOnce(&[Post]),
    ) {
        let mine = piece(data.len(), self.size(), self.rank);
        let own = data.as_mut_ptr();
        let met = self.meet(what, own.cast(), size_of_val(data));
        let source = |rank: usize, place: usize, n: usize| {
            // SAFETY: all ranks brought as many numbers of their own, which live until `leave`. Of this piece of them
            // nobody but this rank reads or writes anything before its next meeting; a block is read before it is
            // written.
            unsafe { std::slice::from_raw_parts(met[rank].data.cast::<T>().add(mine.start + place), n) }
        };
        reduce(self.size(), mine.len(), how, source, |place, sum| {
            // SAFETY: as above; `own` is what this call borrows mutably.
            T::narrow(sum, unsafe { std::slice::from_raw_parts_mut(own.add(mine.start + place), sum.len()) });
        });
        then(&met);
        self.leave();
    }

    fn all_reduce_of<T: Number>(&self, data: &mut [T], how: Reduce) {
        let len = data.len();
        let own: *mut T = data.as_mut_ptr();
        self.reduce_mine("all_reduce", data, how, |met| {
            self.leave(); // all pieces are ready
            for (rank, post) in met.iter().enumerate().filter(|(rank, _)| *rank != self.rank) {
                let piece = piece(len, met.len(), rank);
                // SAFETY: the piece of `rank` is written by nobody any more there, and here by this rank only.
                unsafe {
                    let from = post.data.cast::<T>().add(piece.start);
                    own.add(piece.start).copy_from_nonoverlapping(from, piece.len());
                }
            }
        });
    }
}

impl Communicator for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.meeting.ranks.len()
    }

    fn all_reduce(&self, data: FloatsMut<'_>, how: Reduce) {
        match data {
            FloatsMut::F32(data) => self.all_reduce_of(data, how),
            FloatsMut::Bf16(data) => self.all_reduce_of(data, how),
        }
    }

    fn reduce_scatter(&self, data: FloatsMut<'_>) {
        assert!(data.len().is_multiple_of(self.size()), "equal pieces");
        match data {
            FloatsMut::F32(data) => self.reduce_mine("reduce_scatter", data, Reduce::Sum, |_| ()),
            FloatsMut::Bf16(data) => self.reduce_mine("reduce_scatter", data, Reduce::Sum, |_| ()),
        }
    }

    fn all_gather(&self, data: &mut [u8]) {
        assert!(data.len().is_multiple_of(self.size()), "equal pieces");
        let each = data.len() / self.size();
        let own = data.as_mut_ptr();
        let met = self.meet("all_gather", own, data.len());
        for (rank, post) in met.iter().enumerate().filter(|(rank, _)| *rank != self.rank) {
            // SAFETY: as many bytes on each rank, alive until `leave`; a rank's own piece is written by nobody, the
            // others of this rank by this rank only.
            unsafe { own.add(rank * each).copy_from_nonoverlapping(post.data.add(rank * each), each) };
        }
        self.leave();
    }

    fn broadcast(&self, data: &mut [u8], root: usize) {
        let own = data.as_mut_ptr();
        let met = self.meet("broadcast", own, data.len());
        if self.rank != root {
            // SAFETY: as many bytes on each rank, alive until `leave`; those of `root` are written by nobody.
            unsafe { own.copy_from_nonoverlapping(met[root].data, data.len()) };
        }
        self.leave();
    }

    fn barrier(&self) {
        self.meet("barrier", std::ptr::null_mut(), 0);
    }
}
