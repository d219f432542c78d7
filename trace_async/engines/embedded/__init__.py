"""Run continuous batching with a radix cache in the generator's own process: the embedded torch engine."""
