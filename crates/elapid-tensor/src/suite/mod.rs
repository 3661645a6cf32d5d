//! The suite that every backend passes: each op and each adjoint against the oracle.
//!
//! Inputs are seeded random numbers. In a bf16 case they are rounded to bf16 first and the oracle gets the rounded
//! values, so that only what the backend itself rounds counts as its error. The error of a tensor is
//! ‖got − wanted‖ / ‖wanted‖ over all its elements. Gradients are added to buffers that already hold values, and
//! everything around their places must stay as it was, to the bit.
//!
//! Where the contract leaves a choice, the suite reads it so:
//!
//! - Weight and bias of `linear`, of the convolution, the table of `embedding` and the weight of `head_loss` come in
//!   the dtype of the activations, that of `add_bias` also in bf16 beside fp32; norm weights, `dt_bias`, `a_log`, `d`, states and their cotangents are fp32.
//! - The conv state after the last position is an exact copy of inputs, those of the last document only, with
//!   zeros where that is shorter than K − 1.
//! - Δt passes its gradient at the ends of `dt_limit` as well, as `torch.clamp` does.
//! - `norm` and `factor` of `clip` mean nothing where `finite` is 0.

mod bits;
mod check;
mod mixer;
mod ops;
mod update;

pub use bits::bits;
pub use mixer::{mamba2, mamba2_core};
pub use ops::{add_and_cast, add_bias, embedding, head_loss, linear, resize, rms_norm};
pub use update::{adamw, clip, flat_buffers};

use crate::backend::Backend;
use std::fmt;

/// What one comparison found.
#[derive(Clone, Debug)]
pub struct Report {
    /// The op.
    pub op: &'static str,
    /// Its sizes and what is special about them.
    pub case: String,
    /// The output or gradient compared, with what is wrong in kind if it has another shape or dtype.
    pub tensor: String,
    /// ‖got − wanted‖ / ‖wanted‖; infinite where shape or dtype differ.
    pub error: f64,
    /// The largest error that passes.
    pub tolerance: f64,
}

impl Report {
    /// Whether the error is within the tolerance; NaN is not.
    pub fn passes(&self) -> bool {
        self.error <= self.tolerance
    }

    /// The error over the tolerance; infinite where it is NaN or where no error at all is tolerated.
    fn share_of_tolerance(&self) -> f64 {
        match self.error / self.tolerance {
            _ if self.error == 0.0 => 0.0,
            share if share.is_nan() => f64::INFINITY,
            share => share,
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { op, case, tensor, error, tolerance } = self;
        let verdict = if self.passes() { "ok" } else { "FAILED" };
        write!(f, "{verdict:6} {op} {tensor}: error {error:.1e}, tolerance {tolerance:.0e} ({case})")
    }
}

/// What all comparisons of one op came to.
#[derive(Clone, Debug)]
pub struct Finding {
    /// The op.
    pub op: &'static str,
    /// How many there were, at least 1.
    pub comparisons: usize,
    /// How many of them fail.
    pub failed: usize,
    /// The one nearest to its tolerance, or furthest beyond it.
    pub worst: Report,
}

/// The reports op by op, in the order in which the ops first appear.
pub fn findings(reports: &[Report]) -> Vec<Finding> {
    let mut findings: Vec<Finding> = Vec::new();
    for report in reports {
        let failed = usize::from(!report.passes());
        match findings.iter_mut().find(|finding| finding.op == report.op) {
            None => {
                findings.push(Finding { op: report.op, comparisons: 1, failed, worst: report.clone() });
            }
            Some(finding) => {
                finding.comparisons += 1;
                finding.failed += failed;
                if report.share_of_tolerance() > finding.worst.share_of_tolerance() {
                    finding.worst = report.clone();
                }
            }
        }
    }
    findings
}

/// Every check of this suite.
pub fn check_all<B: Backend>(backend: &B) -> Vec<Report> {
    let checks = [
        flat_buffers,
        embedding,
        rms_norm,
        linear,
        add_bias,
        resize,
        add_and_cast,
        mamba2,
        head_loss,
        clip,
        adamw,
    ];
    checks.iter().flat_map(|check| check(backend)).collect()
}

/// For tests: prints the comparisons that fail.
///
/// # Panics
/// If one fails or there is none.
#[track_caller]
pub fn assert_passes(reports: &[Report]) {
    assert!(!reports.is_empty(), "nothing was compared");
    let failed: Vec<String> = reports.iter().filter(|r| !r.passes()).map(Report::to_string).collect();
    assert!(failed.is_empty(), "{} of {} failed\n{}", failed.len(), reports.len(), failed.join("\n"));
}

#[cfg(test)]
mod tests {
    use super::check::{Check, Gradient};
    use super::*;
    use crate::backend::DType;
    use crate::oracle::OracleBackend;

