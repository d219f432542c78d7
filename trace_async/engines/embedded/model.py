"""Compute the forward pass of the embedded engine: Llama, Qwen2 and Qwen3 on packed tokens and a padded KV batch.

It is written by hand, because a decode step of a small model is mostly overhead of the modules around the
multiplications. Here query, key and value share one product, gate and up share another, and nothing is copied to
append a token.

The end of a tensor's name tells its dimensions: `_T` packed tokens of the step, `_B` rows, `_V` vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from trace_async.engine import EngineError, WeightSyncError
from trace_async.policy.cpu_linear import linear
from trace_async.policy.load import load_model

MODEL_TYPES = ("llama", "qwen2", "qwen3")
# These stretch positions by the length of the sequence, so cached KV would depend on what follows it.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The weights of one layer. Every matrix is [out, in]."""

    input_norm: Tensor
    qkv: Tensor
    """Query, key and value below each other: (heads + 2·kv_heads)·head_dim rows."""
    qkv_bias: Tensor | None
    qk_norm: Tensor | None
    """[heads + kv_heads, head_dim]; only Qwen3 has it."""
    out: Tensor
    post_norm: Tensor
    gate_up: Tensor
    """Gate and up below each other: 2·mlp rows."""
    down: Tensor


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """Consecutive rows of the batch that run attention together. The ends of ranges are exclusive."""

    first_token: int
    last_token: int
    """The tokens `first_token` to `last_token` of the packed step belong to these rows."""
    first_row: int
    last_row: int
    width: int
    """The most tokens that a row has in this step."""
    padded_T: Tensor | None
    """Index of each token in the padded [rows, width] (None: every row has one token)."""
    mask: Tensor
    """Added to the scores, [rows, 1, width, length]."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Which hidden states to read in a step. A state is the mean over some tokens of one row."""

    num_layers: int
    """Read after this many layers."""
    num_states: int
    tokens: Tensor
    """Indices [M] of the tokens that are read."""
    state: Tensor
    """For each of these tokens [M], the state that it belongs to."""
    counts: Tensor
    """How many tokens each state has, [num_states, 1]."""


