//! Which of the processes this is, and whether all of them are there.
//!
//! Loading a module with collectives blocks until every rank does it, without an end and without a word. So the ranks meet
//! before, over a connection of their own: who is late is named, and so is who brings another module.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use crate::driver::{Fault, Kind};

/// A process among those that a launcher has started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its number, from 0.
    pub rank: usize,
    /// How many there are.
    pub ranks: usize,
    /// Its number on this host.
    pub local_rank: usize,
    /// How many there are on this host, where the launcher says so.
    pub local_ranks: Option<usize>,
    /// The host of rank 0.
    pub root: String,
    /// A free port there; the next one is the runtime's own.
    pub port: u16,
}

/// The port where nobody names one.
const PORT: u16 = 41_000;

/// Programs that start processes, by what they call rank, number of ranks, rank on the host, and ranks on the host.
const LAUNCHERS: [[&str; 4]; 4] = [
    ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"],
    [
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ],
    ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"],
    ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"],
];

impl Place {
    /// The place that the variables of torchrun, MPI or Slurm give; None: none of them has started this process.
    /// `variable` looks one up.
    ///
    /// # Errors
    /// A variable is missing or is no number; several hosts, and none is named as the first.
    pub fn find(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, Fault> {
        let started = LAUNCHERS.iter().find(|names| names[..3].iter().all(|name| variable(name).is_some()));
        let Some([rank, ranks, local_rank, local_ranks]) = started else { return Ok(None) };
        let number = |name: &str| {
            let value = variable(name).unwrap_or_default();
            value
                .trim()
                .parse::<usize>()
                .map_err(|_| fault(format!("{name} is {value:?}, which is no number")))
        };
        let [rank, ranks, local_rank] = [number(rank)?, number(ranks)?, number(local_rank)?];
        if rank >= ranks {
            return Err(fault(format!("rank {rank} of {ranks} ranks")));
        }
        let local_ranks = variable(local_ranks).and_then(|value| value.trim().parse().ok());
        let named =
            variable("MASTER_ADDR").or_else(|| variable("SLURM_JOB_NODELIST").map(|list| first_host(&list)));
        let root = match named {
            Some(host) => host,
            None if local_ranks == Some(ranks) => "127.0.0.1".into(),
            None => return Err(fault(format!("{ranks} ranks, and nothing says where rank 0 is"))),
        };
        let port = match variable("MASTER_PORT") {
            None => PORT,
            Some(port) => port
                .trim()
                .parse()
                .map_err(|_| fault(format!("MASTER_PORT is {port:?}, which is no port")))?,
        };
        Ok(Some(Self { rank, ranks, local_rank, local_ranks, root, port }))
    }

    /// A process alone.
    pub fn alone() -> Self {
        Self { rank: 0, ranks: 1, local_rank: 0, local_ranks: Some(1), root: "127.0.0.1".into(), port: PORT }
    }

    /// What the runtime's variables have to be, where nobody has set them: one core a process, where the ranks meet, and
    /// between hosts the network of the instances.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        let mut variables = vec![("NEURON_RT_VISIBLE_CORES", self.local_rank.to_string())];
        if self.ranks > 1 {
            let port = self.port.checked_add(1).unwrap_or(PORT + 1);
            variables.push(("NEURON_RT_ROOT_COMM_ID", format!("{}:{port}", self.root)));
        }
        if self.local_ranks.is_some_and(|local| local < self.ranks) {
            let network =
                [("FI_PROVIDER", "efa"), ("FI_EFA_USE_DEVICE_RDMA", "1"), ("FI_EFA_FORK_SAFE", "1")];
            variables.extend(network.map(|(name, value)| (name, value.to_owned())));
        }
        variables
    }
}

fn fault(message: String) -> Fault {
    let hint = "start elapid with torchrun, srun or mpirun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT";
    Fault::new(Kind::Ranks, message, hint)
}

