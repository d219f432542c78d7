"""The actors of a run on Ray: trainer, admission, generators, prompts, predictor and learner. May import envs."""
