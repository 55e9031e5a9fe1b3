"""Questions in the form of each benchmark's, written for dry runs: by key, the rows of every split its tasks read."""

from typing import Any

_CHOICES = [
    ("How many legs does a spider have?", ["Six", "Eight", "Ten", "Four"], 1),
    ("Which of these is a metal?", ["Iron", "Wood", "Glass", "Paper"], 0),
    ("What is 7 times 8?", ["54", "48", "56", "63"], 2),
    ("Which planet is closest to the Sun?", ["Venus", "Earth", "Mars", "Mercury"], 3),
]
_SUMS = [
    ("Tom has 12 apples and buys 5 more. How many apples has he now?", "Tom has 12 + 5 = 17 apples.", 17),
    ("A box holds 6 eggs. How many eggs do 4 boxes hold?", "4 boxes hold 4 * 6 = 24 eggs.", 24),
    ("Mia had 30 beads and lost 11. How many are left?", "Mia has 30 - 11 = 19 beads left.", 19),
    ("20 cards are shared equally by 4 children. How many does each get?", "Each gets 20 / 4 = 5 cards.", 5),
]


def _mmlu() -> list[dict[str, Any]]:
    return [{"question": text, "choices": options, "answer": right} for text, options, right in _CHOICES]


def _mmlu_pro() -> list[dict[str, Any]]:
    return [
        {
            "question": text,
            "options": options,
            "answer": "ABCD"[right],
            "category": "math",
            "cot_content": f"A: Let's think step by step. It is {options[right]}. The answer is ({'ABCD'[right]}).",
        }
        for text, options, right in _CHOICES
    ]


def _arc() -> list[dict[str, Any]]:
    return [
        {"question": text, "choices": {"text": options, "label": list("ABCD")}, "answerKey": "ABCD"[right]}
        for text, options, right in _CHOICES
    ]


def _winogrande() -> list[dict[str, Any]]:
    rows = [
        ("The cup did not fit into the box because the _ was too small.", "cup", "box", "2"),
        ("Ana thanked Lucy because _ had been helped by her.", "Ana", "Lucy", "1"),
        ("The rope held the weight because the _ was strong.", "rope", "weight", "1"),
    ]
    return [{"sentence": text, "option1": one, "option2": two, "answer": right} for text, one, two, right in rows]


def _race() -> list[dict[str, Any]]:
    problems = [
        {"question": text, "options": options, "answer": "ABCD"[right]} for text, options, right in _CHOICES[:2]
    ]
    return [{"article": "Spiders have eight legs. Iron is a metal.", "problems": str(problems)}]


def _humaneval() -> list[dict[str, Any]]:
    rows = [
        ("add", "a, b", "Return the sum of a and b.", "candidate(2, 3) == 5"),
        ("twice", "a", "Return a times two.", "candidate(4) == 8"),
    ]
    return [
        {
            "task_id": f"local/{name}",
            "prompt": f'def {name}({arguments}):\n    """{what}"""\n',
            "entry_point": name,
            "test": f"def check(candidate):\n    assert {test}\n",
        }
        for name, arguments, what, test in rows
    ]


def _mbpp() -> list[dict[str, Any]]:
    rows = [
        ("largest", "max(items)", "[1, 7, 3]", 7),
        ("smallest", "min(items)", "[4, 2, 9]", 2),
        ("total", "sum(items)", "[1, 2]", 3),
    ]
    return [
        {
            "prompt": f"Write a function to find the {name} of a list of numbers.",
            "code": f"def {name}(items):\n    return {code}",
            "test_imports": [],
            "test_list": [f"assert {name}({given}) == {right}"],
        }
        for name, code, given, right in rows
    ]


def _gsm8k() -> list[dict[str, Any]]:
    return [{"question": text, "answer": f"{steps}\n#### {right}"} for text, steps, right in _SUMS]


def _math() -> list[dict[str, Any]]:
    return [
        {"problem": text, "solution": f"{steps} So the answer is $\\boxed{{{right}}}$."}
        for text, steps, right in _SUMS
    ]


def _lite() -> list[dict[str, Any]]:
    return [
        {"question": text, "answer": "ABCD"[right]} | {f"option_{l}": o for l, o in zip("abcd", options, strict=True)}
        for text, options, right in _CHOICES
    ]


def _mgsm_questions() -> list[dict[str, Any]]:
    """Of the set that is asked, which comes without worked answers."""
    return [{"question": text, "answer": None, "answer_number": right} for text, _, right in _SUMS]


def _mgsm() -> list[dict[str, Any]]:
    return [
        {
            "question": f"Question: {text}",
            "answer": f"Step-by-Step Answer: {steps} The answer is {right}.",
            "answer_number": right,
        }
        for text, steps, right in _SUMS
    ]


ROWS = {
    "mmlu": _mmlu,
    "mmlu_pro": _mmlu_pro,
    "arc_challenge": _arc,
    "winogrande": _winogrande,
    "race": _race,
    "humaneval": _humaneval,
    "mbpp": _mbpp,
    "gsm8k": _gsm8k,
    "math_500": _math,
    "mmlu_global_lite": _lite,
    "mgsm": _mgsm,
}
# Where the rows that are asked are of another form than those shown before them.
ASKED_ROWS = {"mgsm": _mgsm_questions}
