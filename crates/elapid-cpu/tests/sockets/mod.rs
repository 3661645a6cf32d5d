//! Ranks that sockets connect, as threads.

use std::net::TcpListener;
use std::time::Duration;

use elapid_cpu::comm::CommFailure;
use elapid_cpu::comm::sockets::{Place, World};

/// A port that is free now.
pub(crate) fn port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// What the ranks come to that are `present`, of `ranks`.
pub(crate) fn meet(present: &[usize], ranks: usize, timeout: Duration) -> Vec<Result<World, CommFailure>> {
    let port = port();
    std::thread::scope(|scope| {
        let meet = |&rank: &usize| {
            let place = Place { rank, ranks, root: "localhost".into(), port };
            scope.spawn(move || World::meet(place, timeout))
        };
        let threads: Vec<_> = present.iter().map(meet).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// All of `ranks`.
pub(crate) fn worlds(ranks: usize, timeout: Duration) -> Vec<Result<World, CommFailure>> {
    meet(&(0..ranks).collect::<Vec<_>>(), ranks, timeout)
}