    #[test]
    fn oracle_passes() {
        assert_passes(&check_all(&OracleBackend));
    }

    #[test]
    fn bits_repeat() {
        let bits_of_one_run = bits(&OracleBackend);
        assert_eq!(bits_of_one_run, bits(&OracleBackend));
        assert!(bits_of_one_run.iter().all(|&b| f32::from_bits(b).is_finite()));
    }

    fn compared(got: f32, dtype: DType, shape: &[usize]) -> Report {
        let mut check = Check::new(&OracleBackend, "op", "case");
        check.compare("y", &OracleBackend.tensor(&[got], &[1], dtype), &[1.0], shape, DType::F32, 1e-5);
        check.finish().remove(0)
    }

    #[test]
    fn wrong_value_kind_or_shape_fails() {
        assert!(compared(1.000001, DType::F32, &[1]).passes());
        assert!(!compared(1.001, DType::F32, &[1]).passes());
        assert!(!compared(f32::NAN, DType::F32, &[1]).passes());
        assert!(!compared(1.0, DType::Bf16, &[1]).passes());
        assert!(!compared(1.0, DType::F32, &[1, 1]).passes());
    }

    #[test]
    fn findings_count_and_keep_the_worst() {
        let report = |op, error, tolerance| {
            let (case, tensor) = (String::new(), String::new());
            Report { op, case, tensor, error, tolerance }
        };
        let nan = report("a", f64::NAN, 1.0);
        let reports = [
            report("a", 1e-6, 1e-5),
            report("b", 0.0, 0.0),
            report("a", 1e-3, 1e-1),
            nan,
            report("b", 1.0, 0.0),
        ];
        let found: Vec<_> = findings(&reports[..3])
            .into_iter()
            .map(|f| (f.op, f.comparisons, f.failed, f.worst.error))
            .collect();
        assert_eq!(found, [("a", 2, 0, 1e-6), ("b", 1, 0, 0.0)]);
        let found = findings(&reports);
        assert!(found[0].failed == 1 && found[0].worst.error.is_nan());
        assert!(found[1].failed == 1 && found[1].worst.error == 1.0);
    }

    fn gradient_written(
        write: impl Fn(&OracleBackend, &mut crate::oracle::OracleBuffer, std::ops::Range<usize>),
    ) -> bool {
        let mut check = Check::new(&OracleBackend, "op", "case");
        let wanted = [Gradient { name: "w", shape: &[2], want: &[1.0, 2.0], tolerance: 1e-5 }];
        check.gradients(&wanted, |buffer, slots| {
            let range = buffer.shape.range(&slots[0]);
            write(&OracleBackend, buffer, range);
        });
        check.finish().iter().all(Report::passes)
    }

    #[test]
    fn gradients_must_be_added_in_their_place_and_nowhere_else() {
        assert!(gradient_written(|_, buffer, range| {
            buffer.values[range.start] += 1.0;
            buffer.values[range.start + 1] += 2.0;
        }));
        assert!(!gradient_written(|_, buffer, range| buffer.values[range].copy_from_slice(&[1.0, 2.0])));
        assert!(!gradient_written(|_, buffer, range| {
            buffer.values[range.start] += 1.0;
            buffer.values[range.start + 1] += 2.0;
            buffer.values[range.end] += 1e-3;
        }));
    }
}
