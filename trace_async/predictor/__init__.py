"""V(H), the value model that steers the allocation, and how good it is.

May import `packing`, `policy`, `method` and `trees`.
"""
