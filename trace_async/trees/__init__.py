"""The rollout tree: what it is, how it is stored and shown. May import the vocabulary."""
