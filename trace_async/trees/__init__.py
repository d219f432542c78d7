"""Define the rollout tree, store it and show it. May import the vocabulary."""
