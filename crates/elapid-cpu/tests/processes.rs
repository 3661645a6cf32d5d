//! Ranks that sockets connect: their groups, and how they end when one is missing, gone or different. `comm.rs` has their
//! collectives.

mod sockets;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use elapid_cpu::comm::sockets::World;
use elapid_cpu::comm::{CommFailure, FloatsMut, Reduce};
use sockets::{meet, worlds};

/// Runs `f` on three ranks; how each ended. One that fails tells the others.
fn endings(
    timeout: Duration,
    f: impl Fn(&World) -> Result<(), CommFailure> + Sync,
) -> Vec<Option<CommFailure>> {
    let f = &f;
    std::thread::scope(|scope| {
        let run = |world: World| {
            scope.spawn(move || {
                let end = catch_unwind(AssertUnwindSafe(|| f(&world)));
                let failure = end.unwrap_or_else(|payload| Err(*payload.downcast().unwrap())).err();
                failure.iter().for_each(|failure| world.leave(failure));
                failure
            })
        };
        let threads: Vec<_> = worlds(3, timeout).into_iter().map(|world| run(world.unwrap())).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn message(end: &Option<CommFailure>) -> &str {
    end.as_ref().map_or("", |failure| &failure.message)
}

#[test]
fn groups_of_a_mesh() {
    let worlds = worlds(6, Duration::from_secs(60));
    std::thread::scope(|scope| {
        for world in worlds {
            scope.spawn(move || {
                let world = world.unwrap();
                let rank = world.place().rank;
                // Columns of three and rows of two, which some ranks make while others still make the columns.
                let column: Vec<_> = (rank % 2..6).step_by(2).collect();
                let row = [rank / 2 * 2, rank / 2 * 2 + 1];
                let (columns, rows) = (world.group(&column, 1).unwrap(), world.group(&row, 2).unwrap());
                for group in [(&columns, &column[..]), (&rows, &row[..])] {
                    let (group, ranks) = group;
                    assert_eq!((ranks[group.rank()], group.size()), (rank, ranks.len()));
                    // More than a socket holds at once, in both directions.
                    let mut data = vec![rank as f32; 1 << 20];
                    group.all_reduce(FloatsMut::F32(&mut data), Reduce::Sum);
                    assert!(data.iter().all(|sum| *sum == ranks.iter().sum::<usize>() as f32));
                }
                assert_eq!(world.group(&[rank], 3).unwrap().size(), 1);
            });
        }
    });
}

#[test]
fn a_rank_that_never_arrives_is_named() {
    let ends = meet(&[0, 1, 3], 4, Duration::from_millis(500));
    let message = |at: usize| ends[at].as_ref().err().unwrap().message.clone();
    assert_eq!(message(0), "rank 2 of 4 did not come in 0.5 s");
    assert_eq!(message(1), "rank 0 is gone before all ranks had come");
    let ends = meet(&[1], 2, Duration::from_millis(300));
    assert!(
        ends[0].as_ref().err().unwrap().message.contains("rank 1 has waited 0.3 s for rank 0 at localhost:")
    );
}

#[test]
fn what_is_no_rank_of_the_run_is_passed_over() {
    let port = sockets::port();
    let place =
        |rank, ranks| elapid_cpu::comm::sockets::Place { rank, ranks, root: "127.0.0.1".into(), port };
    let timeout = Duration::from_secs(20);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| World::meet(place(0, 2), timeout));
        let stranger = loop {
            match std::net::TcpStream::connect(("127.0.0.1", port)) {
                Ok(stream) => break stream,
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        std::io::Write::write_all(&mut &stranger, &[7; 16]).unwrap();
        World::meet(place(1, 2), timeout).unwrap();
        first.join().unwrap().unwrap();
    });
    // One that counts otherwise is told.
    std::thread::scope(|scope| {
        let first = scope.spawn(|| World::meet(place(0, 2), timeout));
        let other = scope.spawn(|| World::meet(place(1, 3), timeout));
        let why = first.join().unwrap().err().unwrap();
        assert_eq!(why.message, "rank 1 counts 3 ranks, and rank 0 counts 2");
        assert!(other.join().unwrap().is_err());
    });
}

#[test]
fn a_rank_that_is_late_is_named() {
    let start = Instant::now();
    let ends = endings(Duration::from_millis(400), |world| {
        match world.place().rank {
            1 => std::thread::sleep(Duration::from_secs(2)),
            _ => world.all().barrier(),
        }
        Ok(())
    });
    for rank in [0, 2] {
        assert!(message(&ends[rank]).contains("in barrier for rank 1, which did not come"), "{ends:?}");
    }
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_rank_that_fails_says_why() {
    let ends = endings(Duration::from_secs(600), |world| {
        world.all().barrier();
        if world.place().rank == 1 {
            return Err(CommFailure { rank: 1, message: "rank 1: the disk is full".into() });
        }
        world.all().all_gather(&mut [0; 30]);
        Ok(())
    });
    assert!(ends.iter().all(|end| message(end) == "rank 1: the disk is full"), "{ends:?}");
}

#[test]
fn a_rank_that_is_gone_is_named_on_all() {
    let ends = endings(Duration::from_secs(600), |world| {
        world.all().barrier();
        if world.place().rank != 2 {
            world.all().broadcast(&mut [0; 8], 0);
        }
        Ok(())
    });
    for end in &ends[..2] {
        assert_eq!(message(end), "rank 2 is gone", "{ends:?}");
    }
    // Also where it is noticed between collectives.
    let ends = endings(Duration::from_secs(600), |world| {
        if world.place().rank == 2 {
            return Ok(());
        }
        loop {
            if let Some(failure) = world.fate_of_others() {
                return Err(failure);
            }
        }
    });
    assert_eq!((message(&ends[0]), message(&ends[1])), ("rank 2 is gone", "rank 2 is gone"));
}

/// One that has come to its end is not missed; one that has not is, also by a rank that is not in a collective.
#[test]
fn who_watches_knows_of_lost_ranks_only() {
    let mut ranks = worlds(3, Duration::from_secs(20)).into_iter().map(Result::unwrap);
    let (first, second, third) = (ranks.next().unwrap(), ranks.next().unwrap(), ranks.next().unwrap());
    let lost = |world: &World| {
        std::thread::sleep(Duration::from_millis(200));
        world.lost().map(|failure| failure.message)
    };
    assert_eq!((lost(&first), lost(&second)), (None, None));
    second.finish();
    drop(second);
    assert_eq!(lost(&first), None);
    third.leave(&CommFailure { rank: 2, message: "rank 2: no memory".into() });
    assert_eq!(lost(&first).as_deref(), Some("rank 2: no memory"));
    assert_eq!(lost(&third), None);
    drop(first);
    assert_eq!(lost(&third).as_deref(), Some("rank 0 is gone"));
}

#[test]
fn ranks_that_disagree_are_told() {
    let ends = endings(Duration::from_secs(600), |world| {
        match world.place().rank {
            0 => world.all().broadcast(&mut [0; 8], 0),
            _ => world.all().all_gather(&mut [0; 12]),
        }
        Ok(())
    });
    for end in &ends {
        assert!(message(end).contains("broadcast") && message(end).contains("all_gather"), "{ends:?}");
    }
}
