//! Which of the processes this is that a launcher has started.

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
        // At the port itself torchrun's own agent listens.
        let port = if variable("TORCHELASTIC_RUN_ID").is_some() { port.wrapping_add(1) } else { port };
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
        let agent = [&torchrun[..], &[("TORCHELASTIC_RUN_ID", "none")]].concat();
        assert_eq!(place(&agent).unwrap().unwrap().port, 29501);
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
}
