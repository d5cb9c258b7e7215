"""Language tasks as lm-eval has them, and perplexities."""
