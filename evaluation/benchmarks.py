"""
The eleven benchmarks of NVIDIA's model card, with its shots and its two columns, as tasks of lm-evaluation-harness.

The card says no more than names, shots and scores. Prompts, stop strings and what is taken for the answer are those of
lm-eval's tasks where it has one of the kind; where it has none (answers chosen by letter, which scores as high as the
card's need, and code that is run here) the tasks are ours, below. So differences of a point between a column of the
card and one measured here may be the prompt's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .running import passes_tests

LETTERS = "ABCDE"
LITE_LANGUAGES = ("ar", "bn", "de", "en", "es", "fr", "hi", "id", "it", "ja", "ko", "pt", "sw", "yo", "zh")
MGSM_LANGUAGES = ("bn", "de", "en", "es", "fr", "ja", "ru", "sw", "te", "th", "zh")


@dataclass(frozen=True)
class Benchmark:
    """
    One line of the card.

    Args:
        name: as the card's.
        key: as in files and options.
        shots: the card's.
        ar, diffusion: the card's scores in percent.
        tasks: of lm-eval, by name, or configurations of our own.
        metric: of those tasks, right or wrong per question.
        filter: of lm-eval, what is taken for the answer; "none" where it takes all.
        folder: of lm-eval's tasks, where those are.
        dry_task: the one that stands for all in a dry run; default the only one.
        runs_code: whether answers are programs, to be run.
        note: what the reader of a figure should know.
    """

    name: str
    key: str
    shots: int
    ar: float
    diffusion: float
    tasks: tuple[str | dict[str, Any], ...]
    metric: str
    filter: str = "none"
    folder: str | None = None
    dry_task: str | None = None
    runs_code: bool = False
    note: str = ""


def choice_text(question: str, options: list[str]) -> str:
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question.strip(), *lines, "Answer:"])


def arc_text(doc: dict[str, Any]) -> str:
    return choice_text(f"Question: {doc['question']}", doc["choices"]["text"])


def arc_target(doc: dict[str, Any]) -> str:
    return LETTERS[doc["choices"]["label"].index(doc["answerKey"])]


def race_questions(docs: Any) -> Any:
    """One question a row, from articles with several, kept as the text of a list."""
    import ast

    from datasets import Dataset

    return Dataset.from_list(
        [
            {"article": doc["article"], **problem}
            for doc in docs
            for problem in (ast.literal_eval(doc["problems"]) if isinstance(doc["problems"], str) else doc["problems"])
        ]
    )


def race_text(doc: dict[str, Any]) -> str:
    return f"Article: {doc['article']}\n\n" + choice_text(f"Question: {doc['question']}", doc["options"])


def lite_text(doc: dict[str, Any]) -> str:
    return choice_text(doc["question"], [doc[f"option_{letter}"] for letter in "abcd"])


def mbpp_text(doc: dict[str, Any]) -> str:
    tests = "\n".join(doc["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {doc['prompt']} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def humaneval_right(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    program = "\n".join([doc["prompt"] + results[0], doc["test"], f"check({doc['entry_point']})"])
    return {"passed": float(passes_tests(program))}


def mbpp_right(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    program = "\n".join([results[0], *doc.get("test_imports", []), *doc["test_list"]])
    return {"passed": float(passes_tests(program))}


def generated(task: str, text: Callable[..., str], target: Any, **more: Any) -> dict[str, Any]:
    """A task whose answer is a letter that the model writes."""
    return {
        "task": task,
        "output_type": "generate_until",
        "doc_to_text": text,
        "doc_to_target": target,
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [_mean("exact_match", ignore_case=True, ignore_punctuation=True)],
        "filter_list": [
            {
                "name": "letter",
                "filter": [{"function": "regex", "regex_pattern": r"\b([A-E])\b"}, {"function": "take_first"}],
            }
        ],
        **more,
    }


def _mean(metric: str, **more: Any) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True, **more}


def _code(task: str, right: Callable[..., Any], until: list[str], **more: Any) -> dict[str, Any]:
    return {
        "task": task,
        "output_type": "generate_until",
        "test_split": "test",
        "process_results": right,
        "generation_kwargs": {"until": until, "max_gen_toks": 1024, "do_sample": False},
        "metric_list": [_mean("passed")],
        **more,
    }


ARC = generated(
    "twotower_arc_challenge",
    arc_text,
    arc_target,
    dataset_path="allenai/ai2_arc",
    dataset_name="ARC-Challenge",
    test_split="test",
    fewshot_split="train",
    fewshot_config={"sampler": "first_n"},
)
RACE = generated(
    "twotower_race_high",
    race_text,
    "{{answer}}",
    dataset_path="EleutherAI/race",
    dataset_name="high",
    test_split="test",
    process_docs=race_questions,
)
LITE = tuple(
    generated(
        f"twotower_global_mmlu_lite_{language}",
        lite_text,
        "{{answer}}",
        dataset_path="CohereLabs/Global-MMLU-Lite",
        dataset_name=language,
        test_split="test",
        fewshot_split="dev",
        fewshot_config={"sampler": "first_n"},
    )
    for language in LITE_LANGUAGES
)
HUMANEVAL = _code(
    "twotower_humaneval",
    humaneval_right,
    ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
    dataset_path="openai/openai_humaneval",
    doc_to_text="{{prompt}}",
    doc_to_target="",
)
MBPP = _code(
    "twotower_mbpp_sanitized",
    mbpp_right,
    ["[DONE]"],
    dataset_path="google-research-datasets/mbpp",
    dataset_name="sanitized",
    doc_to_text=mbpp_text,
    doc_to_target="{{code}}\n[DONE]",
    target_delimiter="",
    fewshot_split="prompt",
    fewshot_config={"sampler": "first_n"},
)

CARD = (
    Benchmark(
        *("MMLU", "mmlu", 5, 78.56, 78.24, ("mmlu_generative",), "exact_match", "get_response"),
        folder="mmlu/generative",
        dry_task="mmlu_anatomy_generative",
    ),
    Benchmark(
        *("MMLU-Pro", "mmlu_pro", 5, 62.59, 60.93, ("mmlu_pro",), "exact_match", "custom-extract", "mmlu_pro"),
        dry_task="mmlu_pro_math",
    ),
    Benchmark("ARC-C", "arc_challenge", 25, 91.72, 92.66, (ARC,), "exact_match", "letter", note="letters, ours"),
    Benchmark(
        *("WinoGrande", "winogrande", 5, 76.09, 76.09, ("winogrande",), "acc"),
        folder="winogrande",
        note="log-likelihoods: the context tower's in both columns",
    ),
    Benchmark("RACE", "race", 0, 88.90, 88.90, (RACE,), "exact_match", "letter", note="high, letters, ours"),
    Benchmark("HumanEval", "humaneval", 0, 79.27, 75.58, (HUMANEVAL,), "passed", runs_code=True, note="run by us"),
    Benchmark("MBPP-Sanitized", "mbpp", 3, 74.71, 74.28, (MBPP,), "passed", runs_code=True, note="run by us"),
    Benchmark("GSM8K", "gsm8k", 8, 92.49, 90.14, ("gsm8k_cot",), "exact_match", "flexible-extract", "gsm8k"),
    Benchmark(
        *("MATH-500", "math_500", 4, 84.40, 80.60, ("minerva_math500",), "math_verify", "none", "minerva_math"),
        note='needs pip install "lm-eval[math]"',
    ),
    Benchmark(
        *("MMLU Global Lite", "mmlu_global_lite", 5, 73.97, 73.94, LITE, "exact_match", "letter"),
        dry_task="twotower_global_mmlu_lite_en",
        note="letters, ours",
    ),
    Benchmark(
        *("MGSM", "mgsm", 8, 80.80, 80.40, tuple(f"mgsm_native_cot_{each}" for each in MGSM_LANGUAGES)),
        *("exact_match", "flexible-extract", "mgsm/native_cot"),
        dry_task="mgsm_native_cot_en",
    ),
)


def chosen(names: Sequence[str] | None) -> tuple[Benchmark, ...]:
    """The benchmarks of these keys, all by default."""
    known = {benchmark.key: benchmark for benchmark in CARD}
    for name in names or ():
        if name not in known:
            raise ValueError(f"{name!r} is no benchmark of the card; give some of {', '.join(known)}")
    return CARD if names is None else tuple(known[name] for name in dict.fromkeys(names))
