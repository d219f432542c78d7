"""TRACE and its baselines: Stage 1, Stage 2, posteriors of prompts, credit.

May import the vocabulary and `trees`; numpy only, so no model, no engine and no Ray.
"""
