"""A run's books: tasks in order, what waits, what was spent, checkpoints, the plan. No Ray, no model.

May import `method` and `trees`.
"""
