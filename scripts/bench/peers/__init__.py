"""The same work done by other trainers, in one run."""
