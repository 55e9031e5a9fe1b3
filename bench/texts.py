"""What is asked: held-out word problems as the embedded checkpoint was trained on, and what it knows nothing of."""

from typing import Literal, get_args

from ..demo.tasks import held_out_tasks

Kind = Literal["on", "off"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_SUBJECTS = ["rain", "a violin", "the harbour", "old maps", "bees", "glaciers", "the stock market", "a broken clock"]
_ASKED = [
    "Who first wrote about {}?",
    "Tell a short story about {}.",
    "Why do people care for {}?",
    "Describe {} in French.",
]


def prompts(kind: Kind, count: int, seed: int) -> list[str]:
    """So many of a kind, all different; `seed` chooses problems."""
    if kind == "on":
        return [task.prompt for task in held_out_tasks("words", count, seed)]
    asked = [question.format(subject) for question in _ASKED for subject in _SUBJECTS]
    return [
        f"Question: {asked[number % len(asked)]}{' ' * (number // len(asked))}\nAnswer:" for number in range(count)
    ]


__all__ = ["KINDS", "Kind", "prompts"]
