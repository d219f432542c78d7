"""Benchmarks: speed and bytes, as ratios within one run."""