class TorchModel:
    """A causal LM with fused weights, which can be updated in place by their Hugging Face names."""

    def __init__(self, path: Path, *, device: torch.device, dtype: str, max_context_tokens: int) -> None:
        """Load the model. Raises EngineError for an unsupported architecture, ValueError when there is no model."""
        model = load_model(path, dtype=dtype)
        config = model.config
        _check_supported(config, max_context_tokens)
        self.device = device
        self.vocab_size: int = model.get_input_embeddings().weight.shape[0]
        self.num_layers: int = config.num_hidden_layers
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.dtype: torch.dtype = model.dtype
        self._epsilon: float = config.rms_norm_eps
        self._targets: dict[str, Tensor] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._alias = "lm_head.weight" if config.tie_word_embeddings else None
        state = {name: tensor.detach().to(device) for name, tensor in model.state_dict().items()}
        self._embed = self._own(state, ["model.embed_tokens.weight"])
        self._layers = [self._layer(state, f"model.layers.{i}.") for i in range(self.num_layers)]
        self._norm = self._own(state, ["model.norm.weight"])
        self._head = self._embed if self._alias else self._own(state, ["lm_head.weight"])
        missing = set(state) - set(self._targets) - {self._alias}
        if missing:
            raise EngineError(f"{path}: weights that the torch engine does not know: {sorted(missing)[:4]}")
        positions = torch.arange(max_context_tokens)[None]
        cos, sin = model.model.rotary_emb(torch.zeros(1, dtype=torch.float32), positions)
        half = self.head_dim // 2
        # rotate_half(x)·sin is roll(x, half) times a sine whose first half is negated.
        signed = torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1)
        self._cos = cos[0].to(device, self.dtype)[:, None]
        self._sin = signed.to(device, self.dtype)[:, None]

    def _own(self, state: dict[str, Tensor], names: list[str]) -> Tensor:
        """Join the named weights to one tensor of ours, and keep a view of each for updates."""
        tensor = torch.cat([state[name] for name in names])
        parts = tensor.split([len(state[name]) for name in names])
        self._targets.update(zip(names, parts, strict=True))
        self._shapes.update((name, state[name].shape) for name in names)
        return tensor

    def _layer(self, state: dict[str, Tensor], at: str) -> LayerWeights:
        qkv = [f"{at}self_attn.{part}_proj." for part in "qkv"]
        qk_norm = None
        if f"{at}self_attn.q_norm.weight" in state:
            names = [f"{at}self_attn.{part}_norm.weight" for part in "qk"]
            num_heads = [self.num_heads, self.num_kv_heads]
            qk_norm = torch.cat([state[name].expand(num, -1) for name, num in zip(names, num_heads, strict=True)])
            self._targets.update(zip(names, qk_norm.split(num_heads), strict=True))
            self._shapes.update((name, state[name].shape) for name in names)
        return LayerWeights(
            input_norm=self._own(state, [f"{at}input_layernorm.weight"]),
            qkv=self._own(state, [f"{name}weight" for name in qkv]),
            qkv_bias=self._own(state, [f"{name}bias" for name in qkv]) if f"{qkv[0]}bias" in state else None,
            qk_norm=qk_norm,
            out=self._own(state, [f"{at}self_attn.o_proj.weight"]),
            post_norm=self._own(state, [f"{at}post_attention_layernorm.weight"]),
            gate_up=self._own(state, [f"{at}mlp.gate_proj.weight", f"{at}mlp.up_proj.weight"]),
            down=self._own(state, [f"{at}mlp.down_proj.weight"]),
        )

    def load(self, tensors: dict[str, Tensor]) -> bool:
        """Overwrite all weights, and return whether any changed.

        Raises WeightSyncError when names or shapes do not fit or a weight is not finite. Nothing is overwritten then.
        """
        tensors = {name: tensor for name, tensor in tensors.items() if name != self._alias}
        missing, unknown = sorted(set(self._targets) - set(tensors)), sorted(set(tensors) - set(self._targets))
        if missing or unknown:
            raise WeightSyncError(
                f"weights: {len(missing)} missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}"
            )
        changed = False
        # Everything is checked in a first pass, so that a refused update leaves the old weights whole.
        for name, target in self._targets.items():
            found, expected = tensors[name].shape, self._shapes[name]
            if found != expected:
                raise WeightSyncError(f"weights: {name} has shape {tuple(found)}, not {tuple(expected)}")
            tensors[name] = tensors[name].to(self.device, self.dtype)
            if not torch.isfinite(tensors[name]).all():
                raise WeightSyncError(f"weights: {name} is not finite; the training has diverged")
            changed = changed or not torch.equal(tensors[name].expand_as(target), target)
        for name, target in self._targets.items():
            target.copy_(tensors[name])
        return changed

    def forward(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        at_T: Tensor,
        last_B: Tensor,
        groups: list[AttentionGroup],
        kv: Tensor,
        reading: Reading | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Write the KV of all T packed tokens into `kv`, and return the logits [B, vocab] after the tokens `last_B`.

        Returns also the states [num_states, hidden], under the final norm, that `reading` asks for. Both are fp32.
        `at_T` is row·capacity + position of each token; `kv` is [layers, 2, rows, capacity, kv_heads, head_dim].
        """
        states = None
        x = F.embedding(ids_T, self._embed)
        cos, sin = self._cos[positions_T], self._sin[positions_T]
        num_q, num_k = self.num_heads, self.num_kv_heads
        width = (x.shape[-1],)
        for number, (layer, (keys, values)) in enumerate(zip(self._layers, kv, strict=True), start=1):
            h = F.rms_norm(x, width, layer.input_norm, self._epsilon)
            heads = linear(h, layer.qkv, layer.qkv_bias).view(len(x), num_q + 2 * num_k, self.head_dim)
            qk = heads[:, : num_q + num_k]
            if layer.qk_norm is not None:
                qk = F.rms_norm(qk, (self.head_dim,), None, self._epsilon) * layer.qk_norm
            qk = torch.addcmul(qk * cos, qk.roll(self.head_dim // 2, -1), sin)
            keys.view(-1, num_k, self.head_dim)[at_T] = qk[:, num_q:]
            values.view(-1, num_k, self.head_dim)[at_T] = heads[:, num_q + num_k :]
            parts = [self._attend(qk[:, :num_q], keys, values, group) for group in groups]
            h = parts[0] if len(parts) == 1 else torch.cat(parts)
            x = x + linear(h, layer.out)
            h = F.rms_norm(x, width, layer.post_norm, self._epsilon)
            gate, up = linear(h, layer.gate_up).chunk(2, dim=-1)
            x = x + linear(F.silu(gate) * up, layer.down)
            if reading is not None and number == reading.num_layers:
                states = self._read(x, reading)
        x = F.rms_norm(x[last_B], width, self._norm, self._epsilon)
        return linear(x, self._head).float(), states

    def _read(self, x: Tensor, reading: Reading) -> Tensor:
        picked = F.rms_norm(x[reading.tokens], (x.shape[-1],), self._norm, self._epsilon).float()
        sums = picked.new_zeros(reading.num_states, picked.shape[-1]).index_add_(0, reading.state, picked)
        return sums / reading.counts

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, group: AttentionGroup) -> Tensor:
        """Attend with one group's tokens over the KV of its rows. Returns [tokens, heads·head_dim].

        The query heads that share a KV head are put beside each other as further queries, so that no KV is repeated.
        """
        rows, width, length = group.last_row - group.first_row, group.width, group.mask.shape[-1]
        share = self.num_heads // self.num_kv_heads
        q = q[group.first_token : group.last_token]
        if group.padded_T is not None:
            padded = q.new_zeros(rows * width, self.num_heads, self.head_dim)
            padded[group.padded_T] = q
            q = padded
        q = q.view(rows, width, self.num_kv_heads, share, self.head_dim).permute(0, 2, 3, 1, 4)
        out = F.scaled_dot_product_attention(
            q.reshape(rows, self.num_kv_heads, share * width, self.head_dim),
            keys[group.first_row : group.last_row, :length].transpose(1, 2),
            values[group.first_row : group.last_row, :length].transpose(1, 2),
            attn_mask=group.mask if width == 1 else group.mask.repeat(1, 1, share, 1),
        )
        out = out.view(rows, self.num_kv_heads, share, width, self.head_dim).permute(0, 3, 1, 2, 4)
        out = out.reshape(rows * width, self.num_heads * self.head_dim)
        return out if group.padded_T is None else out[group.padded_T]


def _check_supported(config: object, max_context_tokens: int) -> None:
    model_type = getattr(config, "model_type", None)
    if model_type not in MODEL_TYPES:
        raise EngineError(
            f"engine.backend=torch runs {', '.join(MODEL_TYPES)}, not {model_type}: use engine.backend=sglang or vllm"
        )
    activation = getattr(config, "hidden_act", "silu")
    if activation != "silu":
        raise EngineError(
            f"engine.backend=torch does not run hidden_act={activation}: use engine.backend=sglang or vllm"
        )
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type in LENGTH_DEPENDENT_ROPE:
        raise EngineError(f"engine.backend=torch does not run rope_type={rope_type}: use engine.backend=sglang or vllm")
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        raise EngineError("engine.backend=torch does not run sliding windows: use engine.backend=sglang or vllm")
    limit = getattr(config, "max_position_embeddings", max_context_tokens)
    if max_context_tokens > limit:
        raise EngineError(f"sampling.max_context_tokens={max_context_tokens}: the model ends at {limit} positions")
