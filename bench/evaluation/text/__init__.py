"""Text benchmarks: lm-eval tasks and perplexities."""
