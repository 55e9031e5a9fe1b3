"""`twotower bench` as a whole: which steps there are, one report that grows by a step at a time, and its tables."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..modeling_twotower import TwoTowerForBlockDiffusion
from .reports import environment, measured_on
from .sections import GrowingContext, generation, prefill
from .texts import KINDS

# Where reading a prompt at once needs too much memory.
LONGEST_PREFILL = 16384


@dataclass(frozen=True)
class Plan:
    """
    How much to measure.

    Args:
        batch_sizes: rows at a time.
        contexts: tokens behind which passes are timed; prompts of as many, up to `LONGEST_PREFILL`, are read.
        rounds: how often everything is timed, in turn.
        texts: how many to write at least; a batch is always full.
        seed: of problems and random tokens.
        compiled: every mode also with compiled passes.
    """

    batch_sizes: tuple[int, ...] = (1, 4, 16, 64)
    contexts: tuple[int, ...] = (1024, 4096, 16384, 65536, 131072)
    rounds: int = 5
    texts: int = 8
    seed: int = 7
    compiled: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "contexts"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise ValueError(f"{name} is {list(values)}; give whole numbers of at least 1")
            if len(set(values)) < len(values):
                raise ValueError(f"{name} is {list(values)}; give each number once")
        for name in ("rounds", "texts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")


QUICK = Plan(batch_sizes=(1, 16), contexts=(1024, 4096), rounds=2, texts=2)


def bench(
    model: TwoTowerForBlockDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    save: Callable[[dict[str, Any]], None] = lambda report: None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """
    Measure step by step.

    Args:
        model: on its device and in its dtype.
        tokenizer: with a padding token.
        plan: how much.
        save: gets the report after every step, so that who stops half-way has the half.
        say: gets a line before every step.

    Returns:
        A report that json can write: settings, where it ran, and by section and step what was measured. "finished" is
        True once all has been.
    """
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(plan).items()}
    report: dict[str, Any] = {**settings, **environment(model), "finished": False}
    report["clock"] = "cpu" if model.device.type == "cpu" and report["machine"]["threads"] == 1 else "wall"
    steps = _steps(model, tokenizer, plan)
    for number, (section, name, measure) in enumerate(steps, 1):
        say(f"{number} of {len(steps)}: {section}, {name}")
        report.setdefault(section, {})[name] = measure()
        report["finished"] = number == len(steps)
        save(report)
    return report


def _steps(
    model: TwoTowerForBlockDiffusion, tokenizer: PreTrainedTokenizerBase, plan: Plan
) -> list[tuple[str, str, Callable[[], dict[str, Any]]]]:
    steps: list[tuple[str, str, Callable[[], dict[str, Any]]]] = []
    for kind in KINDS:
        for size in plan.batch_sizes:
            texts = -(-max(size, plan.texts) // size) * size
            measure = partial(generation, model, tokenizer, kind, size, texts, plan.rounds, plan.seed, plan.compiled)
            steps.append(("generation", f"{kind}, batch {size}", measure))
    growing = GrowingContext(model, plan.seed)
    for length in sorted(plan.contexts):
        steps.append(("context", str(length), partial(growing.at, length, plan.rounds)))
    for length in sorted(plan.contexts):
        if length <= LONGEST_PREFILL:
            steps.append(("prefill", str(length), partial(prefill, model, length, plan.rounds, plan.seed)))
    return steps


# Tables.

Table = tuple[str, list[str], list[list[str]]]


def tables(report: dict[str, Any]) -> list[Table]:
    """Title, header and rows of each, of as much as there is."""
    clock = report["clock"]
    seconds = "this thread's own time" if clock == "cpu" else "wall time"
    found: list[Table] = []
    for kind in KINDS:
        steps = {name: step for name, step in report.get("generation", {}).items() if name.startswith(f"{kind},")}
        if steps:
            found.append(_generation_table(kind, steps, clock, seconds))
    for section, unit in (("context", "context tokens"), ("prefill", "prompt tokens")):
        if section in report:
            found.append(_growth_table(section, unit, report[section], clock, seconds))
    return found


def _generation_table(kind: str, steps: dict[str, Any], clock: str, seconds: str) -> Table:
    what = "held-out problems" if kind == "on" else "text the checkpoint knows nothing of"
    ways = dict.fromkeys(way for step in steps.values() for way in step["ways"])
    header = ["way", "tokens/denoiser pass", *(name.removeprefix(f"{kind}, ") for name in steps)]
    rows = []
    for way in ways:
        held = [step["ways"][way] for step in steps.values() if way in step["ways"]]
        per_pass = held[0]["tokens_per_denoiser_pass"]
        cells = [_speed(step["ways"][way][clock]) if way in step["ways"] else "-" for step in steps.values()]
        rows.append([way, "-" if per_pass is None else f"{per_pass:.2f}", *cells])
    return f"{what}: tokens/s of {seconds} [quartiles], and next to ar's", header, rows


def _speed(figures: dict[str, Any]) -> str:
    rate, ratio = figures["tokens_per_second"], figures["of_ar"]
    low, high = rate["quartiles"]
    return f"{rate['median']:.0f} [{low:.0f}-{high:.0f}] {ratio['median']:.2f}x"


def _growth_table(section: str, unit: str, steps: dict[str, Any], clock: str, seconds: str) -> Table:
    ways = list(next(iter(steps.values()))["ways"])
    rows = [[name, *(_milliseconds(step["ways"][way][clock]) for way in ways)] for name, step in steps.items()]
    title = "one pass behind a context" if section == "context" else "reading a prompt"
    return f"{title}: milliseconds of {seconds} [quartiles]", [unit, *ways], rows


def _milliseconds(figures: dict[str, Any]) -> str:
    low, high = figures["quartiles"]
    return f"{figures['median']:.2f} [{low:.2f}-{high:.2f}]"


def footnote(report: dict[str, Any]) -> str:
    """What the figures of a report are of."""
    return (
        f"Medians of {report['rounds']} rounds in which all ways take turns. transformers' NemotronH is the same "
        "context tower; the released loop, one text at a time, decodes as the released code does"
        f"{_beside_released(report)}.\n"
        f"{measured_on(report)}; commit {report['commit']}; {report['date']}"
    )


def _beside_released(report: dict[str, Any]) -> str:
    found = [
        f"{step['ways']['mask_diffusion'][report['clock']]['of_released_loop']['median']:.2f} times as fast ({name})"
        for name, step in report.get("generation", {}).items()
        if name.endswith(", batch 1")
    ]
    return f": our mask_diffusion is {' and '.join(found)}" if found else ""


__all__ = ["QUICK", "Plan", "bench", "footnote", "tables"]
