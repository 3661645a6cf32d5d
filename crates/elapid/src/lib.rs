//! Elapid trains Mamba-2 language models: text → tokens → batches → model → gradients → parameters → checkpoint.
