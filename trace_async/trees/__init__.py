"""The rollout tree: what it is, how it is stored and shown. Imports the vocabulary only."""
