"""One DeepSpeed rank: loss, update, its weights, its state on disk.

May import `packing`, `policy`, `method`, `run` and `trees`.
"""
