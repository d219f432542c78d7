"""Weights on their way to a server, and the proof that they arrived; a dictionary stands in for the server."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from trace_async.engine import WeightSyncError
from trace_async.engines.servers.weight_files import weight_folder
from trace_async.engines.servers.weight_record import RECEIVED, WeightRecord, expected_digests
from trace_async.weights import WeightUpdate, pack_weights

EMPTY = hashlib.sha256().hexdigest()


def sha(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def small_weights(scale: float = 1.0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    at = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (3, 2),
        f"{at}self_attn.q_proj.weight": (4, 2),
        f"{at}self_attn.k_proj.weight": (2, 2),
        f"{at}self_attn.v_proj.weight": (2, 2),
        f"{at}self_attn.q_norm.weight": (2,),
        f"{at}mlp.gate_proj.weight": (5, 2),
        f"{at}mlp.up_proj.weight": (5, 2),
        f"{at}mlp.down_proj.weight": (2, 5),
    }
    return {
        name: (scale * torch.arange(1, 1 + int(np.prod(shape)), dtype=torch.float32)).reshape(shape).to(dtype)
        for name, shape in shapes.items()
    }


@pytest.fixture
def policy_path(tmp_path: Path) -> Path:
    save_file(small_weights(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    return tmp_path


def test_digests_of_fused_parameters_are_those_of_their_parts_in_order():
    weights = small_weights()
    digests = expected_digests(weights, torch.float32)
    arrays = {name: tensor.numpy() for name, tensor in weights.items()}
    at = "model.layers.0."
    assert digests[f"{at}mlp.down_proj.weight"] == sha(arrays[f"{at}mlp.down_proj.weight"])
    assert digests[f"{at}self_attn.qkv_proj.weight"] == sha(
        *(arrays[f"{at}self_attn.{part}_proj.weight"] for part in "qkv")
    )
    assert digests[f"{at}mlp.gate_up_proj.weight"] == sha(
        arrays[f"{at}mlp.gate_proj.weight"], arrays[f"{at}mlp.up_proj.weight"]
    )
    assert f"{at}self_attn.qkv_norm.weight" not in digests


def test_digests_are_of_the_engines_dtype():
    in_half = expected_digests(small_weights(dtype=torch.bfloat16), torch.float32)
    assert in_half == expected_digests(small_weights(), torch.float32)  # these numbers are exact in bfloat16
    name = "model.embed_tokens.weight"
    # 1.0 … 6.0 in bfloat16 are the upper halves of the same numbers in fp32.
    expected = hashlib.sha256(bytes.fromhex("803f004040408040a040c040")).hexdigest()
    assert expected_digests(small_weights(), torch.bfloat16)[name] == expected


def test_what_the_server_repacked_or_split_cannot_prove_and_is_left_out(policy_path):
    found = expected_digests(small_weights(), torch.float32)
    found["model.layers.0.mlp.down_proj.weight"] = EMPTY
    found["model.embed_tokens.weight"] = found["model.embed_tokens.weight"][:16]
    found["rank1:model.norm.weight"] = "12" * 32
    record = WeightRecord(policy_path, torch.float32, found)
    assert "model.layers.0.mlp.down_proj.weight" not in record.provable
    assert "rank1:model.norm.weight" not in record.provable
    assert {"model.embed_tokens.weight", "model.layers.0.self_attn.qkv_proj.weight"} <= record.provable
    new = small_weights(2.0)
    record.require_loaded(new, expected_digests(new, torch.float32) | {"model.layers.0.mlp.down_proj.weight": EMPTY})


def test_a_parameter_that_stayed_as_it_was_is_found(policy_path):
    before = expected_digests(small_weights(), torch.float32)
    record = WeightRecord(policy_path, torch.float32, before)
    new = small_weights(2.0)
    found = expected_digests(new, torch.float32)
    stale = "model.layers.0.self_attn.q_norm.weight"
    with pytest.raises(WeightSyncError, match=r"q_norm.*of 1"):
        record.require_loaded(new, found | {stale: before[stale]})
    record.require_loaded(new, found | {f"{RECEIVED}{stale}": found[stale]})
    with pytest.raises(WeightSyncError, match="received:"):
        record.require_loaded(new, found | {f"{RECEIVED}{stale}": before[stale]})


def test_the_same_weights_again_are_right_as_the_same_version_and_wrong_as_another(policy_path):
    record = WeightRecord(policy_path, torch.float32, {})
    assert record.has(pack_weights(small_weights(), 0).manifest)
    assert not record.has(pack_weights(small_weights(2.0), 1).manifest)
    with pytest.raises(WeightSyncError, match="version 1 are the same as those of version 0"):
        record.has(pack_weights(small_weights(), 1).manifest)
    record.set(pack_weights(small_weights(2.0), 1).manifest)
    assert record.policy_version == 1
    assert record.has(pack_weights(small_weights(2.0), 1).manifest)


@pytest.mark.parametrize("fault", ["missing", "unknown", "shape"])
def test_names_and_shapes_must_be_the_policys(policy_path, fault):
    record = WeightRecord(policy_path, torch.float32, {})
    weights = small_weights(2.0)
    record.require_names(weights)
    if fault == "missing":
        del weights["model.embed_tokens.weight"]
    elif fault == "unknown":
        weights["model.extra"] = torch.zeros(1)
    else:
        weights["model.embed_tokens.weight"] = torch.zeros(2, 3)
    with pytest.raises(WeightSyncError, match="1 weights are missing, unknown or of another shape"):
        record.require_names(weights)


def test_a_tied_head_in_the_file_is_no_weight_of_its_own(policy_path):
    weights = small_weights()
    save_file(
        {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, policy_path / "model.safetensors"
    )
    WeightRecord(policy_path, torch.float32, {}).require_names(weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
async def test_the_folder_holds_the_update_and_goes_away(tmp_path, dtype):
    update = pack_weights(small_weights(3.0, dtype), 4)
    async with weight_folder(update, folders=(tmp_path,)) as (folder, tensors):
        assert folder.parent == tmp_path
        loaded = load_file(folder / "model.safetensors")
        assert loaded.keys() == tensors.keys() == update.tensors.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in small_weights(3.0, dtype).items())
        assert loaded["model.embed_tokens.weight"].dtype == dtype
    assert list(tmp_path.iterdir()) == []


async def test_arrays_out_of_shared_memory_are_only_read(tmp_path):
    update = pack_weights(small_weights(), 4)
    for array in update.tensors.values():
        array.flags.writeable = False
    async with weight_folder(update, folders=(tmp_path,)) as (_, tensors):
        assert len(tensors) == 8


async def test_the_first_folder_with_room_to_spare_is_taken(tmp_path, monkeypatch):
    update = pack_weights(small_weights(), 1)
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir()
    large.mkdir()
    real = shutil.disk_usage(tmp_path)
    too_little = 2 * update.manifest.num_bytes

    def usage(path):
        return real._replace(free=too_little if path == small else too_little + 1)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    async with weight_folder(update, folders=(small, large)) as (folder, _):
        assert folder.parent == large
    async with weight_folder(update, folders=(small, small)) as (folder, _):
        assert folder.parent == small  # there is no other


async def test_corrupt_bytes_never_reach_the_engine(tmp_path):
    update = pack_weights(small_weights(), 7)
    update.tensors["model.embed_tokens.weight"][1, 1] += 1
    with pytest.raises(WeightSyncError):
        async with weight_folder(update, folders=(tmp_path,)):
            pytest.fail("the engine was given a corrupt update")
    assert list(tmp_path.iterdir()) == []


async def test_an_update_by_path_stays_where_it_is(policy_path, tmp_path):
    update = WeightUpdate(manifest=pack_weights(small_weights(), 2).manifest, path=policy_path)
    async with weight_folder(update, folders=(tmp_path,)) as (folder, _):
        assert folder == policy_path
    assert (policy_path / "model.safetensors").exists()
    save_file(small_weights(2.0), policy_path / "model.safetensors")
    with pytest.raises(WeightSyncError):
        async with weight_folder(update, folders=(tmp_path,)):
            pytest.fail("the engine was given other weights")
