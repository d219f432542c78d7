"""The embedded torch engine: continuous batching with a radix cache in the generator's own process."""
