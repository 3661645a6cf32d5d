//! Blocks of memory that go back to a pool when they are dropped.
//!
//! A training step asks for the same sizes again and again. Fresh memory from the system costs a page fault every
//! 4 KiB, about as much as filling it, so blocks are kept and handed out again, with whatever they hold. Large ones are
//! mapped by themselves: the threads that write them find their pages, side by side, and in pages of 2 MiB where the
//! system has them. (Those that are asked for as zeros are filled by one thread.)

use std::alloc::{Layout, handle_alloc_error};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};

use half::bf16;
use memmap2::MmapMut;

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

/// So many lines (1 MiB) are mapped by themselves.
const MAPPED_LINES: usize = 1 << 14;

/// Lines in memory.
enum Memory {
    Heap(Vec<Line>),
    Mapped(MmapMut),
}

impl Memory {
    /// Lines of zeros.
    fn new(lines: usize) -> Self {
        if lines < MAPPED_LINES {
            return Memory::Heap(vec![Line([0; 64]); lines]);
        }
        let layout = Layout::array::<Line>(lines).expect("no block is longer than the address space");
        let map = MmapMut::map_anon(layout.size()).unwrap_or_else(|_| handle_alloc_error(layout));
        #[cfg(target_os = "linux")]
        // A wish: a system without large pages has small ones.
        let _ = map.advise(memmap2::Advice::HugePage);
        Memory::Mapped(map)
    }

    #[inline(always)]
    fn lines(&self) -> usize {
        match self {
            Memory::Heap(lines) => lines.len(),
            Memory::Mapped(map) => map.len() / size_of::<Line>(),
        }
    }

    #[inline(always)]
    fn as_ptr(&self) -> *const u8 {
        match self {
            Memory::Heap(lines) => lines.as_ptr().cast(),
            Memory::Mapped(map) => map.as_ptr(),
        }
    }

    #[inline(always)]
    fn as_mut_ptr(&mut self) -> *mut u8 {
        match self {
            Memory::Heap(lines) => lines.as_mut_ptr().cast(),
            Memory::Mapped(map) => map.as_mut_ptr(),
        }
    }

    fn fill(&mut self, byte: u8) {
        match self {
            Memory::Heap(lines) => lines.fill(Line([byte; 64])),
            Memory::Mapped(map) => map.fill(byte),
        }
    }
}

/// Memory of a tensor or of scratch.
pub(crate) struct Block {
    memory: Memory,
    home: Weak<Pool>,
}

impl Block {
    /// The first `len` numbers.
    #[inline(always)]
    pub(crate) fn as_slice<T: Plain>(&self, len: usize) -> &[T] {
        assert!(lines_of::<T>(len) <= self.memory.lines());
        // SAFETY: the lines are initialised bytes, long enough (checked) and aligned for any `Plain`, on the heap as `Line`s and
        // mapped at the start of a page.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr().cast(), len) }
    }

    /// The first `len` numbers, to write.
    pub(crate) fn as_mut_slice<T: Plain>(&mut self, len: usize) -> &mut [T] {
        assert!(lines_of::<T>(len) <= self.memory.lines());
        // SAFETY: as in `as_slice`; the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_mut_ptr().cast(), len) }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if let Some(pool) = self.home.upgrade() {
            pool.give_back(std::mem::replace(&mut self.memory, Memory::Heap(Vec::new())));
        }
    }
}

/// Free blocks by size, and lines counted.
#[derive(Default)]
struct Books {
    free: HashMap<usize, Vec<Memory>>,
    /// In free blocks.
    idle: usize,
    /// In blocks that are in use.
    live: usize,
    /// The most that were ever in use at once.
    peak: usize,
}

/// See the module's text.
pub(crate) struct Pool {
    books: Mutex<Books>,
    /// Fill every block with NaN before it is handed out: finds kernels that read what they never wrote.
    poison: bool,
}

