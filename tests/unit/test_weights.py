"""Weights that arrive are the weights that were sent."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from trace_async.weights import WeightUpdate, pack_weights, unpack_weights

STATE = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}


def test_round_trip_keeps_values_shapes_and_dtypes():
    update = pack_weights(STATE, 7)
    assert update.manifest.policy_version == 7
    assert update.manifest.num_bytes == 6 * 4 + 2 * 2
    found = unpack_weights(update)
    assert {name: tensor.dtype for name, tensor in found.items()} == {"a": torch.bfloat16, "b": torch.float32}
    assert all(torch.equal(found[name], STATE[name]) for name in STATE)


def test_the_checksum_covers_every_bit_names_and_shapes_but_no_order():
    checksum = pack_weights(STATE, 1).manifest.checksum
    assert pack_weights(dict(reversed(STATE.items())), 2).manifest.checksum == checksum
    changed = {**STATE, "b": STATE["b"].clone()}
    changed["b"][1, 2] = torch.nextafter(changed["b"][1, 2], torch.tensor(9.0))
    others = [
        changed,
        {"c": STATE["b"], "a": STATE["a"]},
        {**STATE, "b": STATE["b"].reshape(3, 2)},
        {**STATE, "a": STATE["a"].view(torch.float16)},
    ]
    assert checksum not in {pack_weights(other, 1).manifest.checksum for other in others}


def test_corrupt_or_incomplete_weights_are_refused():
    update = pack_weights(STATE, 7)
    assert update.tensors is not None
    flipped = {name: np.array(array) for name, array in update.tensors.items()}
    flipped["b"][0, 0] += 1
    with pytest.raises(ValueError, match="weights version 7: checksum"):
        unpack_weights(replace(update, tensors=flipped))
    with pytest.raises(ValueError, match="of 1 tensors"):
        unpack_weights(replace(update, tensors={"a": update.tensors["a"]}))
    with pytest.raises(ValueError, match="either tensors or a path"):
        WeightUpdate(manifest=update.manifest)
