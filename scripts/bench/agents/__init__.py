"""What an agent costs beside its engine: its endpoint, its start."""
