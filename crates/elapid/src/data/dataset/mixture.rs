//! Several datasets in fixed shares.

use std::path::{Path, PathBuf};

use crate::Error;
use crate::data::sampler::Permutation;

/// Samples of a cycle: shares are exact to one in this number.
const CYCLE: usize = 10_000;

/// Which dataset a sample is from, and which of its blocks it is. A cycle is laid out once, so any sample can be asked for
/// without the ones before it, and nothing grows with the data.
#[derive(Debug)]
pub(super) struct Mixture {
    /// For each sample of a cycle its dataset, and how many samples of the cycle before it are from there.
    cycle: Vec<(usize, usize)>,
    /// Samples of a cycle from each dataset.
    shares: Vec<usize>,
    /// Blocks of each dataset.
    lens: Vec<usize>,
    /// Of the order of its blocks; None: as they come.
    pub(super) seed: Option<u64>,
}

impl Mixture {
    pub(super) fn new(weights: &[f64], lens: &[usize]) -> Self {
        let sum: f64 = weights.iter().sum();
        let wanted: Vec<f64> = weights.iter().map(|weight| weight / sum).collect();
        let mut shares = vec![0; weights.len()];
        let cycle = (1..=CYCLE)
            .map(|samples| {
                // The one that is furthest behind its share; of equals the first.
                let behind = |i: usize| wanted[i] * samples as f64 - shares[i] as f64;
                let next =
                    (1..shares.len()).fold(0, |best, i| if behind(i) > behind(best) { i } else { best });
                shares[next] += 1;
                (next, shares[next] - 1)
            })
            .collect();
        Self { cycle, shares, lens: lens.to_vec(), seed: None }
    }

    /// Dataset and block of sample number `sample`.
    pub(super) fn place(&self, sample: u64) -> (usize, usize) {
        let (cycle, slot) = (sample / CYCLE as u64, (sample % CYCLE as u64) as usize);
        let (part, before) = self.cycle[slot];
        let read = cycle * self.shares[part] as u64 + before as u64;
        let (epoch, row) = (read / self.lens[part] as u64, (read % self.lens[part] as u64) as usize);
        let row = match self.seed {
            // Another order in every part, even of the same length.
            Some(seed) => Permutation::new(self.lens[part], seed ^ (part as u64) << 32, epoch).at(row),
            None => row,
        };
        (part, row)
    }
}

/// The parts that `--data-dir` names, and their weights where it gives some.
///
/// # Errors
/// A part without a name, a weight that is not above 0, or weights for some parts only.
pub(super) fn parse(dir: &Path) -> Result<(Vec<PathBuf>, Option<Vec<f64>>), Error> {
    let whole = (vec![dir.to_owned()], None);
    let Some(text) = dir.to_str().filter(|text| text.contains([',', ':']) && !dir.exists()) else {
        return Ok(whole);
    };
    let fault = |what: String| {
        Err(Error::new(format!("--data-dir {text}: {what}"))
            .with_hint("several datasets are given as a,b or, with weights, as a:0.7,b:0.3"))
    };
    let (mut paths, mut weights) = (Vec::new(), Vec::new());
    for part in text.split(',') {
        let weighted =
            part.rsplit_once(':').and_then(|(path, weight)| Some((path, weight.parse::<f64>().ok()?)));
        let (path, weight) = weighted.map_or((part, None), |(path, weight)| (path, Some(weight)));
        if path.is_empty() {
            return fault("a name is missing".into());
        }
        if let Some(weight) = weight.filter(|weight| !(*weight > 0.0 && weight.is_finite())) {
            return fault(format!("the weight of {path} is {weight}"));
        }
        paths.push(PathBuf::from(path));
        weights.push(weight);
    }
    let given: Vec<f64> = weights.iter().flatten().copied().collect();
    match given.len() {
        0 => Ok((paths, None)),
        // A single part with a weight is that part.
        1 if paths.len() == 1 => Ok((paths, None)),
        n if n == paths.len() => {
            let least = given.iter().sum::<f64>() / CYCLE as f64;
            match paths.iter().zip(&given).find(|(_, weight)| **weight < least) {
                Some((path, weight)) => fault(format!(
                    "the weight of {} is {weight}, less than 1 of {CYCLE} samples",
                    path.display()
                )),
                None => Ok((paths, Some(given))),
            }
        }
        _ => fault("some parts have weights, others none".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_hold_on_any_stretch() {
        let mixture = Mixture::new(&[7.0, 2.0, 1.0], &[100, 1000, 3]);
        for (from, to) in [(0, 10), (5, 105), (0, 10_000), (9_000, 12_000), (123_456, 125_456)] {
            let mut counts = [0.0; 3];
            (from..to).for_each(|sample| counts[mixture.place(sample).0] += 1.0);
            for (count, share) in counts.iter().zip([0.7, 0.2, 0.1]) {
                assert!((count - share * (to - from) as f64).abs() <= 2.0, "{from}..{to}: {counts:?}");
            }
        }
    }

    #[test]
    fn each_part_is_read_in_order_and_then_again() {
        for seed in [None, Some(4)] {
            let mut mixture = Mixture::new(&[0.7, 0.3], &[37, 12]);
            mixture.seed = seed;
            let mut rows = [Vec::new(), Vec::new()];
            for sample in 0..30_000 {
                let (part, row) = mixture.place(sample);
                rows[part].push(row);
            }
            for (rows, len) in rows.iter().zip([37, 12]) {
                for (epoch, rows) in rows.chunks_exact(len).enumerate() {
                    let mut sorted = rows.to_vec();
                    sorted.sort_unstable();
                    assert!(sorted.iter().copied().eq(0..len), "epoch {epoch}");
                    assert_eq!(sorted == *rows, seed.is_none(), "epoch {epoch}");
                }
                assert_eq!(rows[..len] == rows[len..2 * len], seed.is_none());
            }
        }
    }

    #[test]
    fn parts_are_separated_by_commas() {
        let paths = |names: &[&str]| names.iter().map(PathBuf::from).collect::<Vec<_>>();
        let parse = |text: &str| parse(Path::new(text));
        assert_eq!(parse("a").unwrap(), (paths(&["a"]), None));
        assert_eq!(parse("a,b").unwrap(), (paths(&["a", "b"]), None));
        assert_eq!(parse("x:y/a:7,b:3").unwrap(), (paths(&["x:y/a", "b"]), Some(vec![7.0, 3.0])));
        assert_eq!(parse("a:1").unwrap(), (paths(&["a"]), None));
        for (bad, what) in [
            ("a:1,b", "others none"),
            ("a,,b", "a name is missing"),
            ("a:0,b:1", "weight of a is 0"),
            ("a:-1,b:1", "is -1"),
            ("a:nan,b:1", "is NaN"),
            ("a:1,b:1e-9", "less than 1 of 10000"),
        ] {
            let error = parse(bad).unwrap_err();
            assert!(error.to_string().contains(what) && error.hint().is_some(), "{bad}: {error}");
        }
        // What exists is meant, whatever its name.
        let dir = tempfile::tempdir().unwrap();
        let odd = dir.path().join("a:1,b:2");
        std::fs::create_dir(&odd).unwrap();
        assert_eq!(super::parse(&odd).unwrap(), (vec![odd], None));
    }
}
