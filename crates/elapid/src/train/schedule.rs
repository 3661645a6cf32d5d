//! Learning rate by step.

use serde::{Deserialize, Serialize};

/// Shape of the rate after warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Shape {
    /// Half a cosine from the peak to the minimum at the last step.
    Cosine,
    /// The peak throughout.
    Constant,
}

/// The rate of every step of a run.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// Shape after warm-up.
    pub shape: Shape,
    /// Peak rate.
    pub lr: f64,
    /// Rate at the last step.
    pub min_lr: f64,
    /// Steps of linear warm-up from 0: step s of w uses lr·s/w.
    pub warmup_steps: u64,
    /// Last step.
    pub max_steps: u64,
}

impl Schedule {
    /// Rate of `step`, counted from 1.
    pub fn rate(&self, step: u64) -> f64 {
        if step <= self.warmup_steps {
            return self.lr * step as f64 / self.warmup_steps as f64;
        }
        match self.shape {
            Shape::Constant => self.lr,
            Shape::Cosine => {
                let decay = self.max_steps.saturating_sub(self.warmup_steps).max(1) as f64;
                let done = ((step - self.warmup_steps) as f64 / decay).min(1.0);
                self.min_lr + (self.lr - self.min_lr) * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CASE: Schedule =
        Schedule { shape: Shape::Cosine, lr: 1.0, min_lr: 0.1, warmup_steps: 10, max_steps: 110 };

    #[test]
    fn warm_up_is_linear_from_zero() {
        assert_eq!(CASE.rate(1), 0.1);
        assert_eq!(CASE.rate(10), 1.0);
    }

    #[test]
    fn cosine_ends_at_the_minimum() {
        assert!((CASE.rate(60) - 0.55).abs() < 1e-12);
        assert!((CASE.rate(110) - 0.1).abs() < 1e-12);
        assert!((CASE.rate(500) - 0.1).abs() < 1e-12);
    }

    #[test]
    fn without_warm_up_the_first_step_has_nearly_the_peak() {
        let schedule = Schedule { warmup_steps: 0, shape: Shape::Constant, ..CASE };
        assert_eq!(schedule.rate(1), 1.0);
    }
}
