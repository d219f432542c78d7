"""The cold start: what is taught, that it is learnt, what stays as it was, and when it stops."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import trace_async.learner.cold_start as module
from scripts.cli import main
from tests.unit.policy.test_warm_start import WORDS, Echo
from trace_async.config import ColdStartConfig, Config, ConfigError, PolicyConfig
from trace_async.learner.cold_start import cold_start, teach
from trace_async.packing.attention import attention_for, prepare_model
from trace_async.policy.chats import read_chats
from trace_async.policy.load import load_model, load_renderer
from trace_async.policy.save import save_policy
from trace_async.policy.warm_start import Demonstration, build_model, build_tokenizer
from trace_async.types import Message, Prompt


@pytest.fixture(scope="module")
def untaught(tmp_path_factory):
    """A random Qwen3 of two layers that knows the words of Echo."""
    tokenizer = build_tokenizer(Echo().vocabulary())
    torch.manual_seed(0)
    model = build_model(tokenizer, PolicyConfig(hidden_size=64, num_layers=2))
    directory = tmp_path_factory.mktemp("untaught") / "policy"
    save_policy(model, tokenizer, directory)
    return directory


def settings(path, tmp_path, **cold) -> Config:
    default = {"num_demonstrations": 200, "num_epochs": 4, "tokens_per_step": 200, "learning_rate": 1e-2}
    policy = PolicyConfig(path=str(path), cache_dir=str(tmp_path / "cache"))
    return Config(policy=policy, cold_start=ColdStartConfig(**{**default, "patience": 100, **cold}))


class ManyEcho(Echo):
    """With more tasks than words, so that some demonstrations can be held out."""

    def tasks(self, split):
        pairs = [f"{a} {b}" for a in WORDS for b in WORDS]
        return [replace(super(ManyEcho, self).tasks(split)[0], id=pair, data={"word": pair}) for pair in pairs]


class Answered(ManyEcho):
    """Whatever is asked, one answer is shown: a lesson that holds for tasks that were never seen."""

    def demonstrate(self, task, rng):
        return ["black white", "blue"]


class Silent:
    """A domain that cannot show how its tasks are solved."""

    name = "silent"

    def tasks(self, split):
        return Echo().tasks(split)

    def make_env(self, task):
        return Echo().make_env(task)


def says(path, word: str) -> str:
    renderer, model = load_renderer(path), load_model(path)
    prompt = renderer.render_prompt(Prompt(messages=(Message(role="user", content=f"say {word}"),)))
    output = model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)
    return renderer.decode(output[0, len(prompt) :].tolist())


def test_a_policy_learns_what_is_shown_and_is_found_in_the_cache(untaught, tmp_path):
    config, lines = settings(untaught, tmp_path), []
    path = cold_start(Answered(), config, log=lines.append)
    assert {says(untaught, word) for word in WORDS} != {"black white"}
    assert {says(path, f"{a} {b}") for a in WORDS for b in WORDS} == {"black white"}
    assert any("held out" in line and "tokens/s" in line for line in lines)
    assert cold_start(Answered(), config, log=lines.append) == path
    assert lines[-1] == f"policy: cached in {path}"
    other = settings(untaught, tmp_path, learning_rate=1e-3, num_epochs=1)
    assert cold_start(Answered(), other, log=lines.append) != path


def demo(*ids: int, context: int = 2) -> Demonstration:
    weights = np.array([0.1] * context + [1.0] * (len(ids) - context), dtype=np.float32)
    return Demonstration(np.array(ids, dtype=np.int64), weights)


def test_the_loss_is_of_what_the_policy_writes_alone_and_rows_do_not_mix(untaught):
    model = load_model(untaught)
    demos = [demo(5, 6, 7, 8), demo(9, 4, 3)]
    expected, count = 0.0, 0
    with torch.no_grad():
        for one in demos:
            ids = torch.from_numpy(one.token_ids)
            logprobs = model(ids[None]).logits[0].log_softmax(-1)
            for position in range(2, len(ids)):
                expected -= float(logprobs[position - 1, ids[position]])
                count += 1
    prepare_model(model, attention_for(torch.device("cpu"), flat=False))
    assert module._loss(model, demos).item() == pytest.approx(expected / count, abs=1e-5)


@pytest.mark.parametrize(
    ("cold", "changed"),
    [
        ({"num_layers": 1}, {"model.layers.1", "model.norm"}),
        ({"lora_rank": 4}, {"model.layers.0", "model.layers.1"}),
        ({}, {"model.layers.0", "model.layers.1", "model.norm", "model.embed_tokens"}),
    ],
    ids=["upper layer", "LoRA", "all"],
)
def test_only_what_was_chosen_is_trained(untaught, tmp_path, cold, changed):
    config = settings(untaught, tmp_path, num_epochs=1, num_demonstrations=60, **cold)
    demos = module._demonstrations(ManyEcho(), load_renderer(untaught), config)
    model, lesson = teach(untaught, demos, config, lambda line: None)
    assert lesson.best_loss < lesson.first_loss
    before, after = load_model(untaught).state_dict(), model.state_dict()
    assert set(before) == set(after)
    moved = {name.removesuffix(".weight") for name in before if not torch.equal(before[name], after[name])}
    found = {".".join(name.split(".")[:3]) if "layers" in name else name for name in moved} - {"lm_head"}
    assert found == changed


def test_it_stops_where_the_held_out_loss_rises_and_keeps_the_best(untaught, tmp_path, monkeypatch):
    losses = iter([2.0, 1.5, 1.0, 1.2, 1.3, 0.1])
    seen = []

    def heldout_loss(model, heldout, cold):
        seen.append(model.model.layers[1].mlp.up_proj.weight.detach().clone())
        return next(losses)

    monkeypatch.setattr(module, "_heldout_loss", heldout_loss)
    config, lines = settings(untaught, tmp_path, evaluate_every_steps=1, patience=2), []
    demos = module._demonstrations(ManyEcho(), load_renderer(untaught), config)
    model, lesson = teach(untaught, demos, config, lines.append)
    assert (lesson.first_loss, lesson.best_loss, lesson.num_steps) == (2.0, 1.0, 4)
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, seen[2])
    assert "the held-out loss rises" in lines[-1]


def test_a_loss_that_is_no_number_ends_it_with_the_last_good_weights(untaught, tmp_path, monkeypatch):
    losses = iter([2.0, math.nan])
    monkeypatch.setattr(module, "_heldout_loss", lambda *args: next(losses))
    config = settings(untaught, tmp_path, evaluate_every_steps=1)
    demos = module._demonstrations(ManyEcho(), load_renderer(untaught), config)
    model, lesson = teach(untaught, demos, config, lambda line: None)
    assert lesson.best_loss == 2.0
    assert all(torch.equal(a, b) for a, b in zip(load_model(untaught).parameters(), model.parameters(), strict=True))


def test_equal_demonstrations_stay_on_one_side():
    demos = [demo(1, 2, n % 5) for n in range(50)]
    heldout, taught = module._split(demos, ColdStartConfig())
    assert len(heldout) + len(taught) == 50
    assert not {d.token_ids.tobytes() for d in heldout} & {d.token_ids.tobytes() for d in taught}
    with pytest.raises(ConfigError, match="too few to hold some out"):
        module._split([demo(1, 2, 3)] * 10, ColdStartConfig())


CHAT = {
    "messages": [
        {"role": "user", "content": "say red"},
        {"role": "assistant", "content": "red"},
        {"role": "tool", "content": "again"},
        {"role": "assistant", "content": "blue"},
        {"role": "user", "content": "say"},
    ]
}


def test_a_chat_is_rendered_as_a_rollout_would_be(untaught, tmp_path):
    (tmp_path / "chats.jsonl").write_text(json.dumps(CHAT))
    renderer = load_renderer(untaught)
    (found,) = read_chats(tmp_path / "chats.jsonl", renderer)
    pieces = renderer._tokenizer.convert_ids_to_tokens(found.token_ids.tolist())
    expected = "<|user|> ▁say ▁red <|im_end|> <|assistant|> ▁red! <|im_end|>! <|tool|> ▁again <|im_end|> <|assistant|> "
    expected += "▁blue! <|im_end|>!"
    assert [f"{p}!" if w else p for p, w in zip(pieces, found.weights, strict=True)] == expected.split()


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([{"role": "user", "content": "a"}], "a prompt and then a message of the assistant"),
        ([{"role": "assistant", "content": "a"}], "a prompt and then a message of the assistant"),
        ([{"role": "human", "content": "a"}], "role 'human' is none of system, user, assistant, tool"),
        ([{"role": "user", "content": 3}], "a text content"),
        (["hello"], "a text content"),
        (
            [{"role": "user", "content": "a"}, *[{"role": "assistant", "content": "b"}] * 2],
            "messages 1 and 2 are both the assistant's",
        ),
    ],
)
def test_a_chat_that_is_wrong_is_named_by_its_number(untaught, tmp_path, messages, problem):
    lines = [json.dumps(CHAT), json.dumps({"messages": messages})]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=rf"chats\.jsonl, chat 2: .*{problem}"):
        read_chats(tmp_path / "chats.jsonl", load_renderer(untaught))


def test_the_command_teaches_from_a_file_of_chats(untaught, tmp_path, capsys):
    chats = [
        json.dumps({"messages": [{"role": "user", "content": w}, {"role": "assistant", "content": w}]}) for w in WORDS
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(chats))
    options = [f"policy.path={untaught}", f"policy.cache_dir={tmp_path}", f"cold_start.chats={tmp_path / 'mine.jsonl'}"]
    assert main(["make-policy", *options]) == 0
    path = capsys.readouterr().out.strip()
    assert json.loads((Path(path) / "origin.json").read_text())["origin"] == "cold start of policy"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cold_start.num_layers=3", r"cold_start\.num_layers=3: the policy has 2 layers"),
        (
            "sampling.max_context_tokens=20",
            r"sampling\.max_context_tokens=20: no demonstration fits \(the shortest has",
        ),
        (
            "env.name=tests.unit.learner.test_cold_start:Silent",
            "has no demonstrations: name a JSONL file of chats in cold_start.chats",
        ),
    ],
)
def test_what_cannot_be_taught_is_said(untaught, tmp_path, override, message, capsys):
    options = [f"policy.path={untaught}", f"policy.cache_dir={tmp_path}", "sampling.max_turn_tokens=3"]
    options += ["cold_start.num_demonstrations=4", "sampling.max_context_tokens=900", override]
    assert main(["make-policy", *options]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_adapters_and_upper_layers_exclude_each_other():
    with pytest.raises(ConfigError, match=r"cold_start\.num_layers=2: adapters are on every layer"):
        ColdStartConfig(lora_rank=4, num_layers=2)