/// The first of Slurm's list of hosts: `a[03-05,7],b` → `a03`.
fn first_host(list: &str) -> String {
    match list.find(['[', ',']) {
        Some(at) if list[at..].starts_with('[') => {
            let inside = &list[at + 1..];
            let first = &inside[..inside.find(['-', ',', ']']).unwrap_or(inside.len())];
            format!("{}{first}", &list[..at])
        }
        Some(at) => list[..at].to_owned(),
        None => list.to_owned(),
    }
}

/// The connections between rank 0 and the others.
#[derive(Debug)]
pub(super) enum Meeting {
    /// One rank needs none.
    Alone,
    /// Rank 0, with the others by number, from 1 on.
    Root(Vec<TcpStream>),
    /// Another rank, with its connection to rank 0.
    Other(TcpStream),
}

/// What rank 0 answers.
const GO: u8 = 1;

impl Meeting {
    /// Brings the ranks together.
    ///
    /// # Errors
    /// Not all are there in time: those missing are named.
    pub(super) fn start(place: &Place, timeout: Duration) -> Result<Self, Fault> {
        let end = Instant::now() + timeout;
        match place.rank {
            _ if place.ranks == 1 => Ok(Self::Alone),
            0 => Self::wait(place, timeout, end),
            rank => Self::join(place, rank, timeout, end),
        }
    }

    fn wait(place: &Place, timeout: Duration, end: Instant) -> Result<Self, Fault> {
        let cannot = |cause: std::io::Error| {
            let why = format!("rank 0 cannot listen on port {}: {cause}", place.port);
            Fault::new(Kind::Ranks, why, "set MASTER_PORT to a free port on the first host")
        };
        let listener = TcpListener::bind(("0.0.0.0", place.port)).map_err(cannot)?;
        listener.set_nonblocking(true).map_err(cannot)?;
        let mut others: Vec<Option<TcpStream>> = (1..place.ranks).map(|_| None).collect();
        while others.iter().any(Option::is_none) {
            if Instant::now() > end {
                let missing = (1..).zip(&others).filter(|(_, other)| other.is_none()).map(|(rank, _)| rank);
                return Err(late(missing.collect(), place.ranks, timeout));
            }
            let Ok((mut stream, _)) = listener.accept() else {
                std::thread::sleep(Duration::from_millis(20));
                continue;
            };
            let mut rank = [0; 4];
            // Who is no rank of ours, or says nothing, is passed over.
            let told = stream
                .set_nonblocking(false)
                .and_then(|()| stream.set_read_timeout(Some(Duration::from_secs(5))))
                .and_then(|()| stream.read_exact(&mut rank));
            let rank = u32::from_le_bytes(rank) as usize;
            if let (Ok(()), Some(other @ None)) = (told, rank.checked_sub(1).and_then(|i| others.get_mut(i)))
            {
                *other = Some(stream);
            }
        }
        Ok(Self::Root(others.into_iter().flatten().collect()))
    }

