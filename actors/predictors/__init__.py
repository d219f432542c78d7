"""The predictor of a run: its Ray actor, the group that learns and answers, and the handle by which others ask."""
