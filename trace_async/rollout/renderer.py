"""Turn messages into tokens and a turn's tokens into text, through the chat template of any Hugging Face tokenizer.

Token-in, token-out: what the model wrote is never tokenised again; only the text around it is. Contents are data: they
are put through the template as sentinels and encoded apart from it, so that no content can become a control token.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from trace_async.env import CUT_MARK
from trace_async.types import Json, Message, Prompt, Role

_REPLACEMENT = "\ufffd"

MAX_CHARS_PER_TOKEN = 64
"""Before a text is tokenised it is cut to so many characters for each token that may be kept of it: tokenising 28 MB
takes half a minute, and no text of use has longer tokens on average."""


class Renderer:
    """Renders with `tokenizer`'s chat template; raises ValueError where the template cannot be used.

    `max_observation_tokens` (0: no limit): the content of each message of an observation is cut to so many tokens, of
    which the last ones say so (`CUT_MARK`). `end_token_ids`: tokens that end a turn besides the tokenizer's own.
    `template_kwargs`: variables for the template, such as `enable_thinking`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_observation_tokens: int = 0,
        end_token_ids: Sequence[int] = (),
        template_kwargs: Mapping[str, Json] | None = None,
    ) -> None:
        if not tokenizer.chat_template:
            raise ValueError(f"the tokenizer {_name(tokenizer)} has no chat template")
        if not tokenizer.is_fast:
            raise ValueError(f"the tokenizer {_name(tokenizer)} is not a fast tokenizer (tokenizer.json is missing)")
        self._tokenizer = tokenizer
        self._max_observation_tokens = max_observation_tokens
        self._template_kwargs = dict(template_kwargs or {})
        added = dict(tokenizer.added_tokens_decoder)
        self._added_texts = tuple(token.content for token in added.values())
        # The unknown token stands for any odd word, so it is no control token although it is listed as added.
        self._control_ids = frozenset(added) - {tokenizer.unk_token_id}
        # An own copy of the core: in it, control tokens in a text are never matched as such.
        self._data_core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._data_core.encode_special_tokens = True
        self._data_core.no_truncation()
        self._data_core.no_padding()
        self._cut_mark = tuple(self.encode_data(CUT_MARK))
        if 0 < max_observation_tokens <= len(self._cut_mark):
            raise ValueError(
                f"max_observation_tokens={max_observation_tokens}: the mark {CUT_MARK!r} alone takes "
                f"{len(self._cut_mark)} tokens of {_name(tokenizer)}"
            )
        self._encode_template = lru_cache(maxsize=512)(self._encode_template_text)
        self._template_pieces = lru_cache(maxsize=512)(self._make_template_pieces)
        self._end_of_turn_id = self._find_end_of_turn()
        eos = tokenizer.eos_token_id
        ends = [self._end_of_turn_id, *_as_ids(eos), *end_token_ids]
        self.stop_token_ids: tuple[int, ...] = tuple(dict.fromkeys(ends))
        self.vocab_size: int = len(tokenizer)

    def render_prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """Return the tokens of the prompt up to and including the generation prompt."""
        self._check_tools(prompt.tools)
        tools = json.dumps([dict(tool) for tool in prompt.tools])
        pieces = self._template_pieces(_roles(prompt.messages), tools)
        if prompt.tools and pieces == self._template_pieces(_roles(prompt.messages), "[]"):
            raise self._template_error(
                f"it does not show tools, so the model would never see the environment's {len(prompt.tools)}; let the "
                "environment describe them in its messages, or use a model whose template has them"
            )
        return self._encode(pieces, prompt.messages)

    def render_observation(self, messages: Sequence[Message], *, turn_ended: bool) -> tuple[int, ...]:
        """Return the tokens between the model's turn and its next one, next generation prompt included.

        `turn_ended`: the turn's own tokens end with the end-of-turn token; otherwise (cut at its limit) it comes first.
        """
        turn = (Message(role="user", content=""), Message(role="assistant", content=""))
        pieces = self._template_pieces(_roles((*turn, *messages)), "[]")
        if [index for _, index in pieces[:2]] != [0, 1]:
            raise self._template_error("the assistant's turn does not follow the user's message")
        token_ids = self._encode(pieces[2:], (*turn, *messages), max_content_tokens=self._max_observation_tokens)
        start = token_ids.index(self._end_of_turn_id) + 1 if turn_ended else 0
        return token_ids[start:]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of a turn without its end-of-turn token."""
        end = len(token_ids)
        while end and token_ids[end - 1] in self.stop_token_ids:
            end -= 1
        text: str = self._tokenizer.decode(list(token_ids[:end]), clean_up_tokenization_spaces=False)
        return text

    def read_message(self, token_ids: Sequence[int]) -> dict[str, Json] | None:
        """Return a turn as the tokenizer's response template reads it (role, content, tool_calls, …), if it has one."""
        if getattr(self._tokenizer, "response_template", None) is None:
            return None
        try:
            message = self._tokenizer.parse_response(list(token_ids), prefix="")
        except ValueError:  # the turn does not keep to the template: the model's doing
            return None
        return message if isinstance(message, dict) else None

    def encode_data(self, text: str) -> list[int]:
        """Return the tokens of `text` as data: no id of an added token ever comes out, whatever the text spells."""
        # A lone surrogate, which UTF-8 cannot hold, becomes "?": offsets stay those of `text`.
        encoding = self._data_core.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False)
        token_ids = encoding.ids
        if self._control_ids.isdisjoint(token_ids):
            return token_ids
        spans = zip(token_ids, encoding.offsets, strict=True)
        starts = [start for token_id, (start, _) in spans if token_id in self._control_ids]
        if len(text) == 1:
            return [] if text == _REPLACEMENT else self.encode_data(_REPLACEMENT)
        # Tokens that are added but not "special" are matched all the same; cut inside them and they are plain text.
        cuts = sorted({0, len(text), *(start + 1 if start + 1 < len(text) else start for start in starts)})
        pieces = [text[start:end] for start, end in pairwise(cuts)]
        return [token_id for piece in pieces for token_id in self.encode_data(piece)]

    def _encode(
        self,
        pieces: Sequence[tuple[str, int | None]],
        messages: Sequence[Message],
        *,
        max_content_tokens: int = 0,
    ) -> tuple[int, ...]:
        token_ids: list[int] = []
        for text, index in pieces:
            if text:
                token_ids += self._encode_template(text)
            if index is not None:
                written = messages[index].token_ids
                token_ids += (
                    self._encode_content(messages[index].content, max_content_tokens) if written is None else written
                )
        return tuple(token_ids)

    def _encode_content(self, text: str, max_tokens: int) -> list[int]:
        """Return the tokens of a text, at most `max_tokens` (0: no limit); what was cut ends with the mark."""
        if not max_tokens:
            return self.encode_data(text)
        most_chars = max_tokens * MAX_CHARS_PER_TOKEN
        content = self.encode_data(text[:most_chars])
        if len(content) <= max_tokens and len(text) <= most_chars:
            return content
        return [*content[: max_tokens - len(self._cut_mark)], *self._cut_mark]

    def _encode_template_text(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"])

    def _make_template_pieces(self, roles: tuple[Role, ...], tools: str) -> list[tuple[str, int | None]]:
        """Return the template's text in pieces, each but the last with the index of the message that follows it."""
        sentinels = [f"content{index}of{len(roles)}x7f3a9c" for index in range(len(roles))]
        chat = [{"role": role, "content": mark} for role, mark in zip(roles, sentinels, strict=True)]
        try:
            text = self._tokenizer.apply_chat_template(
                chat,
                tools=json.loads(tools) or None,
                tokenize=False,
                add_generation_prompt=True,
                **self._template_kwargs,
            )
        except TemplateError as error:
            raise self._template_error(f"it refuses messages of the roles {', '.join(roles)}: {error}") from error
        positions = sorted((text.find(mark), index) for index, mark in enumerate(sentinels))
        pieces: list[tuple[str, int | None]] = []
        done = 0
        for position, index in positions:
            mark = sentinels[index]
            if text.count(mark) != 1:
                raise self._template_error(
                    f"the content of message {index} ({roles[index]}) comes out "
                    f"{text.count(mark)} times instead of once, verbatim"
                )
            pieces.append((text[done:position], index))
            done = position + len(mark)
        return [*pieces, (text[done:], None)]

    def _find_end_of_turn(self) -> int:
        pieces = self._template_pieces(("user", "assistant", "user"), "[]")
        for token_id in self._encode_template(pieces[2][0]):
            if token_id in self._control_ids:
                return token_id
        raise self._template_error("no control token ends the assistant's turn")

    def _check_tools(self, tools: Sequence[Mapping[str, Json]]) -> None:
        if not tools:
            return
        schemas = json.dumps([dict(tool) for tool in tools], ensure_ascii=False)
        for text in self._added_texts:
            if text in schemas:
                raise ValueError(f"a tool schema contains the control token {text!r}")

    def _template_error(self, problem: str) -> ValueError:
        head = " ".join(str(self._tokenizer.chat_template).split())[:80]
        return ValueError(f"chat template of {_name(self._tokenizer)} ({head!r} …): {problem}")


def _roles(messages: Sequence[Message]) -> tuple[Role, ...]:
    return tuple(message.role for message in messages)


def _as_ids(eos: int | list[int] | None) -> list[int]:
    if eos is None:
        return []
    return list(eos) if isinstance(eos, list) else [eos]


def _name(tokenizer: PreTrainedTokenizerFast) -> str:
    return tokenizer.name_or_path or type(tokenizer).__name__
