//! Learning rate by step.

use serde::{Deserialize, Serialize};

/// Shape of the rate after warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Shape {
    /// Half a cosine from the peak to the minimum at the last step.
    Cosine,
    /// A straight line from the peak to the minimum at the last step.
    Linear,
    /// The peak throughout.
    Constant,
    /// The peak, and a straight line to the minimum over the last --decay-steps.
    Wsd,
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
    /// Steps from the peak to the minimum, the last ones of the run; [`Shape::Wsd`] only.
    pub decay_steps: u64,
    /// Last step.
    pub max_steps: u64,
}

impl Schedule {
    /// Rate of `step`, counted from 1.
    pub fn rate(&self, step: u64) -> f64 {
        if step <= self.warmup_steps {
            return self.lr * step as f64 / self.warmup_steps as f64;
        }
        let after_warmup = self.max_steps.saturating_sub(self.warmup_steps);
        let left = match self.shape {
            Shape::Constant => return self.lr,
            Shape::Linear => 1.0 - self.decayed(step, after_warmup),
            Shape::Wsd => 1.0 - self.decayed(step, self.decay_steps),
            Shape::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * self.decayed(step, after_warmup)).cos()),
        };
        self.min_lr + (self.lr - self.min_lr) * left
    }

    /// The rate that the last step comes to.
    pub fn last_rate(&self) -> f64 {
        self.rate(self.max_steps)
    }

    /// How much of a decay over the last `steps` steps lies behind `step`: 0 before it, 1 at the last step.
    fn decayed(&self, step: u64, steps: u64) -> f64 {
        let into = (step + steps).saturating_sub(self.max_steps);
        (into as f64 / steps.max(1) as f64).min(1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CASE: Schedule = Schedule {
        shape: Shape::Cosine,
        lr: 1.0,
        min_lr: 0.1,
        warmup_steps: 10,
        decay_steps: 20,
        max_steps: 110,
    };

    fn close(schedule: &Schedule, rates: &[(u64, f64)]) {
        for &(step, rate) in rates {
            let got = schedule.rate(step);
            assert!((got - rate).abs() < 1e-12, "{:?}, step {step}: {got}, not {rate}", schedule.shape);
        }
    }

    #[test]
    fn warm_up_is_linear_from_zero() {
        assert_eq!(CASE.rate(1), 0.1);
        assert_eq!(CASE.rate(10), 1.0);
    }

    #[test]
    fn cosine_ends_at_the_minimum() {
        let quarter = 0.1 + 0.9 * 0.5 * (1.0 + 0.5f64.sqrt());
        close(&CASE, &[(10, 1.0), (35, quarter), (60, 0.55), (110, 0.1), (500, 0.1)]);
    }

    #[test]
    fn linear_ends_at_the_minimum() {
        let linear = Schedule { shape: Shape::Linear, ..CASE };
        close(&linear, &[(5, 0.5), (10, 1.0), (11, 0.991), (60, 0.55), (109, 0.109), (110, 0.1), (500, 0.1)]);
    }

    #[test]
    fn constant_stays() {
        let constant = Schedule { shape: Shape::Constant, ..CASE };
        close(&constant, &[(5, 0.5), (10, 1.0), (60, 1.0), (110, 1.0), (500, 1.0)]);
    }

    #[test]
    fn wsd_decays_over_its_last_steps() {
        let wsd = Schedule { shape: Shape::Wsd, ..CASE };
        close(&wsd, &[(5, 0.5), (10, 1.0), (90, 1.0), (91, 0.955), (100, 0.55), (110, 0.1), (500, 0.1)]);
        assert_eq!(wsd.last_rate(), wsd.rate(110));
        // No decay at all, and a decay as long as all that follows the warm-up.
        close(&Schedule { decay_steps: 0, ..wsd }, &[(11, 1.0), (110, 1.0)]);
        close(&Schedule { decay_steps: 100, ..wsd }, &[(10, 1.0), (11, 0.991), (110, 0.1)]);
    }

    #[test]
    fn without_warm_up_the_first_step_has_nearly_the_peak() {
        let schedule = Schedule { warmup_steps: 0, shape: Shape::Constant, ..CASE };
        assert_eq!(schedule.rate(1), 1.0);
    }
}
