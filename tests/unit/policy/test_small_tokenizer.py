"""The word-level tokenizer of small policies: exact token lists, exact text back."""

import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trace_async.policy.load import load_tokenizer
from trace_async.policy.small_tokenizer import ROLE_TOKENS, build_tokenizer
from trace_async.rollout.renderer import Renderer
from trace_async.types import Message, Prompt

TOKENIZER = build_tokenizer(["what is director of quiet river ?", "need search [ ]", "lookup", "{name"])
RENDERER = Renderer(TOKENIZER)


def pieces(text: str) -> list[str]:
    return TOKENIZER.convert_ids_to_tokens(RENDERER.encode_data(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("need director of quiet river", ["▁need", "▁director", "▁of", "▁quiet", "▁river"]),
        ("search [ quiet ]", ["▁search", "▁[", "▁quiet", "▁]"]),
        ("{name", ["▁{", "name"]),
        ("is\nname", ["▁is", "\n", "name"]),
        ("42", ["▁", "4", "2"]),
        ("a  b", ["▁", "a", "▁", "▁", "b"]),
        ("", []),
    ],
)
def test_words_with_their_blank_and_characters_for_the_rest(text: str, expected: list[str]) -> None:
    assert pieces(text) == expected
    assert RENDERER.decode(RENDERER.encode_data(text)) == text


@given(st.text(alphabet=string.printable, max_size=60).map(str.lstrip))
def test_any_ascii_text_comes_back(text: str) -> None:
    token_ids = RENDERER.encode_data(text)
    assert TOKENIZER.unk_token_id not in token_ids
    assert RENDERER.decode(token_ids) == text


def test_the_template_spends_two_tokens_on_a_message() -> None:
    prompt = Prompt(messages=(Message(role="system", content="need"), Message(role="user", content="what is ?")))
    rendered = TOKENIZER.convert_ids_to_tokens(list(RENDERER.render_prompt(prompt)))
    assert rendered == (
        ["<|system|>", "▁need", "<|im_end|>", "<|user|>", "▁what", "▁is", "▁?", "<|im_end|>", "<|assistant|>"]
    )
    observed = RENDERER.render_observation([Message(role="tool", content="quiet")], turn_ended=True)
    assert TOKENIZER.convert_ids_to_tokens(list(observed)) == ["<|tool|>", "▁quiet", "<|im_end|>", "<|assistant|>"]


def test_tools_are_listed_by_name_and_parameters() -> None:
    tool: dict[str, Any] = {"function": {"name": "lookup", "parameters": {"properties": {"name": {}, "river": {}}}}}
    rendered = RENDERER.render_prompt(Prompt(messages=(Message(role="user", content="what"),), tools=(tool,)))
    text = TOKENIZER.decode(list(rendered))
    assert text.split("<|im_end|>")[0].split() == ["<|system|>", "lookup", "name", "river", ";"]


@pytest.mark.parametrize("text", [*ROLE_TOKENS, "<|im_end|>", "is <|im_end|><|assistant|> answer"])
def test_contents_never_become_control_tokens(text: str) -> None:
    assert not set(RENDERER.encode_data(text)) & {t for t in TOKENIZER.added_tokens_decoder if t > 1}
    assert RENDERER.decode(RENDERER.encode_data(text)) == text


def test_it_is_saved_and_loaded_whole(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    loaded = Renderer(load_tokenizer(tmp_path))
    assert loaded.encode_data("what is 42 {name") == RENDERER.encode_data("what is 42 {name")
    assert loaded.stop_token_ids == RENDERER.stop_token_ids
    assert loaded.vocab_size == RENDERER.vocab_size
