"""Keep models on disk: load them, save them, and make a small start policy from demonstrations.

May import `rollout`.
"""
