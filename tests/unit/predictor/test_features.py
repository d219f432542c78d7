import numpy as np
import pytest

from trace_async.predictor.features import LEAST_LOGPROB, MAX_DEPTH, history_features


def test_a_prompt_has_its_depth_and_length_alone():
    found = history_features([], 14)
    assert found[0] == 1
    assert found[MAX_DEPTH + 1] == 14
    assert sum(found) == 15


def test_two_turns_by_hand():
    found = history_features([(-1.0, -3.0), (-0.5,)], 20)
    assert found[: MAX_DEPTH + 1] == [0, 0, 1, 0, 0, 0]
    # tokens; of the prompt nothing; of the last turn tokens, mean, least; then mean of the means −2 and −.5, least, sum
    assert found[MAX_DEPTH + 1 :] == [20, 0, 1, -0.5, -0.5, -1.25, -3, -4.5]


@pytest.mark.parametrize(("value", "log_odds"), [(0.5, 0.0), (0.8, 1.3862944), (0.0, -6.9067548), (1.0, 6.9067548)])
def test_what_is_believed_of_the_prompt_stands_as_its_log_odds(value, log_odds):
    assert history_features([(-1.0,)], 20, value)[MAX_DEPTH + 2] == pytest.approx(log_odds)


def test_deep_histories_share_a_depth_and_nothing_is_infinite():
    found = history_features([(-1.0,)] * 9 + [(), (float("-inf"), float("nan"))], 99)
    assert found[MAX_DEPTH] == 1
    assert np.isfinite(found).all()
    assert found[MAX_DEPTH + 4] == pytest.approx(LEAST_LOGPROB)
