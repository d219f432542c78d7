"""Build a word-level tokenizer for small policies. It is saved and loaded like any other Hugging Face tokenizer.

A policy of half a million weights has no room for a vocabulary of 150,000 tokens, so it knows the domain's words only.
"""

import string
from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN, END_OF_TURN = "<|pad|>", "<|unknown|>", "<|im_end|>"
ROLE_TOKENS = tuple(f"<|{role}|>" for role in ("system", "user", "assistant", "tool"))

# One token opens a message and one ends it, which keeps a turn of a small policy short. Tools are listed by name and
# parameters only.
CHAT_TEMPLATE = (
    "{% if tools %}<|system|>{% for tool in tools %}"
    "{% set function = tool.function if tool.function is defined else tool %} {{ function.name }}"
    "{% for parameter in function.parameters.properties %} {{ parameter }}{% endfor %} ;"
    "{% endfor %}<|im_end|>{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """Build a tokenizer that knows the words of `vocabulary`. Text comes back from its tokens exactly.

    A word is one of these, together with the blank before it:

    - a run of letters, digits and `_`;
    - such a run as a tag (`<word>`, `</word>`) or in quotes (`"word"`);
    - any other single character.

    The first word of a text counts as having a blank before it. A word that also stands directly behind another one,
    such as `name` in `{name}`, must be listed in that form too. What is not listed becomes single ASCII characters;
    all other characters become the unknown token.
    """
    core = Tokenizer(models.WordPiece({}, unk_token=UNKNOWN, max_input_chars_per_word=200))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always", split=False),
            pre_tokenizers.Split(Regex(r'▁?</?\w+>|▁?"\w+"|▁?\w+|▁?[^\w▁]|▁'), "isolated"),
        ]
    )
    words = [piece for text in vocabulary for piece, _ in core.pre_tokenizer.pre_tokenize_str(text)]
    pieces = dict.fromkeys([PAD, UNKNOWN, END_OF_TURN, *ROLE_TOKENS, *words, "▁", *string.printable])
    core.model = models.WordPiece(
        {piece: index for index, piece in enumerate(pieces)},
        unk_token=UNKNOWN,
        continuing_subword_prefix="",
        max_input_chars_per_word=200,
    )
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    core.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in (PAD, UNKNOWN, END_OF_TURN, *ROLE_TOKENS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END_OF_TURN,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
