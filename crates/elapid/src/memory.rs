//! What memory there is, and refusing what cannot fit before the allocator aborts the process for it.

use sysinfo::System;

use crate::Error;

/// Checks that `bytes` for `what` are no more than this machine, or the container that it runs in, has in all, swap
/// included. What is free at the moment is not asked: it changes.
///
/// # Errors
/// Both numbers, with `hint`.
pub(crate) fn check(bytes: f64, what: &str, hint: &str) -> Result<(), Error> {
    let mut system = System::new();
    system.refresh_memory();
    let machine = system.total_memory() + system.total_swap();
    let limit = system.cgroup_limits().map_or(machine, |limits| machine.min(limits.total_memory));
    // A system that does not tell is not refused anything.
    if limit == 0 || bytes <= limit as f64 {
        return Ok(());
    }
    let message = format!(
        "{what} need at least {:.1} GB of memory, but there are {:.1} GB in all",
        bytes / 1e9,
        limit as f64 / 1e9
    );
    Err(Error::new(message).with_hint(hint))
}

/// Bytes that this process can still have without swapping: what the machine has available, and no more than its
/// container may have in all. None where the system does not say.
pub(crate) fn available() -> Option<u64> {
    let mut system = System::new();
    system.refresh_memory();
    let machine = system.available_memory();
    let limit = system.cgroup_limits().map_or(machine, |limits| machine.min(limits.total_memory));
    (limit > 0).then_some(limit)
}
