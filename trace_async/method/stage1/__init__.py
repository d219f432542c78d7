"""Stage 1: which candidate prompts get root rollouts, and how many. One rule a class, named in `registry`."""
