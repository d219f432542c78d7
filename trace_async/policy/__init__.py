"""Models on disk: loading them, and a small start policy taught by demonstrations. Imports the renderer of `rollout`."""
