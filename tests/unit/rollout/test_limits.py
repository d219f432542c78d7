"""What the settings ask of the engine beside tokens."""

import pytest

from trace_async.config import load_config
from trace_async.rollout.limits import rollout_limits


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["predictor.prefix_layers=0"], 0),  # with the defaults the predictor reads the policy's states
        (["predictor.prefix_layers=3", "predictor.trunk=policy"], 3),
        (["predictor.prefix_layers=0", "predictor.trunk=own"], None),
        (["predictor.prefix_layers=0", "predictor.path=models/small"], None),
    ],
)
def test_engines_are_asked_for_states_where_the_predictor_reads_them(overrides: list[str], expected: int | None):
    limits = rollout_limits(load_config(None, overrides), (9,))
    assert limits.sampling.read_layers == expected
    assert limits.at(1.0).sampling.read_layers is None  # of held-out rollouts nobody asks a value
