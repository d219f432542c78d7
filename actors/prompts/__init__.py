"""Prompts of a run: the Ray actor in which their coroutines live, and the group that hands prompts to such actors."""
