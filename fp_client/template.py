"""The Alpaca prompt, and one example as token ids with its loss on the response only. Torch-free.

The prompt and the response are tokenised apart, so that the prompt's tokens in training are the ones a
person's prompt gets in use. An example longer than the window loses the END of its input (of its
instruction where it has no input); the preamble, the ``### Response:`` marker and the response stay
whole. A response that leaves no room for those is an error, never cut in silence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

HEAD_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n"
)
HEAD = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n"
)
INPUT = "\n\n### Input:\n"
TAIL = "\n\n### Response:\n"

IGNORE = -100
"""The label of a position that carries no loss."""


@dataclass(frozen=True)
class Example:
    """One row of Alpaca-form data; `line` is where a person finds it (1-based)."""

    instruction: str
    input: str
    output: str
    line: int


@dataclass(frozen=True)
class Encoded:
    """Token ids of prompt + response + EOS; `prompt` of them carry no loss."""

    ids: tuple[int, ...]
    prompt: int


def prompt(instruction: str, context: str = "") -> str:
    """The whole prompt, up to and including the response marker."""
    head, body = _parts(instruction, context)
    return head + body + TAIL


def _parts(instruction: str, context: str) -> tuple[str, str]:
    if context:
        return HEAD_WITH_INPUT, instruction + INPUT + context
    return HEAD, instruction


def encode(example: Example, tokenizer: Any, window: int) -> Encoded | int:
    """An example in at most `window` tokens, or, when it can't be, the least window that would hold it.

    `tokenizer` is a Hugging Face tokenizer; its own leading special tokens are kept.
    """
    head, body = _parts(example.instruction, example.input)
    response = list(tokenizer(example.output, add_special_tokens=False)["input_ids"])
    if tokenizer.eos_token_id is not None:
        response.append(int(tokenizer.eos_token_id))
    ids = list(tokenizer(head + body + TAIL)["input_ids"])
    if len(ids) + len(response) > window:
        tail = list(tokenizer(TAIL, add_special_tokens=False)["input_ids"])
        least = len(tokenizer(head)["input_ids"]) + 1 + len(tail) + len(response)
        if least > window:
            return least
        ids = list(tokenizer(head + body)["input_ids"])[: window - len(tail) - len(response)] + tail
    return Encoded(tuple([*ids, *response]), len(ids))
