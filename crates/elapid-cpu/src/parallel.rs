//! Work in pieces. What several pieces contribute to one number is summed in the order of the pieces, which then depend on the problem
//! alone; where pieces depend on the number of threads, no sum goes over them. So results are the same bits on any machine size.

mod workers;

use std::marker::PhantomData;

pub(crate) use workers::Workers;

/// Rows of one piece of row-wise work.
pub(crate) const ROWS: usize = 16;

impl Workers {
    /// Calls `f(first item, chunk)` for the chunks of `chunk` items of `data`, `width` numbers an item.
    pub(crate) fn rows<T: Send>(
        &self,
        data: &mut [T],
        width: usize,
        chunk: usize,
        f: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let shared = Shared::new(data);
        let items = shared.len / width.max(1);
        self.each(items.div_ceil(chunk), |piece| {
            let first = piece * chunk;
            let last = items.min(first + chunk);
            // SAFETY: pieces cover disjoint ranges of items.
            f(first, unsafe { shared.slice(first * width, (last - first) * width) });
        });
    }
}

/// A mutable slice that several pieces write at disjoint places.
pub(crate) struct Shared<'a, T> {
    data: *mut T,
    len: usize,
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: access goes through `slice` and `pointer`, whose callers promise disjoint places.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(crate) fn new(data: &'a mut [T]) -> Self {
        Self { data: data.as_mut_ptr(), len: data.len(), owner: PhantomData }
    }

    /// `len` numbers from `from` on.
    ///
    /// # Safety
    /// No other piece may touch this range while the slice lives.
    #[allow(clippy::mut_from_ref)]
    #[inline(always)]
    pub(crate) unsafe fn slice(&self, from: usize, len: usize) -> &mut [T] {
        assert!(from <= self.len && len <= self.len - from);
        // SAFETY: inside the borrowed slice (checked); unique by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(from), len) }
    }

    /// Pointer to the number `from`, of which `len` may be touched.
    pub(crate) fn pointer(&self, from: usize, len: usize) -> *mut T {
        assert!(from <= self.len && len <= self.len - from);
        self.data.wrapping_add(from)
    }
}
