"""Needles: a number that is hidden in a text at several depths, and whether a model still says it when asked."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, tensor

from s2attn.core import bad_kind, bad_value
from s2attn.lab.asking import Subject, Visit

HIDE = "\n\nThe pass key is {number}. Remember it: {number} is the pass key.\n\n"
ASK = "\n\nWhat is the pass key?"
REPLY = "The pass key is"


@dataclass(frozen=True, eq=False)
class Needle:
    """A prompt that hides a number and asks for it, followed by the number.

    Attributes:
        depth: share of the text that stands before the needle.
        tokens: prompt and number, int64 ``(T,)``.
        answer: how many of the last tokens are the number.
    """

    depth: float
    tokens: Tensor
    answer: int

    def found(self, subject: Subject, visit: Visit) -> bool:
        """Whether the model says the number: its most likely token is the right one at each place.

        That is greedy generation, in one reading.
        """
        logits = subject.logits(self.tokens[:-1], visit, self.answer)
        return logits.argmax(-1).tolist() == self.tokens[-self.answer :].tolist()


def needles(tokenizer: Any, filler: Sequence[int], *, first: int, last: int, count: int) -> list[Needle]:
    """Prompts as long as ``filler``, in the chat format of the tokenizer where it has one.

    Args:
        tokenizer: of Transformers, or anything that is called and decodes as it does.
        filler: tokens of a text to hide numbers in.
        first, last: the needles lie behind the ``first`` and before the ``last`` tokens of a prompt,
            evenly spread, so that sinks and a window of that size do not show them to the question.
        count: how many.

    Raises:
        ValueError: a filler that has no room for them.
        TypeError: not a tokenizer.
    """
    decode = getattr(tokenizer, "decode", None)
    if not callable(tokenizer) or not callable(decode):
        raise bad_kind("tokenizer", "must be a tokenizer of Transformers", tokenizer)
    writer, drawn = _Writer(tokenizer), random.Random(0)
    around = len(writer.prompt("", "", "00000"))
    room = len(filler) - around
    free = room - first - last
    if free < count:
        rule = f"must have a text of {around + first + last + count} tokens or more to hide {count} needles in"
        raise bad_value("tokens", rule, f"{len(filler)} tokens")
    made = []
    for i in range(count):
        place = first + (free * i // (count - 1) if count > 1 else free // 2)
        number = "".join(drawn.choice("123456789") for _ in range(5))
        before, after = (decode(list(part), skip_special_tokens=True) for part in (filler[:place], filler[place:room]))
        prompt = writer.prompt(before, after, number)
        whole = writer.prompt(before, after, number, said=f" {number}")
        same = next((j for j, pair in enumerate(zip(prompt, whole, strict=False)) if pair[0] != pair[1]), len(prompt))
        made.append(Needle(place / room, tensor(whole), len(whole) - same))
    return made


@dataclass(frozen=True, eq=False)
class _Writer:
    """Writes prompts with a tokenizer."""

    tokenizer: Any

    def prompt(self, before: str, after: str, number: str, said: str = "") -> list[int]:
        """The question, the beginning of the reply, and what was ``said`` of it so far."""
        content = before + HIDE.format(number=number) + after + ASK
        if getattr(self.tokenizer, "chat_template", None):
            messages = [{"role": "user", "content": content}]
            asked = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return self.encoded(asked + REPLY + said)
        # What the tokenizer puts before every text; an end behind it would end the reply.
        whole, bare = list(self.tokenizer(REPLY)["input_ids"]), self.encoded(REPLY)
        start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        return [*whole[:start], *self.encoded(f"{content}\n{REPLY}{said}")]

    def encoded(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
