//! Blocks of memory that go back to a pool when they are dropped.
//!
//! A training step asks for the same sizes again and again. Fresh memory from the system costs a page fault every
//! 4 KiB, about as much as filling it, so blocks are kept and handed out again, with whatever they hold.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};

use half::bf16;

/// One cache line: the unit and the alignment of a block.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Plain numbers of which every bit pattern is a value.
///
/// # Safety
/// The type must have no padding, no invalid bit pattern, an alignment of at most 64, and a size that divides 64.
pub unsafe trait Plain: Copy {}
// SAFETY: a float of 4 bytes.
unsafe impl Plain for f32 {}
// SAFETY: a float of 4 bytes in an integer.
unsafe impl Plain for i32 {}
// SAFETY: an integer of 8 bytes.
unsafe impl Plain for u64 {}
// SAFETY: `repr(transparent)` over u16.
unsafe impl Plain for bf16 {}

/// Lines that hold `len` numbers. Divides, since the product of a length and a size could wrap around and then pass
/// for small.
fn lines_of<T: Plain>(len: usize) -> usize {
    len.div_ceil(size_of::<Line>() / size_of::<T>())
}

/// Memory of a tensor or of scratch.
pub(crate) struct Block {
    lines: Vec<Line>,
    home: Weak<Pool>,
}

impl Block {
    /// The first `len` numbers.
    #[inline(always)]
    pub(crate) fn as_slice<T: Plain>(&self, len: usize) -> &[T] {
        assert!(lines_of::<T>(len) <= self.lines.len());
        // SAFETY: the lines are initialised bytes, long enough (checked) and aligned for any `Plain`.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), len) }
    }

    /// The first `len` numbers, to write.
    pub(crate) fn as_mut_slice<T: Plain>(&mut self, len: usize) -> &mut [T] {
        assert!(lines_of::<T>(len) <= self.lines.len());
        // SAFETY: as in `as_slice`; the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), len) }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if let Some(pool) = self.home.upgrade() {
            pool.give_back(std::mem::take(&mut self.lines));
        }
    }
}

#[derive(Default)]
struct Free {
    by_lines: HashMap<usize, Vec<Vec<Line>>>,
    lines: usize,
}

/// Free blocks by size.
pub(crate) struct Pool {
    free: Mutex<Free>,
    /// Fill every block with NaN before it is handed out: finds kernels that read what they never wrote.
    poison: bool,
}

/// More than this in free blocks (1 GiB) that do not fit a request is returned to the system.
const MAX_IDLE_LINES: usize = 1 << 24;

impl Pool {
    pub(crate) fn new(poison: bool) -> Arc<Self> {
        Arc::new(Self { free: Mutex::new(Free::default()), poison })
    }

    /// A block for `len` numbers that holds anything.
    pub(crate) fn take<T: Plain>(self: &Arc<Self>, len: usize) -> Block {
        let count = lines_of::<T>(len);
        let found = {
            let mut free = self.free.lock().expect("no panic inside the lock");
            let found = free.by_lines.get_mut(&count).and_then(Vec::pop);
            match found {
                Some(_) => free.lines -= count,
                None if free.lines > MAX_IDLE_LINES => *free = Free::default(),
                None => {}
            }
            found
        };
        let mut lines = found.unwrap_or_else(|| vec![Line([0; 64]); count]);
        if self.poison {
            lines.fill(Line([0xff; 64])); // NaN in f32 and in bf16
        }
        Block { lines, home: Arc::downgrade(self) }
    }

    /// A block of zeros.
    pub(crate) fn zeros<T: Plain>(self: &Arc<Self>, len: usize) -> Block {
        let mut block = self.take::<T>(len);
        block.lines.fill(Line([0; 64]));
        block
    }

    /// Bytes of all free blocks.
    #[cfg(test)]
    pub(crate) fn idle_bytes(&self) -> usize {
        self.free.lock().expect("no panic inside the lock").lines * size_of::<Line>()
    }

    fn give_back(&self, lines: Vec<Line>) {
        let mut free = self.free.lock().expect("no panic inside the lock");
        free.lines += lines.len();
        free.by_lines.entry(lines.len()).or_default().push(lines);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_as_long_as_asked_for() {
        let pool = Pool::new(true);
        for len in [0, 1, 16, 17, 33] {
            let mut block = pool.take::<f32>(len);
            assert!(block.as_mut_slice::<f32>(len).iter().all(|x| x.is_nan()));
            assert!(block.as_slice::<bf16>(2 * len).iter().all(|x| x.is_nan()));
        }
        assert!(pool.zeros::<i32>(5).as_slice::<i32>(5).iter().all(|&x| x == 0));
    }

    #[test]
    #[should_panic(expected = "assertion failed")]
    fn t23_no_slice_is_longer_than_its_block() {
        // Four times this length is 0 in 64 bits.
        Pool::new(false).take::<f32>(1).as_slice::<f32>(1 << 62);
    }
}
