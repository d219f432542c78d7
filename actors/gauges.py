"""Show a run's main figures as metrics of Ray, which Prometheus collects: `scripts/cluster/grafana.json` draws them."""

from collections.abc import Mapping

from ray.util.metrics import Gauge

PREFIX = "trace_async"

SHOWN: Mapping[str, str] = {
    "train/reward": "mean reward of the root rollouts of the latest update",
    "train/effective_ratio": "share of its prompts whose rollouts disagree",
    "train/staleness_max": "most weight versions between a tree's oldest token and the update",
    "heldout/success_t1.0": "held-out success at temperature 1",
    "heldout/success_t0.0": "held-out success, greedy",
    "tokens/generated_total": "tokens generated for training so far",
    "tokens/cached_share": "share of prefill tokens served from the KV cache",
    "learner/loss": "loss of the update",
    "learner/grad_norm": "norm of the gradient",
    "learner/mismatch": "mean difference of log-probabilities between learner and generators",
    "predictor/brier": "Brier score of the values used for allocation",
    "time/step_s": "seconds between two updates",
    "time/wait_for_trees_s": "of them, seconds in which the learner waited for trees",
}
"""Figure → its meaning. Figures of one process a run, of the update or evaluation that came last."""


def gauge_name(figure: str) -> str:
    """Return the metric's name in Ray, `trace_async_train_reward` of `train/reward`. Prometheus puts `ray_` first."""
    return f"{PREFIX}_{figure.replace('/', '_').replace('.', '_')}"


class Gauges:
    """The metrics of one run, told from those of others on the same cluster by the tag `run`."""

    def __init__(self, run_name: str) -> None:
        self._tags = {"run": run_name}
        names = {"update": "updates of the policy so far", **SHOWN}
        self._gauges = {name: Gauge(gauge_name(name), meaning, tag_keys=("run",)) for name, meaning in names.items()}

    def show(self, update: int, figures: Mapping[str, float]) -> None:
        """Set what `figures` holds; the others keep their value."""
        for name, value in {"update": float(update), **figures}.items():
            if name in self._gauges:
                self._gauges[name].set(value, tags=self._tags)