    fn join(place: &Place, rank: usize, timeout: Duration, end: Instant) -> Result<Self, Fault> {
        loop {
            let addresses = (place.root.as_str(), place.port).to_socket_addrs().into_iter().flatten();
            for address in addresses {
                if let Ok(mut stream) = TcpStream::connect_timeout(&address, Duration::from_secs(2))
                    && stream.write_all(&(rank as u32).to_le_bytes()).is_ok()
                {
                    return Ok(Self::Other(stream));
                }
            }
            if Instant::now() > end {
                let why =
                    format!("rank {rank} has waited {timeout:?} for rank 0 at {}:{}", place.root, place.port);
                return Err(Fault::new(
                    Kind::Ranks,
                    why,
                    "does rank 0 run, and does MASTER_ADDR name its host?",
                ));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Returns when all ranks have come with the same `key`, which stands for what they are about to do.
    ///
    /// # Errors
    /// One is late, gone, or has another key: it is named, on every rank that is there.
    pub(super) fn agree(&mut self, what: &str, key: &[u8; 16], timeout: Duration) -> Result<(), Fault> {
        let (limit, gone) = (Some(timeout), |rank: usize, cause: &std::io::Error| match cause.kind() {
            std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => {
                format!("rank {rank} has not come in {timeout:?} to {what}")
            }
            _ => format!("rank {rank} is gone: it did not come to {what}"),
        });
        let failed = |why: String| {
            Fault::new(
                Kind::Ranks,
                why,
                "look at that rank's output; --comm-timeout says how long to wait for it",
            )
        };
        match self {
            Self::Alone => Ok(()),
            Self::Root(others) => {
                let mut why = None;
                for (rank, stream) in (1..).zip(others.iter_mut()) {
                    let mut theirs = [0; 16];
                    let read = stream.set_read_timeout(limit).and_then(|()| stream.read_exact(&mut theirs));
                    let fault = match read {
                        Err(cause) => Some(gone(rank, &cause)),
                        Ok(()) if theirs != *key => {
                            Some(format!("rank {rank} and rank 0 do not have the same module to {what}"))
                        }
                        Ok(()) => None,
                    };
                    why = why.or(fault);
                }
                for stream in others.iter_mut() {
                    let text = why.as_deref().unwrap_or_default().as_bytes();
                    let mut answer = vec![if why.is_none() { GO } else { 0 }];
                    answer.extend((text.len() as u32).to_le_bytes());
                    answer.extend(text);
                    let _ = stream.write_all(&answer);
                }
                why.map_or(Ok(()), |why| Err(failed(why)))
            }
            Self::Other(stream) => {
                let mut talk = || {
                    stream.write_all(key)?;
                    // Rank 0 may itself wait that long for the last.
                    stream.set_read_timeout(limit.map(|limit| 2 * limit))?;
                    let mut head = [0; 5];
                    stream.read_exact(&mut head)?;
                    let size = u32::from_le_bytes([head[1], head[2], head[3], head[4]]);
                    let mut text = vec![0; size.min(1 << 16) as usize];
                    stream.read_exact(&mut text)?;
                    Ok((head[0] == GO, String::from_utf8_lossy(&text).into_owned()))
                };
                match talk() {
                    Err(cause) => Err(failed(gone(0, &cause))),
                    Ok((true, _)) => Ok(()),
                    Ok((false, why)) => Err(failed(why)),
                }
            }
        }
    }
}

fn late(missing: Vec<usize>, ranks: usize, timeout: Duration) -> Fault {
    let numbers: Vec<String> = missing.iter().map(usize::to_string).collect();
    let who = if numbers.len() == 1 { "rank" } else { "ranks" };
    Fault::new(
        Kind::Ranks,
        format!("{who} {} of {ranks} did not come in {timeout:?}", numbers.join(", ")),
        "look at their output; can their hosts reach this one? --comm-timeout says how long to wait",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(variables: &[(&str, &str)]) -> Result<Option<Place>, Fault> {
        Place::find(|name| variables.iter().find(|v| v.0 == name).map(|v| v.1.to_owned()))
    }

    #[test]
    fn launchers_say_who_one_is() {
        assert_eq!(place(&[("RANK", "1")]).unwrap(), None);
        let torchrun = [
            ("RANK", "33"),
            ("WORLD_SIZE", "64"),
            ("LOCAL_RANK", "1"),
            ("LOCAL_WORLD_SIZE", "32"),
            ("MASTER_ADDR", "10.0.0.7"),
            ("MASTER_PORT", "29500"),
        ];
        let found = place(&torchrun).unwrap().unwrap();
        assert_eq!((found.rank, found.ranks, found.local_rank, found.port), (33, 64, 1, 29500));
        let environment = found.environment();
        for expected in [
            ("NEURON_RT_VISIBLE_CORES", "1"),
            ("NEURON_RT_ROOT_COMM_ID", "10.0.0.7:29501"),
            ("FI_PROVIDER", "efa"),
            ("FI_EFA_USE_DEVICE_RDMA", "1"),
        ] {
            assert!(environment.contains(&(expected.0, expected.1.to_owned())), "{environment:?}");
        }
        let slurm = [
            ("SLURM_PROCID", "2"),
            ("SLURM_NTASKS", "4"),
            ("SLURM_LOCALID", "0"),
            ("SLURM_JOB_NODELIST", "queue-[03-05,9],other"),
        ];
        assert_eq!(place(&slurm).unwrap().unwrap().root, "queue-03");
        let mpi = [
            ("OMPI_COMM_WORLD_RANK", "0"),
            ("OMPI_COMM_WORLD_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "0"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
        ];
        let found = place(&mpi).unwrap().unwrap();
        assert_eq!(found.root, "127.0.0.1");
        assert!(!found.environment().iter().any(|(name, _)| name.starts_with("FI_")));
        let fault = place(&[&mpi[..3], &[("OMPI_COMM_WORLD_LOCAL_SIZE", "1")]].concat()).unwrap_err();
        assert!(fault.hint.contains("MASTER_ADDR"), "{fault}");
        assert!(place(&[("RANK", "x"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")]).is_err());
        assert!(place(&[("RANK", "2"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")]).is_err());
    }

    #[test]
    fn the_first_host_of_a_list() {
        for (list, first) in
            [("a", "a"), ("a,b", "a"), ("n[1-4]", "n1"), ("n[07,9]", "n07"), ("x-1,n[2-3]", "x-1")]
        {
            assert_eq!(first_host(list), first);
        }
    }

    fn port() -> u16 {
        TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
    }

    fn each(
        present: &[usize],
        ranks: usize,
        f: impl Fn(&mut Meeting, usize) -> Result<(), Fault> + Sync,
    ) -> Vec<Result<(), Fault>> {
        let (port, f) = (port(), &f);
        std::thread::scope(|scope| {
            let threads: Vec<_> = present
                .iter()
                .map(|&rank| {
                    scope.spawn(move || {
                        let place = Place { rank, ranks, port, ..Place::alone() };
                        let mut meeting = Meeting::start(&place, Duration::from_secs(2))?;
                        f(&mut meeting, rank)
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    const SOON: Duration = Duration::from_millis(500);

    #[test]
    fn all_ranks_meet_again_and_again() {
        let ends = each(&[0, 1, 2], 3, |meeting, _| {
            (0..3).try_for_each(|round| meeting.agree("load", &[round; 16], SOON))
        });
        assert!(ends.iter().all(Result::is_ok), "{ends:?}");
    }

    #[test]
    fn a_rank_that_never_arrives_is_named() {
        let ends = each(&[0, 1, 3], 4, |_, _| Ok(()));
        assert!(ends[0].as_ref().unwrap_err().to_string().contains("rank 2 of 4 did not come"), "{ends:?}");
    }

    #[test]
    fn a_rank_that_is_gone_or_different_is_named_on_all() {
        let ends = each(&[0, 1, 2], 3, |meeting, rank| match rank {
            2 => Ok(()),
            _ => meeting.agree("load update", &[0; 16], SOON),
        });
        for end in &ends[..2] {
            assert!(end.as_ref().unwrap_err().to_string().contains("rank 2 is gone"), "{ends:?}");
        }
        let ends = each(&[0, 1, 2], 3, |meeting, rank| {
            meeting.agree("load update", &[u8::from(rank == 1); 16], SOON)
        });
        for end in &ends {
            assert!(
                end.as_ref().unwrap_err().to_string().contains("rank 1 and rank 0 do not have the same"),
                "{ends:?}"
            );
        }
    }

    #[test]
    fn a_rank_that_is_late_is_named() {
        let ends = each(&[0, 1], 2, |meeting, rank| match rank {
            0 => meeting.agree("load eval", &[0; 16], SOON),
            _ => {
                std::thread::sleep(3 * SOON);
                Ok(())
            }
        });
        assert!(ends[0].as_ref().unwrap_err().to_string().contains("rank 1 has not come"), "{ends:?}");
    }
}
