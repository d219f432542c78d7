"""Models on disk: loading them, and a small start policy taught by demonstrations. May import `rollout`."""
