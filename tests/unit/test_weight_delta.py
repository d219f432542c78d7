"""A delta turns the weights that were sent last into the new ones, bit by bit, or the whole is sent."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trace_async.weight_delta import DeltaEncoder, TensorDelta, WeightDelta, apply_delta
from trace_async.weights import WeightBucket, host_bucket, pack_weights

State = dict[str, torch.Tensor]


def sent(encoder: DeltaEncoder, state: State, version: int) -> WeightDelta | None:
    for name, tensor in state.items():  # in buckets of one tensor
        encoder.add(host_bucket({name: tensor}))
    return encoder.finish(version)


def arrays(state: State) -> dict[str, np.ndarray]:
    return {name: array.copy() for name, array in host_bucket(state).tensors.items()}


def test_one_changed_element_is_one_index_and_its_bits():
    state = {"w": torch.tensor([1.0, 2.0, 3.0, 4.0]), "v": torch.zeros(3, dtype=torch.bfloat16)}
    encoder = DeltaEncoder()
    assert sent(encoder, state, 4) is None  # nothing was sent before
    base = arrays(state)
    state["w"][2] = 5.0
    delta = sent(encoder, state, 5)
    assert delta is not None
    assert delta.base_version == 4
    assert list(delta.tensors) == ["w"]
    assert delta.tensors["w"].indices.tolist() == [2]
    assert delta.num_bytes == 8
    apply_delta(base, delta)
    assert base["w"].tolist() == [1.0, 2.0, 5.0, 4.0]


def test_bits_count_and_not_values():
    """0.0 and -0.0 are equal, NaN is not equal to itself: what is served must be what was sent, bit by bit."""
    state = {"w": torch.tensor([0.0, float("nan"), 1.0, 2.0] * 4)}
    encoder = DeltaEncoder()
    sent(encoder, state, 1)
    base = arrays(state)
    state["w"][0] = -0.0
    delta = sent(encoder, state, 2)
    assert delta is not None
    assert delta.tensors["w"].indices.tolist() == [0]
    apply_delta(base, delta)
    assert np.signbit(base["w"][0])


@given(st.lists(st.lists(st.tuples(st.integers(0, 299), st.floats(width=32)), max_size=60), min_size=1, max_size=5))
def test_after_any_number_of_deltas_the_checksum_is_that_of_the_whole(steps: list[list[tuple[int, float]]]):
    state = {"a": torch.zeros(200), "b": torch.zeros(20, 5, dtype=torch.bfloat16)}
    encoder = DeltaEncoder()
    sent(encoder, state, 0)
    base = arrays(state)
    for version, step in enumerate(steps, start=1):
        for position, value in step:
            flat = state["a"] if position < 200 else state["b"].view(-1)
            flat[position % 200] = value
        whole = pack_weights(state, version)
        delta = sent(encoder, state, version)
        if delta is None:
            base = arrays(state)
        else:
            assert delta.num_bytes <= whole.manifest.num_bytes / 2
            apply_delta(base, delta)
        found = host_bucket({"a": torch.from_numpy(base["a"]), "b": torch.from_numpy(base["b"]).view(torch.bfloat16)})
        assert all(np.array_equal(found.tensors[n].view("u1"), whole.tensors[n].view("u1")) for n in ("a", "b"))


def test_the_whole_is_sent_when_too_much_changed_or_tensors_came_or_went():
    encoder = DeltaEncoder()
    state = {"w": torch.arange(8.0), "v": torch.zeros(8)}
    sent(encoder, state, 1)
    assert sent(encoder, {name: tensor + 1 for name, tensor in state.items()}, 2) is None
    assert sent(encoder, {"w": state["w"] + 1, "v": state["v"] + 1}, 3).num_bytes == 0
    assert sent(encoder, {"w": state["w"] + 1}, 4) is None
    assert sent(encoder, {"w": (state["w"] + 1).to(torch.bfloat16)}, 5) is None
    assert sent(encoder, {"w": (state["w"] + 1).to(torch.bfloat16)}, 6) is not None


def test_a_tensor_that_changed_mostly_travels_whole_among_others_that_did_not():
    encoder = DeltaEncoder()
    state = {"small": torch.zeros(8), "large": torch.zeros(64)}
    sent(encoder, state, 1)
    base = arrays(state)
    delta = sent(encoder, {**state, "small": torch.ones(8)}, 2)
    assert delta is not None
    assert delta.tensors["small"].indices is None
    assert delta.num_bytes == 32
    apply_delta(base, delta)
    assert base["small"].tolist() == [1.0] * 8


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("x", TensorDelta(None, np.zeros(4, np.uint32)), "changes x, which is not there"),
        ("w", TensorDelta(None, np.zeros(4, np.uint16)), "uint16 for w, whose elements are uint32"),
        ("w", TensorDelta(None, np.zeros(5, np.uint32)), "5 elements for w, not 4"),
        ("w", TensorDelta(np.array([4], np.uint32), np.zeros(1, np.uint32)), "changes element 4 of w: 4"),
    ],
)
def test_a_delta_that_does_not_fit_is_refused(name: str, change: TensorDelta, says: str):
    bucket = WeightBucket(tensors={"w": np.zeros(4, np.float32)})
    with pytest.raises(ValueError, match=says):
        apply_delta(bucket.tensors, WeightDelta(base_version=0, tensors={name: change}))
