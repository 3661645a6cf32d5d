//! Continuations: the prompts in one chunked scan, then one token a step with constant state.

use elapid_tensor::Backend;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::Error;
use crate::data::Sample;
use crate::model::Mamba2ForCausalLM;
use crate::train::Batch;

/// How the next token is chosen.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// Logits are divided by this; 0 takes the most likely token.
    pub temperature: f32,
    /// Keep only the k most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the most likely tokens up to this total probability; 1 keeps all.
    pub top_p: f32,
    /// Seed of the draws.
    pub seed: u64,
}

/// Draws tokens from logits.
pub struct Sampler {
    sampling: Sampling,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// A sampler at the start of its random stream.
    pub fn new(sampling: Sampling) -> Self {
        Self { sampling, rng: ChaCha8Rng::seed_from_u64(sampling.seed) }
    }

    /// A token for fp32 `logits` `[V]`. Of equally likely tokens the first counts as the more likely.
    pub fn next(&mut self, logits: &[f32]) -> u32 {
        let Sampling { temperature, top_k, top_p, .. } = self.sampling;
        if temperature == 0.0 {
            let first_best = |best: usize, i: usize| if logits[i] > logits[best] { i } else { best };
            return (0..logits.len()).fold(0, first_best) as u32;
        }
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
        if top_k > 0 {
            order.truncate(top_k);
        }
        let max = f64::from(logits[order[0] as usize]);
        let weight = |id: u32| ((f64::from(logits[id as usize]) - max) / f64::from(temperature)).exp();
        let mut weights: Vec<f64> = order.iter().map(|&id| weight(id)).collect();
        if top_p < 1.0 {
            let total: f64 = weights.iter().sum();
            let mut seen = 0.0;
            let keep = weights.iter().take_while(|w| {
                let enough = seen >= f64::from(top_p) * total;
                seen += **w;
                !enough
            });
            let keep = keep.count().max(1);
            weights.truncate(keep);
        }
        let mut left = self.rng.random::<f64>() * weights.iter().sum::<f64>();
        for (id, weight) in order.iter().zip(&weights) {
            left -= weight;
            if left < 0.0 {
                return *id;
            }
        }
        order[weights.len() - 1]
    }
}

/// Up to `max_new_tokens` tokens after each of `prompts`, each handed to `on_token` with the place of its prompt as it
/// comes; a continuation ends after a token for which `is_end` holds. All prompts run as one batch, shorter ones padded
/// on the left with a document of its own, and each draws from its own random stream: a continuation does not depend
/// on what else is in the batch (T5).
///
/// # Panics
/// Without prompts, on an empty one, or a token outside of the vocabulary.
pub fn generate<B: Backend>(
    backend: &B,
    model: &Mamba2ForCausalLM<B>,
    prompts: &[Vec<u32>],
    max_new_tokens: usize,
    sampling: Sampling,
    is_end: impl Fn(u32) -> bool,
    on_token: impl FnMut(usize, u32),
) -> Vec<Vec<u32>> {
    let samples: Vec<Sample> = prompts.iter().map(|prompt| Sample::new(prompt)).collect();
    let Batch { size, length, ids, documents, .. } = Batch::new(&samples);
    let mut unread = backend.tensor_i32(&ids, &[size, length]);
    let mut documents = documents.map(|documents| backend.tensor_i32(&documents, &[size, length]));
    let mut states = Vec::new();
    let mut drawing = Drawing::new(prompts, max_new_tokens, sampling, is_end, on_token);
    while !drawing.is_done() {
        let logits = model.next_logits(backend, &unread, documents.as_ref(), &mut states);
        logits
            .chunks_exact(logits.len() / size)
            .enumerate()
            .for_each(|(row, logits)| drawing.draw(row, logits));
        let last: Vec<i32> = drawing.found.iter().map(|ids| ids[ids.len() - 1] as i32).collect();
        unread = backend.tensor_i32(&last, &[size, 1]);
        documents = None;
    }
    drawing.found
}