/// What the pool may hold beyond the most that was ever in use at once (1 GiB). Where a request that no free block fits would
/// take it further, all free blocks are returned to the system. A fixed limit on free blocks would do so in every step of a
/// model whose blocks come to more, and each step would find all its memory anew.
const MAX_SPARE_LINES: usize = 1 << 24;

impl Pool {
    pub(crate) fn new(poison: bool) -> Arc<Self> {
        Arc::new(Self { books: Mutex::new(Books::default()), poison })
    }

    /// A block for `len` numbers that holds anything.
    pub(crate) fn take<T: Plain>(self: &Arc<Self>, len: usize) -> Block {
        let count = lines_of::<T>(len);
        let found = {
            let mut books = self.books.lock().expect("no panic inside the lock");
            books.live += count;
            books.peak = books.peak.max(books.live);
            let found = books.free.get_mut(&count).and_then(Vec::pop);
            if found.is_some() {
                books.idle -= count;
            } else if books.live + books.idle > books.peak + MAX_SPARE_LINES {
                books.free.clear();
                books.idle = 0;
            }
            found
        };
        let mut memory = found.unwrap_or_else(|| Memory::new(count));
        if self.poison {
            memory.fill(0xff); // NaN in f32 and in bf16
        }
        Block { memory, home: Arc::downgrade(self) }
    }

    /// A block of zeros.
    pub(crate) fn zeros<T: Plain>(self: &Arc<Self>, len: usize) -> Block {
        let mut block = self.take::<T>(len);
        block.memory.fill(0);
        block
    }

    /// Bytes of all free blocks.
    #[cfg(test)]
    pub(crate) fn idle_bytes(&self) -> usize {
        self.books.lock().expect("no panic inside the lock").idle * size_of::<Line>()
    }

    fn give_back(&self, memory: Memory) {
        let mut books = self.books.lock().expect("no panic inside the lock");
        let lines = memory.lines();
        books.live -= lines;
        books.idle += lines;
        books.free.entry(lines).or_default().push(memory);
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
    fn mapped_blocks_are_as_those_of_the_heap() {
        let pool = Pool::new(true);
        for len in [1 << 18, (1 << 18) + 1, 5 << 18] {
            let mut block = pool.take::<f32>(len);
            assert!(matches!(block.memory, Memory::Mapped(_)));
            assert!(block.as_slice::<f32>(len).iter().all(|x| x.is_nan()));
            block.as_mut_slice::<f32>(len)[len - 1] = 1.0;
            drop(block);
            assert!(pool.zeros::<f32>(len).as_slice::<f32>(len).iter().all(|&x| x == 0.0));
        }
        assert_eq!(pool.idle_bytes(), (1 << 20) + (1 << 20) + 64 + (5 << 20));
    }

    /// Blocks of 2 GiB in all, which nobody writes: so they are promised by the system, and never there.
    #[test]
    fn what_was_in_use_at_once_is_kept() {
        let pool = Pool::new(false);
        let gibi = 1 << 28; // fp32 numbers
        for _ in 0..2 {
            drop([pool.take::<f32>(gibi), pool.take::<f32>(gibi - 16)]);
            // A size that was never there, once.
            pool.take::<f32>(16);
            assert_eq!(pool.idle_bytes(), 2 << 30);
        }
        // In use at once were 2 GiB less a line; with 1 GiB more the limit is reached, and one line less fits.
        let spare = pool.take::<f32>(gibi - 32);
        assert_eq!(pool.idle_bytes(), 2 << 30);
        let one_more = pool.take::<f32>(32);
        assert_eq!(pool.idle_bytes(), 0);
        drop((spare, one_more));
        assert_eq!(pool.idle_bytes(), 1 << 30);
    }

    #[test]
    #[should_panic(expected = "assertion failed")]
    fn t23_no_slice_is_longer_than_its_block() {
        // Four times this length is 0 in 64 bits.
        Pool::new(false).take::<f32>(1).as_slice::<f32>(1 << 62);
    }
}
