"""Generators of a run: their Ray actor, the pool that starts and replaces them, who asks which, and how many exist."""
