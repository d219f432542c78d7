"""Loss and gradient stay finite for any log-ratio, and what was held back is counted."""

import math

import pytest
import torch

from tests.unit.learner.test_loss import entries_of
from trace_async.config import LossConfig
from trace_async.learner.loss import MAX_LOG_RATIO, LossMetrics, LossTerms, policy_loss

SETTINGS = [{}, {"correction": "decoupled"}, {"correction": "tis"}, {"dual_clip": 3.0}, {"kl_loss_coef": 0.1}]
SETTINGS += [{"objective": "cispo"}, {"mask_low": 0.5, "mask_high": 5.0}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("learner", "generator"), [(-2.0, -92.0), (-92.0, -2.0), (-1e4, -1.0), (-1.0, -3e4)])
@pytest.mark.parametrize(("positive", "negative"), [(1.0, 0.0), (0.0, -1.0), (2.0, -3.0), (0.0, 0.0)])
def test_loss_and_gradient_are_finite(settings, dtype, learner, generator, positive, negative):
    entries = entries_of([generator, -1.0], [positive, 1.0], [negative, 0.0])
    entries = type(entries)(
        **{name: getattr(entries, name) for name in ("rows", "labels", "policy_versions")},
        **{name: getattr(entries, name).to(dtype) for name in ("generator_logprobs", "positive", "negative", "weight")},
    )
    for proximal in (learner, generator):
        logprobs = torch.tensor([learner, -1.5], dtype=dtype, requires_grad=True)
        terms = LossTerms(
            learner_logprobs=logprobs,
            proximal_logprobs=torch.tensor([proximal, -1.5], dtype=dtype),
            reference_logprobs=torch.tensor([-1.0, -1.5], dtype=dtype),
        )
        loss, clipped = policy_loss(entries, terms, LossConfig(**settings))
        loss.backward()
        assert math.isfinite(loss.item())
        assert logprobs.grad is not None
        assert torch.isfinite(logprobs.grad).all()
        # The ordinary token beside it is trained as always: ratio e^−.5, credit 1.
        if not {"kl_loss_coef", "correction"} & settings.keys():
            assert logprobs.grad[1].item() == pytest.approx(-math.exp(-0.5), rel=1e-5)
        metrics = LossMetrics()
        metrics.add(entries, terms, loss, clipped, 0)
        assert metrics.result()["extreme_ratios"] == 1.0
        assert math.isfinite(metrics.result()["ratio_mean"])


def test_what_is_within_the_limit_is_untouched():
    within = MAX_LOG_RATIO - 0.5
    entries = entries_of([-30.0], [0.0], [-1.0])
    logprobs = torch.tensor([-30.0 + within], dtype=torch.float64, requires_grad=True)
    loss, _ = policy_loss(entries, LossTerms(learner_logprobs=logprobs), LossConfig())
    loss.backward()
    assert loss.item() == pytest.approx(math.exp(within))
    assert logprobs.grad.item() == pytest.approx(math.exp(within))


def test_an_engine_that_sampled_what_it_calls_impossible_is_not_covered_up():
    entries = entries_of([-math.inf], [1.0], [0.0])
    loss, _ = policy_loss(entries, LossTerms(learner_logprobs=torch.tensor([-1.0])), LossConfig())
    assert not math.isfinite(loss.item())


def test_a_learner_that_is_not_a_number_stays_one():
    """Such a loss is an error of the run, found by whoever looks at it; it must not be hidden here."""
    entries = entries_of([-1.0], [1.0], [0.0])
    loss, _ = policy_loss(entries, LossTerms(learner_logprobs=torch.tensor([math.nan])), LossConfig())
    assert math.isnan(loss.item())
