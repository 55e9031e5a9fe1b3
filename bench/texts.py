"""What is asked: held-out problems such as the embedded checkpoint was trained on, and what it knows nothing of."""

from typing import Literal, get_args

from ..demo.problems import held_out_problems

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
        return [problem.prompt for problem in held_out_problems(count, seed)]
    asked = [question.format(subject) for question in _ASKED for subject in _SUBJECTS]
    return [
        f"Question: {asked[number % len(asked)]}{' ' * (number // len(asked))}\nAnswer:" for number in range(count)
    ]


__all__ = ["KINDS", "Kind", "prompts"]
