"""The renderer on the chat templates of SmolLM2, Qwen3 and Llama 3."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.chat_templates import LLAMA3, QWEN3, SMOLLM2
from trace_async.config import ConfigError, config_from_yaml
from trace_async.policy.load import end_token_ids, load_renderer
from trace_async.rollout.renderer import Renderer
from trace_async.types import Message, Prompt

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINKING = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
LLAMA = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>")
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {}}},
}


def bytes_tokenizer(template: str, special: tuple[str, ...], plain: tuple[str, ...] = (), **named: str):
    """One token a byte, beside a family's control tokens."""
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    core.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **named)


TOKENIZERS = {
    # As the real one has it, the unknown token is a control token.
    "smollm2": bytes_tokenizer(SMOLLM2, CHATML, eos_token="<|im_end|>", unk_token="<|endoftext|>"),
    "qwen3": bytes_tokenizer(QWEN3, CHATML, THINKING, eos_token="<|im_end|>", pad_token="<|endoftext|>"),
    "llama3": bytes_tokenizer(LLAMA3, LLAMA, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"),
}
KWARGS: dict[str, dict[str, Any]] = {
    "smollm2": {},
    "qwen3": {"enable_thinking": False},
    "llama3": {"date_string": "26 Jul 2024"},
}
RENDERERS = {name: Renderer(tokenizer, template_kwargs=KWARGS[name]) for name, tokenizer in TOKENIZERS.items()}


def text_of(family: str, token_ids) -> str:
    return TOKENIZERS[family].decode(list(token_ids))


def message(role, content: str) -> Message:
    return Message(role=role, content=content)


def test_smollm2_speaks_of_itself_where_no_system_message_is_given():
    default = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    question = "<|im_start|>user\nwho?<|im_end|>\n<|im_start|>assistant\n"
    asked = RENDERERS["smollm2"].render_prompt(Prompt(messages=(message("user", "who?"),)))
    assert text_of("smollm2", asked) == default + question
    own = Prompt(messages=(message("system", "be brief"), message("user", "who?")))
    expected = "<|im_start|>system\nbe brief<|im_end|>\n" + question
    assert text_of("smollm2", RENDERERS["smollm2"].render_prompt(own)) == expected


def test_tools_that_a_template_would_swallow_are_refused():
    prompt = Prompt(messages=(message("user", "look"),), tools=(TOOL, TOOL))
    with pytest.raises(ValueError, match="does not show tools, so the model would never see the environment's 2"):
        RENDERERS["smollm2"].render_prompt(prompt)
    for family in ("qwen3", "llama3"):
        assert '"look"' in text_of(family, RENDERERS[family].render_prompt(prompt))


def test_qwen3_thinks_unless_told_not_to():
    prompt = Prompt(messages=(message("user", "2+2"),))
    asked = "<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n"
    thinking = Renderer(TOKENIZERS["qwen3"])
    assert text_of("qwen3", thinking.render_prompt(prompt)) == asked
    assert text_of("qwen3", RENDERERS["qwen3"].render_prompt(prompt)) == asked + "<think>\n\n</think>\n\n"
    seen = RENDERERS["qwen3"].render_observation([message("tool", "4")], turn_ended=True)
    expected = "\n<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert text_of("qwen3", seen) == expected + "<think>\n\n</think>\n\n"


def test_llama3_has_a_date_that_can_be_held_and_quotes_what_tools_say():
    prompt = Prompt(messages=(message("user", "hi"),))
    expected = (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert text_of("llama3", RENDERERS["llama3"].render_prompt(prompt)) == expected
    seen = RENDERERS["llama3"].render_observation([message("tool", "4")], turn_ended=False)
    expected = (
        '<|eot_id|><|start_header_id|>ipython<|end_header_id|>\n\n"4"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert text_of("llama3", seen) == expected


PIECES = [*CHATML, *THINKING, *LLAMA, "need a of b ; search [ c ]", "\n", " 12 ", "é日", "{{ x }}"]
CONTENT = st.lists(st.sampled_from(PIECES), max_size=5).map("".join)


@pytest.mark.parametrize("family", list(RENDERERS))
@settings(max_examples=60, deadline=None)
@given(contents=st.tuples(CONTENT, CONTENT, CONTENT))
def test_no_content_becomes_a_control_token_and_all_of_it_arrives(family, contents):
    renderer, tokenizer = RENDERERS[family], TOKENIZERS[family]
    control = set(tokenizer.added_tokens_decoder)

    def rendered(system: str, user: str, tool: str) -> list[int]:
        prompt = Prompt(messages=(message("system", system), message("user", user)))
        observation = renderer.render_observation([message("tool", tool)], turn_ended=True)
        return [*renderer.render_prompt(prompt), *observation]

    plain, found = rendered("", "", ""), rendered(*contents)
    assert [t for t in found if t in control] == [t for t in plain if t in control]
    assert len(found) - len(plain) == sum(len(content.encode()) for content in contents)


@pytest.mark.parametrize("family", list(RENDERERS))
@settings(max_examples=40, deadline=None)
@given(words=st.tuples(*[st.text("abc xyz.", min_size=1, max_size=12).filter(lambda t: t == t.strip())] * 3))
def test_turn_by_turn_is_what_the_template_says_of_the_whole(family, words):
    """Prompt, turn and observation put together are the template's own text of the conversation."""
    renderer, (question, turn, answer) = RENDERERS[family], words
    end = renderer.stop_token_ids[0]
    ids = [*renderer.render_prompt(Prompt(messages=(message("user", question),))), *renderer.encode_data(turn), end]
    ids += renderer.render_observation([message("tool", answer)], turn_ended=True)
    chat = [{"role": r, "content": c} for r, c in zip(("user", "assistant", "tool"), words, strict=True)]
    expected = TOKENIZERS[family].apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True, **KWARGS[family]
    )
    found = text_of(family, ids)
    if family == "qwen3":  # without its empty thought, which the template shows only where it is generated
        found = found.replace("<think>\n\n</think>\n\n", "", 1)
    assert found == expected


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [2, 5, 6]}, {"eos_token_id": 2}, (2, 5, 6)),
        ({"eos_token_id": 5}, {"eos_token_id": [2, 6]}, (5, 2, 6)),
        (None, {"eos_token_id": 0}, (0,)),
        ({}, {"eos_token_id": None}, ()),
    ],
)
def test_every_end_token_that_the_folder_names_is_found(tmp_path, generation, config, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert end_token_ids(tmp_path) == expected


def test_an_end_token_that_is_no_number_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": ["<|im_end|>"]}))
    with pytest.raises(ValueError, match=r"config\.json: eos_token_id=<\|im_end\|>"):
        end_token_ids(tmp_path)


def test_every_end_token_ends_a_turn_and_none_is_in_its_text(tmp_path):
    tokenizer = TOKENIZERS["llama3"]
    tokenizer.save_pretrained(tmp_path)
    ends = [tokenizer.convert_tokens_to_ids(text) for text in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    renderer = load_renderer(tmp_path)
    assert sorted(renderer.stop_token_ids) == sorted(ends)
    assert renderer.stop_token_ids[0] == ends[2]  # what ends a message in the template comes first
    for end in ends:
        assert renderer.decode([*renderer.encode_data("done"), end]) == "done"


def test_variables_of_the_template_are_a_setting_that_cannot_replace_ours():
    config = config_from_yaml("policy: {chat_template_kwargs: {enable_thinking: false}}")
    assert config.policy.chat_template_kwargs == {"enable_thinking": False}
    with pytest.raises(ConfigError, match=r"policy\.chat_template_kwargs\.tools=.*is set by the trainer"):
        config_from_yaml("policy: {chat_template_kwargs: {tools: []}}")
