"""Teach a pretrained policy an environment's format with demonstrations, before reinforcement learning.

    demonstrations (the environment's, or a file of chats) ─► tokens, prompt and observations masked
      ─► packed rows of whole demonstrations ─► AdamW on all weights, on LoRA adapters or on the upper layers
      ─► held-out loss now and then; stop when it rises, keep the best ─► a Hugging Face directory, cached

Only the tokens that the policy is to write are trained on, and logits exist for those alone.
"""

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from trace_async.config import ColdStartConfig, Config, ConfigError
from trace_async.env import Demonstrator, Domain
from trace_async.learner.loss import entry_logprobs
from trace_async.learner.policy_tensors import add_lora, merged
from trace_async.packing.attention import attention_for, hidden_states, prepare_model
from trace_async.packing.layout import Layout, concatenate
from trace_async.policy.chats import read_chats
from trace_async.policy.device import resolve_device
from trace_async.policy.load import load_model, load_renderer, load_tokenizer
from trace_async.policy.report import describe_policy
from trace_async.policy.save import save_policy
from trace_async.policy.warm_start import Demonstration, demonstrations, learning_rate_factor
from trace_async.rollout.renderer import Renderer
from trace_async.run.model_folder import logit_factor

_LOGPROB_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a cold start did. Losses are means over the trained tokens of the held-out demonstrations, in nats."""

    first_loss: float
    """Before the first step."""
    best_loss: float
    """Of the weights that were kept."""
    num_steps: int
    num_tokens: int


def cold_start(domain: Domain | None, config: Config, *, log: Callable[[str], None] = print) -> Path:
    """Fine-tune `policy.path` as the section `cold_start` says, unless that is cached. Returns the new directory.

    Raises ConfigError when there is nothing to learn from or the model cannot be trained.
    """
    settings, path = config.cold_start, Path(config.policy.path)
    for line in describe_policy(path, config):
        log(line)
    renderer = load_renderer(path, template_kwargs=config.policy.chat_template_kwargs)
    demos = _demonstrations(domain, renderer, config)
    directory = Path(config.policy.cache_dir) / f"{_name(domain, settings)}-{_fingerprint(path, demos, config)}"
    if directory.is_dir():
        log(f"policy: cached in {directory}")
        return directory
    model, lesson = teach(path, demos, config, log)
    origin = {
        "origin": f"cold start of {path.name}",
        "loss": f"{lesson.first_loss:.3f} to {lesson.best_loss:.3f} (held out), {lesson.num_tokens} tokens",
    }
    save_policy(model, load_tokenizer(path), directory, origin)
    log(f"policy: saved in {directory}")
    return directory


def teach(path: Path, demos: Sequence[Demonstration], config: Config, log: Callable[[str], None]) -> tuple[Any, Lesson]:
    """Train the model. Returns it at its best held-out loss, adapters merged, and what was done."""
    settings = config.cold_start
    heldout, taught = _split(demos, settings)
    model = load_model(path, dtype="float32", device=str(resolve_device(config.learner.device, name="learner.device")))
    trained = _choose_weights(model, settings)
    prepare_model(model, attention_for(model.device, flat=False))
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    rows = list(_rows(taught, settings))
    log(
        f"cold start: {sum(p.numel() for p in trained) / 1e6:.1f} of "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {len(taught)} demonstrations in "
        f"{len(rows)} steps, {len(heldout)} held out"
    )
    first = best = _heldout_loss(model, heldout, settings)
    kept, since, tokens, step, started = _copies(trained), 0, 0, 0, time.monotonic()
    for step, row in enumerate(rows, 1):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * learning_rate_factor(step - 1, len(rows))
        loss = _loss(model, row)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += sum(len(demo.token_ids) for demo in row)
        if step % settings.evaluate_every_steps and step != len(rows):
            continue
        found = _heldout_loss(model, heldout, settings)
        seconds = time.monotonic() - started
        log(
            f"cold start: step {step}/{len(rows)}, loss {loss.item():.3f}, held out {found:.3f} (first {first:.3f}), "
            f"{tokens / seconds:.0f} tokens/s, {seconds / step * (len(rows) - step):.0f} s left"
        )
        if not found < best:
            since += 1
            if since >= settings.patience or found != found:
                log("cold start: the held-out loss rises; stopped, the best weights are kept")
                break
            continue
        best, since, kept = found, 0, _copies(trained)
    with torch.no_grad():
        for parameter, value in zip(trained, kept, strict=True):
            parameter.copy_(value)
    return _merged(model, path, settings), Lesson(first, best, step, tokens)


def _copies(trained: Sequence[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trained]


def _choose_weights(model: Any, settings: ColdStartConfig) -> list[torch.nn.Parameter]:
    """Return what is trained: LoRA adapters, the upper layers with the last norm, or everything."""
    if settings.lora_rank:
        add_lora(model, settings.lora_rank, seed=settings.seed)
    elif settings.num_layers:
        model.requires_grad_(False)
        layers = model.base_model.layers
        if settings.num_layers > len(layers):
            raise ConfigError(f"cold_start.num_layers={settings.num_layers}: the policy has {len(layers)} layers")
        for module in (*layers[-settings.num_layers :], model.base_model.norm):
            module.requires_grad_(True)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _merged(model: Any, path: Path, settings: ColdStartConfig) -> Any:
    """Return a plain model that has in its weights what the adapters have learnt."""
    if not settings.lora_rank:
        return model
    plain = load_model(path, dtype="float32")
    state = model.cpu().state_dict()
    plain.load_state_dict(dict(merged(state, state.__getitem__)))
    return plain


def _loss(model: Any, row: Sequence[Demonstration]) -> torch.Tensor:
    """Return the mean negative log-probability of the trained tokens of a packed row."""
    layouts = [
        Layout(
            token_ids=demo.token_ids,
            positions=np.arange(len(demo.token_ids)),
            subtree_end=np.full(len(demo.token_ids), len(demo.token_ids)),
        )
        for demo in row
    ]
    layout = concatenate(layouts)
    trained = np.concatenate([demo.weights >= 1 for demo in row])
    targets = torch.from_numpy(np.flatnonzero(trained)).to(model.device)
    hidden = hidden_states(model, layout, attention_for(model.device, flat=False))
    labels = torch.from_numpy(layout.token_ids).to(model.device)[targets]
    logprobs, _ = entry_logprobs(
        model.get_output_embeddings(),
        hidden,
        targets - 1,
        labels,
        temperature=1.0 / logit_factor(model.config.to_dict()),
        chunk_tokens=_LOGPROB_CHUNK,
    )
    return -logprobs.mean()


@torch.no_grad()
def _heldout_loss(model: Any, heldout: Sequence[Demonstration], settings: ColdStartConfig) -> float:
    total = count = 0.0
    for row in _packed(heldout, settings.tokens_per_step):
        trained = sum(int((demo.weights >= 1).sum()) for demo in row)
        total += float(_loss(model, row)) * trained
        count += trained
    return total / count


def _split(
    demos: Sequence[Demonstration], settings: ColdStartConfig
) -> tuple[list[Demonstration], list[Demonstration]]:
    """Return what is held out and what is taught. Equal demonstrations, such as those of one task, stay together."""
    order = list(demos)
    Random(f"cold start/{settings.seed}").shuffle(order)
    wanted = max(1, round(settings.heldout_share * len(order)))
    chosen = {demo.token_ids.tobytes() for demo in order[:wanted]}
    heldout = [demo for demo in order if demo.token_ids.tobytes() in chosen]
    taught = [demo for demo in order if demo.token_ids.tobytes() not in chosen]
    if not taught:
        raise ConfigError(f"cold_start: {len(order)} demonstrations are too few to hold some out; give more")
    return heldout, taught


def _rows(taught: Sequence[Demonstration], settings: ColdStartConfig) -> Iterator[list[Demonstration]]:
    rng = Random(f"cold start rows/{settings.seed}")
    for _ in range(settings.num_epochs):
        order = list(taught)
        rng.shuffle(order)
        yield from _packed(order, settings.tokens_per_step)


def _packed(demos: Sequence[Demonstration], max_tokens: int) -> Iterator[list[Demonstration]]:
    """Yield rows of whole demonstrations. A row has at most `max_tokens` tokens, unless one demonstration has more."""
    row: list[Demonstration] = []
    for demo in demos:
        if row and sum(len(d.token_ids) for d in row) + len(demo.token_ids) > max_tokens:
            yield row
            row = []
        row.append(demo)
    if row:
        yield row


def _demonstrations(domain: Domain | None, renderer: Renderer, config: Config) -> list[Demonstration]:
    settings, longest = config.cold_start, config.sampling.max_context_tokens
    if settings.chats:
        found = read_chats(settings.chats, renderer)[: settings.num_demonstrations]
    elif isinstance(domain, Demonstrator):
        found = list(itertools.islice(demonstrations(domain, renderer, settings.seed), settings.num_demonstrations))
    else:
        raise ConfigError(
            f"env.name={config.env.name} has no demonstrations: name a JSONL file of chats in cold_start.chats"
        )
    fitting = [demo for demo in found if len(demo.token_ids) <= longest]
    if not fitting:
        shortest = min((len(demo.token_ids) for demo in found), default=0)
        raise ConfigError(
            f"sampling.max_context_tokens={longest}: no demonstration fits (the shortest has {shortest} tokens)"
        )
    return fitting


def _name(domain: Domain | None, settings: ColdStartConfig) -> str:
    return "chats" if settings.chats or domain is None else domain.name


def _fingerprint(path: Path, demos: Sequence[Demonstration], config: Config) -> str:
    """Hash the model's files (name, size, time of change), the demonstrations, the settings and this file's bytes."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(Path(__file__).read_bytes())
    settings: Mapping[str, object] = {
        name: getattr(config.cold_start, name) for name in config.cold_start.__dataclass_fields__ if name != "chats"
    }
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for file in sorted(file for file in path.iterdir() if file.is_file()):
        digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    for demo in demos:
        digest.update(demo.token_ids.tobytes() + demo.weights.tobytes())
    return digest.hexdigest()
