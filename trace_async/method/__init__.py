"""TRACE and its baselines: Stage 1, Stage 2, posteriors of prompts, credit. numpy and the tree only: no model, no engine, no Ray."""