/// [`generate`] by a function that reads one more token of each prompt or continuation and gives the logits `[B, V]` that
/// follow. Rows begin together and each goes on by itself, so nothing is padded.
///
/// # Errors
/// Those of `decode`.
///
/// # Panics
/// Without prompts, or on an empty one.
pub fn generate_by(
    mut decode: impl FnMut(&[u32]) -> Result<Vec<f32>, Error>,
    prompts: &[Vec<u32>],
    max_new_tokens: usize,
    sampling: Sampling,
    is_end: impl Fn(u32) -> bool,
    on_token: impl FnMut(usize, u32),
) -> Result<Vec<Vec<u32>>, Error> {
    let mut drawing = Drawing::new(prompts, max_new_tokens, sampling, is_end, on_token);
    let mut position = 0;
    while !drawing.is_done() {
        let rows = prompts.iter().zip(&drawing.found);
        // A row that has ended is fed on with its last token.
        let next: Vec<u32> =
            rows.map(|(prompt, found)| *prompt.get(position).or(found.last()).unwrap_or(&0)).collect();
        let logits = decode(&next)?;
        position += 1;
        for (row, logits) in logits.chunks_exact(logits.len() / prompts.len()).enumerate() {
            if position >= prompts[row].len() {
                drawing.draw(row, logits);
            }
        }
    }
    Ok(drawing.found)
}

/// What has been drawn after each prompt.
struct Drawing<E, T> {
    samplers: Vec<Sampler>,
    found: Vec<Vec<u32>>,
    /// A row that has ended is fed on, lest the batch change its shape, but nothing more is drawn from it.
    ended: Vec<bool>,
    most: usize,
    is_end: E,
    on_token: T,
}

impl<E: Fn(u32) -> bool, T: FnMut(usize, u32)> Drawing<E, T> {
    fn new(prompts: &[Vec<u32>], most: usize, sampling: Sampling, is_end: E, on_token: T) -> Self {
        assert!(!prompts.is_empty() && prompts.iter().all(|prompt| !prompt.is_empty()));
        let samplers = prompts.iter().map(|_| Sampler::new(sampling)).collect();
        let (found, ended) = (vec![Vec::new(); prompts.len()], vec![most == 0; prompts.len()]);
        Self { samplers, found, ended, most, is_end, on_token }
    }

    fn is_done(&self) -> bool {
        !self.ended.contains(&false)
    }

    fn draw(&mut self, row: usize, logits: &[f32]) {
        if self.ended[row] {
            return;
        }
        let id = self.samplers[row].next(logits);
        self.found[row].push(id);
        (self.on_token)(row, id);
        self.ended[row] = (self.is_end)(id) || self.found[row].len() == self.most;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(sampling: Sampling, logits: &[f32]) -> Vec<usize> {
        let mut sampler = Sampler::new(sampling);
        let mut counts = vec![0; logits.len()];
        (0..4000).for_each(|_| counts[sampler.next(logits) as usize] += 1);
        counts
    }

    const PLAIN: Sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 7 };
    const LOGITS: [f32; 4] = [0.0, 2.0, 1.0, -1.0];

    #[test]
    fn temperature_zero_takes_the_first_of_the_best() {
        let mut sampler = Sampler::new(Sampling { temperature: 0.0, ..PLAIN });
        assert_eq!(sampler.next(&[1.0, 3.0, 3.0]), 1);
    }

    #[test]
    fn draws_follow_the_softmax() {
        let total: f64 = LOGITS.iter().map(|&l| f64::from(l).exp()).sum();
        for (count, logit) in draws(PLAIN, &LOGITS).iter().zip(LOGITS) {
            let expected = 4000.0 * f64::from(logit).exp() / total;
            // Four standard deviations of a binomial.
            assert!((*count as f64 - expected).abs() < 4.0 * expected.sqrt(), "{count} for {expected}");
        }
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let counts = draws(Sampling { top_k: 2, ..PLAIN }, &LOGITS);
        assert!(counts[0] == 0 && counts[3] == 0 && counts[1] > counts[2] && counts[2] > 0);
        // The best has 0.64 of the probability, the best two 0.88.
        let counts = draws(Sampling { top_p: 0.6, ..PLAIN }, &LOGITS);
        assert_eq!(counts, [0, 4000, 0, 0]);
        let counts = draws(Sampling { top_p: 0.8, ..PLAIN }, &LOGITS);
        assert!(counts[0] == 0 && counts[3] == 0 && counts[2] > 0);
    }

    #[test]
    fn the_same_seed_draws_the_same() {
        assert_eq!(draws(PLAIN, &LOGITS), draws(PLAIN, &LOGITS));
        assert_ne!(draws(PLAIN, &LOGITS), draws(Sampling { seed: 8, ..PLAIN }, &LOGITS));
    }
}
