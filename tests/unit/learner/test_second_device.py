"""That all lies where it should when the device is not the CPU, shown without a GPU; see second_device.py."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.unit.learner.test_learner import VERSION, assert_close, configure, train, trees_of, weights_of
from trace_async.config import PredictorConfig
from trace_async.engines.embedded import scheduler as torch_scheduler
from trace_async.engines.embedded.model import TorchModel
from trace_async.engines.embedded.sampling import stream_key
from trace_async.engines.embedded.scheduler import Request, Scheduler
from trace_async.learner.learner import Learner
from trace_async.packing.attention import block_mask
from trace_async.packing.layout import pack_values
from trace_async.predictor.predictor import ValuePredictor
from trace_async.types import PrefixQuery, SamplingParams

T = TypeVar("T")


def elsewhere(function: Callable[..., T], *arguments: Any) -> T:
    """In a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def mix_devices() -> str:
    from tests.support.second_device import SecondDevice

    with SecondDevice():
        weight = torch.ones(2, requires_grad=True)
        moved = (weight * 3).to("accel:0")
        (moved * 2.0).sum().backward()
        assert weight.grad is not None
        assert weight.grad.tolist() == [6, 6]
        try:
            moved + moved.to("accel:1")
        except RuntimeError as error:
            return str(error)
    return "nothing"


def test_the_device_refuses_tensors_of_another_one():
    assert elsewhere(mix_devices) == "aten.add.Tensor: tensors on ['accel:0', 'accel:1']"


class OneRank:
    """What the learner asks of DeepSpeed's engine, which knows no such device."""

    def __init__(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer, _config: object) -> None:
        self.module, self.optimizer, self.norm = module, optimizer, 0.0

    def __call__(self, batch: object) -> Any:
        return self.module(batch)

    def backward(self, loss: torch.Tensor, *, scale_wrt_gas: bool) -> None:
        loss.backward()

    def step(self) -> None:
        self.norm = float(torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def get_global_grad_norm(self) -> float:
        return self.norm

    def was_step_applied(self) -> bool:
        return True


LEARNING = ("loss.kl_loss_coef=0.1", "loss.correction=tis", "learner.minibatches=2", "loss.entropy_coef=0.01")


def learn_on_accel(policy_path: Any, kind: str) -> Any:
    from tests.support.second_device import SecondDevice

    policy, reference = torch.device("accel", 0), torch.device("accel", 1)
    overrides = [*LEARNING, "learner.reference_device=cuda", f"learner.packing={'flat' if kind == 'plain' else 'tree'}"]
    with (
        SecondDevice(),
        patch("trace_async.learner.learner.join_ranks"),
        patch("trace_async.learner.learner.make_deepspeed", OneRank),
        patch("trace_async.learner.learner.attention_for", lambda _device, flat: kind),
        patch(
            "trace_async.learner.learner.resolve_device",
            lambda setting, **_: policy if setting == "auto" else reference,
        ),
    ):
        learner = Learner(configure(*overrides), policy_path)
        assert {parameter.device for parameter in learner.policy.parameters()} == {policy}
        return [learner.update(trees_of(seed), VERSION) for seed in (0, 1)], weights_of(learner)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["dense", "grouped", "plain"])
def test_the_learner_and_its_reference_compute_where_they_are_told(tiny_policy_path, kind):
    wanted = train(configure(*LEARNING), tiny_policy_path, seeds=(0, 1))
    metrics, weights = elsewhere(learn_on_accel, tiny_policy_path, kind)
    for found, same in zip(metrics, wanted[0], strict=True):
        for name in ("loss", "grad_norm", "entropy", "kl_reference", "mismatch", "trained_tokens"):
            assert found[name] == pytest.approx(same[name], rel=5e-4, abs=2e-5), name
    assert metrics[1]["kl_reference"] > 1e-6
    assert_close(weights, wanted[1], 2e-4)


def flex_mask_on_accel() -> set[str]:
    from tests.support.second_device import SecondDevice

    layout, _ = pack_values(trees_of(3, count=1))
    with SecondDevice():
        mask = block_mask(layout, torch.device("accel", 1))
        rows = torch.arange(layout.num_tokens, device="accel:1")
        seen = mask.mask_mod(None, None, rows[:, None], rows[None])
        return {str(tensor.device) for tensor in (seen, mask.kv_indices, mask.full_kv_indices, mask.q_indices)}


def test_the_flex_mask_is_made_on_its_device():
    assert elsewhere(flex_mask_on_accel) == {"accel:1"}


def predict_on(device: str, policy_path: Any) -> list[np.ndarray]:
    config = PredictorConfig(num_layers=1, steps_per_update=2)
    predictor = ValuePredictor(config, policy_path, seed=0, device=device)
    trees = trees_of(0)
    predictor.observe(trees, 0)
    for step in predictor.steps(trees):
        step()
    return predictor.predict(
        [
            PrefixQuery(token_ids=(5, 6, 7, 8, 9), positions=(2, 5)),
            PrefixQuery(token_ids=(5, 6), positions=(1, 2)),
        ]
    )


def predict_on_accel(policy_path: Any) -> list[np.ndarray]:
    from tests.support.second_device import SecondDevice

    with SecondDevice():
        return predict_on("accel:0", policy_path)


@pytest.mark.timeout(300)
def test_the_predictor_learns_and_answers_on_its_device(tiny_policy_path):
    wanted = predict_on("cpu", tiny_policy_path)
    found = elsewhere(predict_on_accel, tiny_policy_path)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)


def generate_on(device: str, policy_path: Any) -> list[tuple[int, ...]]:
    model = TorchModel(policy_path, device=torch.device(device), dtype="float32", max_context_tokens=64)
    scheduler = Scheduler(model, max_rows=3, max_context_tokens=64, kv_cache_tokens=256, decode=None)
    params = [SamplingParams(max_new_tokens=9), SamplingParams(max_new_tokens=12, top_p=0.9, top_k=20)]
    answers: list[tuple[int, ...]] = []
    for round_number in range(2):  # the second finds the first one's prompts in the cache
        for index in range(6):
            prompt = np.arange(20 + index % 2)
            scheduler.waiting.append(
                Request(
                    prompt_tokens=len(prompt),
                    tokens=prompt,
                    params=params[index % 2],
                    limit=len(prompt) + params[index % 2].max_new_tokens,
                    key=stream_key(round_number, index),
                )
            )
        done: list[tuple[Request, Any]] = []
        while len(done) < 6:
            done += scheduler.step()
        answers += sorted(completion.token_ids for _, completion in done)
    assert scheduler.totals.cached_tokens > 0
    start = {name: 0.9 * tensor.float() for name, tensor in load_file(policy_path / "model.safetensors").items()}
    assert model.load(start)
    assert not model.load(start)
    return answers


def generate_on_accel(policy_path: Any) -> list[tuple[int, ...]]:
    from tests.support.second_device import SecondDevice

    torch_scheduler.MAX_PREFILL_TOKENS["accel"] = 1024
    with SecondDevice(), torch.no_grad():
        return generate_on("accel:0", policy_path)


@pytest.mark.timeout(300)
def test_the_torch_engine_generates_on_its_device(tiny_policy_path):
    with torch.no_grad():
        wanted = generate_on("cpu", tiny_policy_path)
    assert elsewhere(generate_on_accel, tiny_policy_path) == wanted
