"""Batched sampling on hand-worked distributions."""

import math

import numpy as np
import torch

from trace_async.engines.embedded.sampling import sample_tokens, stream_key, uniforms

PROBS = torch.tensor([0.2, 0.5, 0.3])


def draw(uniforms, *, temperature=1.0, top_p=None, top_k=None, probs=PROBS):
    n = len(uniforms)
    filtered = top_p is not None or top_k is not None
    tokens, logprobs = sample_tokens(
        probs.log().expand(n, -1),
        torch.full((n,), temperature),
        torch.tensor(uniforms, dtype=torch.float64),
        torch.full((n,), top_p or 1.0) if filtered else None,
        torch.full((n,), top_k or 0) if filtered else None,
    )
    return tokens.tolist(), logprobs.tolist()


def test_a_uniform_number_picks_the_token_whose_share_it_falls_into():
    tokens, logprobs = draw([0.0, 0.19, 0.21, 0.69, 0.71, 1 - 2**-50])
    assert tokens == [0, 0, 1, 1, 2, 2]
    assert math.isclose(logprobs[0], math.log(0.2), rel_tol=1e-5)
    assert math.isclose(logprobs[2], math.log(0.5), rel_tol=1e-5)


def test_a_token_of_probability_zero_is_never_picked():
    probs = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0])
    assert draw([0.0, 0.5, 1 - 2**-50], probs=probs)[0] == [1, 3, 3]


def test_temperature_scales_both_the_choice_and_the_logprob():
    # At T = 0.5 the shares are squared: 4, 25, 9 of 38.
    tokens, logprobs = draw([0.10, 0.11, 0.75, 0.77], temperature=0.5)
    assert tokens == [0, 1, 1, 2]
    assert math.isclose(logprobs[1], math.log(25 / 38), rel_tol=1e-5)
    tokens, logprobs = draw([0.9], temperature=0.0)
    assert tokens == [1]
    assert math.isclose(logprobs[0], math.log(0.5), rel_tol=1e-5)


def test_top_p_and_top_k_renormalise_the_choice_but_not_the_logprob():
    # Tokens 1 and 2 are left, with 5/8 and 3/8.
    for cut in ({"top_p": 0.6}, {"top_k": 2}):
        tokens, logprobs = draw([0.0, 0.62, 0.63, 0.99], **cut)
        assert tokens == [1, 1, 2, 2]
        assert math.isclose(logprobs[0], math.log(0.5), rel_tol=1e-5)
    assert draw([0.0, 0.99], top_p=0.5)[0] == [1, 1]
    assert draw([0.0, 0.99], top_p=1e-6)[0] == [1, 1]
    # The nucleus is taken of what top-k leaves: 0.55 of (5/8, 3/8) is token 1 alone.
    assert draw([0.99], top_p=0.55, top_k=2)[0] == [1]
    assert draw([0.99], top_p=1.0, top_k=3)[0] == [2]


def test_rows_keep_their_own_settings():
    tokens, _ = sample_tokens(
        PROBS.log().expand(3, -1),
        torch.tensor([0.0, 1.0, 1.0]),
        torch.tensor([0.99, 0.99, 0.0], dtype=torch.float64),
        torch.tensor([1.0, 0.5, 1.0]),
        torch.tensor([0, 0, 0]),
    )
    assert tokens.tolist() == [1, 1, 0]


def test_streams_are_uniform_and_independent_of_each_other():
    # The first output of splitmix64 from state 0 is 0xE220A8397B1DCDAF.
    assert uniforms(np.array([0], np.uint64), np.array([0]))[0] == (0xE220A8397B1DCDAF >> 11) * 2.0**-53
    keys = np.array([stream_key(1, seed, 0) for seed in range(200)], np.uint64)
    drawn = np.stack([uniforms(keys, np.full(200, position)) for position in range(200)])
    assert 0 <= drawn.min() < drawn.max() < 1
    counts = np.histogram(drawn, bins=10, range=(0, 1))[0]
    assert np.abs(counts - 4_000).max() < 5 * 60  # five standard deviations of a count
    assert abs(np.corrcoef(drawn[:, 0], drawn[:, 1])[0, 1]) < 0.3
    assert abs(np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]) < 0.025
    assert stream_key(1, 7, 0) != stream_key(1, 0, 7)
