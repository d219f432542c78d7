"""Train the policy on one DeepSpeed rank: the loss, the update, the weights and the state on disk.

May import `packing`, `policy`, `method`, `run` and `trees`.
"""
