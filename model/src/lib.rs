//! What is computed: checkpoints, families, attention, gates, expert kernels, tokenizer, sampling.
