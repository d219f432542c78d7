"""Makes a policy of a base model that has no chat template: python docs/own/model.py BASE_DIR POLICY_DIR"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
"""ChatML. What a message says must come out as it is, once, and nothing may depend on the messages after it: a turn is
added to the tokens that are there already."""


def make_policy(base: Path, out: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    # New control tokens, so that no text of a tool or a user can ever be one of them.
    added = tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    if added and len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    tokenizer.chat_template = TEMPLATE
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")  # it ends a turn
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    make_policy(Path(sys.argv[1]), Path(sys.argv[2]))
