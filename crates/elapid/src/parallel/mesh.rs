//! How the ranks of a run are arranged.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::Error;

/// A grid of ranks: `dp` rows, which share the samples of a step, of `tp` ranks, which share the model's tensors.
/// Neighbours in number are neighbours in tensor parallelism, which has the most to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mesh {
    /// Data-parallel ranks.
    pub dp: usize,
    /// Tensor-parallel ranks.
    pub tp: usize,
}

/// Most ranks of one run: far beyond any machine, and small enough that no product of counts overflows.
pub const MAX_RANKS: usize = 1 << 16;

impl Mesh {
    /// One rank.
    pub const SINGLE: Self = Self { dp: 1, tp: 1 };

    /// The mesh that `--tp` and `--dp` ask for, where `world` ranks were started (None: as many as are needed will be).
    ///
    /// # Errors
    /// A count of 0, or one that does not make up the world.
    pub fn new(tp: usize, dp: Option<usize>, world: Option<usize>) -> Result<Self, Error> {
        for (flag, count) in [("--tp", tp), ("--dp", dp.unwrap_or(1))] {
            if count == 0 || count > MAX_RANKS {
                return Err(
                    Error::new(format!("{flag} is {count}")).with_hint("give a count of ranks, from 1 on")
                );
            }
        }
        let dp = match (dp, world) {
            (Some(dp), _) => dp,
            (None, None) => 1,
            (None, Some(world)) => {
                if !world.is_multiple_of(tp) {
                    return Err(Error::new(format!("--tp is {tp}, but {world} ranks were started"))
                        .with_hint("start a multiple of --tp ranks"));
                }
                world / tp
            }
        };
        let mesh = Self { dp, tp };
        match world {
            Some(world) if mesh.size() != world => Err(Error::new(format!(
                "--tp {tp} times --dp {dp} makes {} ranks, but {world} were started",
                mesh.size()
            ))
            .with_hint("leave --dp out, or start that many ranks")),
            _ if mesh.size() > MAX_RANKS => {
                Err(Error::new(format!("--tp {tp} times --dp {dp} ranks are too many"))
                    .with_hint(format!("there can be {MAX_RANKS} at most")))
            }
            _ => Ok(mesh),
        }
    }

    /// Number of ranks.
    pub fn size(self) -> usize {
        self.dp * self.tp
    }

    /// (data-parallel, tensor-parallel) coordinates of a rank.
    pub fn place(self, rank: usize) -> (usize, usize) {
        (rank / self.tp, rank % self.tp)
    }

    /// The ranks that share tensors with `rank`.
    pub fn tp_group(self, rank: usize) -> Vec<usize> {
        let first = rank / self.tp * self.tp;
        (first..first + self.tp).collect()
    }

    /// The ranks that hold the same part of the tensors as `rank`.
    pub fn dp_group(self, rank: usize) -> Vec<usize> {
        (rank % self.tp..self.size()).step_by(self.tp).collect()
    }
}

/// A mesh with what is cut on it. As text, words with commas between them: `dp=4,tp=8,zero-1,sp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrangement {
    /// The ranks.
    pub mesh: Mesh,
    /// Whether masters and moments are cut over the data-parallel ranks.
    pub zero1: bool,
    /// Whether the residual stream is cut along the sequence, over the tensor-parallel ranks.
    pub sequence_parallel: bool,
}

impl Arrangement {
    /// One rank.
    pub const ALONE: Self = Self { mesh: Mesh::SINGLE, zero1: false, sequence_parallel: false };
}

impl FromStr for Arrangement {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let unknown = |word: &str| format!("{word:?} is none of dp=N, tp=N, zero-1, sp");
        let mut arrangement = Self::ALONE;
        for word in text.split(',') {
            match word.split_once('=') {
                None if word == "zero-1" => arrangement.zero1 = true,
                None if word == "sp" => arrangement.sequence_parallel = true,
                Some((name @ ("dp" | "tp"), count)) => {
                    let count = count.parse().map_err(|_| unknown(word))?;
                    *(if name == "dp" { &mut arrangement.mesh.dp } else { &mut arrangement.mesh.tp }) = count;
                }
                _ => return Err(unknown(word)),
            }
        }
        Ok(arrangement)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_is_in_one_group_of_each_kind() {
        let mesh = Mesh { dp: 3, tp: 2 };
        assert_eq!(mesh.tp_group(3), [2, 3]);
        assert_eq!(mesh.dp_group(3), [1, 3, 5]);
        for rank in 0..mesh.size() {
            let (dp, tp) = mesh.place(rank);
            assert_eq!(mesh.tp_group(rank)[tp], rank);
            assert_eq!(mesh.dp_group(rank)[dp], rank);
        }
    }

    #[test]
    fn dp_follows_from_the_world() {
        let mesh = |tp, dp, world| Mesh::new(tp, dp, world).map_err(|error| error.to_string());
        assert_eq!(mesh(2, None, None), Ok(Mesh { dp: 1, tp: 2 }));
        assert_eq!(mesh(2, None, Some(8)), Ok(Mesh { dp: 4, tp: 2 }));
        assert_eq!(mesh(2, Some(3), None), Ok(Mesh { dp: 3, tp: 2 }));
        assert!(mesh(3, None, Some(8)).unwrap_err().contains("--tp is 3, but 8 ranks"));
        assert!(mesh(2, Some(3), Some(8)).unwrap_err().contains("makes 6 ranks, but 8"));
        assert!(mesh(0, None, None).unwrap_err().contains("--tp is 0"));
        assert!(mesh(1, Some(0), None).unwrap_err().contains("--dp is 0"));
        assert!(mesh(usize::MAX, Some(2), None).is_err() && mesh(1 << 16, Some(2), None).is_err());
    }
}
