"""Comparisons of methods at equal cost: runs, arithmetic, report."""
