"""What a pass costs on the machine at hand: measured once per model, device and dtype, kept, and looked up.

Shapes: R rows, S columns of a draft, its newest known token included.
"""

import hashlib
import json
import math
import os
import platform
import secrets
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from statistics import median
from threading import Lock
from typing import Any, Literal, get_args

import torch
from huggingface_hub import constants

from ..cache_twotower import TwoTowerCache
from ..compat_twotower import logger
from .compiled import CompiledPasses
from .kept import Kept

Pass = Literal["denoise", "verify", "step"]
PASSES: tuple[Pass, ...] = get_args(Pass)

# How passes are measured: a warm-up, then rounds over all kinds for so many seconds, but at most so many: short passes
# are disturbed most by what else runs, and those that take seconds must not be repeated often.
ROUNDS, SECONDS = 24, 1.0
METHOD = "medians beside a step"  # costs that were measured by another are measured anew
CONTEXT_TOKENS = 32
FILE_VERSION = 1
# Threads that measure at a time would disturb each other.
looking = Lock()


def draft_lengths(block_size: int) -> tuple[int, ...]:
    """The lengths to choose among: 1, 2, 4, ... below `block_size`, and `block_size`; 1 is the newest token alone."""
    return (*(1 << power for power in range((block_size - 1).bit_length())), block_size)


def row_buckets(rows: int) -> tuple[int, ...]:
    """The numbers of rows to measure for up to `rows`: 1, 4, 16, ..., the last at least `rows`."""
    if rows < 1:
        raise ValueError(f"rows are {rows}; give a whole number of at least 1")
    return tuple(4**power for power in range(math.ceil(math.log(rows, 4) - 1e-9) + 1))


@dataclass(frozen=True)
class PassCosts:
    """
    Seconds that passes take.

    Args:
        seconds: by kind of pass ("denoise": a denoiser pass over S columns; "verify": the context tower reads S tokens
            tentatively and accepts some; "step": it reads one, as in mode "ar"; each with its head), by S, by R. Of
            "step", S is 1. Between two numbers of rows, and beyond them, lines are drawn.
    """

    seconds: Mapping[Pass, Mapping[int, Mapping[int, float]]]

    def __post_init__(self) -> None:
        seconds: Any = self.seconds
        if not isinstance(seconds, Mapping) or not all(isinstance(of, Mapping) for of in seconds.values()):
            raise ValueError(f"pass costs are {seconds!r}; give {{kind: {{tokens: {{rows: seconds}}}}}}")
        for kind in PASSES:
            if not self.seconds.get(kind) and kind == "step":
                raise ValueError('pass costs hold nothing of "step", to which drafts are compared; give its seconds')
        for kind, by_tokens in self.seconds.items():
            if kind not in PASSES:
                raise ValueError(f"pass costs hold {kind!r}; the kinds of passes are {', '.join(PASSES)}")
            for tokens, by_rows in by_tokens.items():
                _check_entries(kind, tokens, by_rows)

    def of(self, kind: Pass, tokens: int, rows: int) -> float:
        """Seconds of one pass over `tokens` columns of each of `rows` rows."""
        by_rows = self.seconds.get(kind, {}).get(tokens)
        if by_rows is None:
            known = sorted(self.seconds.get(kind, {}))
            raise ValueError(
                f"pass costs hold no {kind!r} pass over {tokens} tokens, only over {known}; measure them with "
                f"PassCosts.measure(model, lengths=[{tokens}], rows=[...]), or set draft_length to one of these"
            )
        return _on_line(sorted(by_rows.items()), rows)

    def cycle(self, length: int, rows: int, draft_steps: int = 1) -> float:
        """Seconds in which every row gets 1 + its accepted tokens: a draft and its verification, or for 1 a step."""
        if length == 1:
            return self.of("step", 1, rows)
        return draft_steps * self.of("denoise", length, rows) + self.of("verify", length, rows)

    def lacks(self, lengths: Iterable[int], rows: Iterable[int]) -> bool:
        """Whether a pass over one of `lengths` and one of `rows` is in no entry."""
        wanted = [*lengths]
        return not all(
            set(rows) <= set(self.seconds.get(kind, {}).get(tokens, ()))
            for kind in PASSES
            for tokens in (wanted if kind != "step" else [1])
            if tokens > 1 or kind == "step"
        )

    def merged(self, other: "PassCosts") -> "PassCosts":
        """These costs, with those of `other` added; where both hold one, it is the other's."""
        merged: dict[Pass, dict[int, dict[int, float]]] = {kind: {} for kind in PASSES}
        for costs in (self, other):
            for kind, tokens, rows, seconds in costs.entries():
                merged[kind].setdefault(tokens, {})[rows] = seconds
        return PassCosts(merged)

    def entries(self) -> list[tuple[Pass, int, int, float]]:
        """(kind, S, R, seconds), in the order of a table."""
        return [
            (kind, tokens, rows, seconds)
            for kind in PASSES
            for tokens, by_rows in sorted(self.seconds.get(kind, {}).items())
            for rows, seconds in sorted(by_rows.items())
        ]

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and rows: milliseconds by kind of pass and tokens, a column per number of rows."""
        entries = self.entries()
        columns = sorted({rows for _, _, rows, _ in entries})
        cells = {(kind, tokens, rows): f"{1e3 * seconds:.2f}" for kind, tokens, rows, seconds in entries}
        lines = dict.fromkeys((kind, tokens) for kind, tokens, *_ in entries)
        rows = [
            (kind, str(tokens), *(cells.get((kind, tokens, each), "") for each in columns)) for kind, tokens in lines
        ]
        return ("pass", "tokens", *(f"{each} row{'s' if each > 1 else ''}" for each in columns)), rows

    def to_dict(self) -> dict[str, dict[str, dict[str, float]]]:
        """For JSON, whose keys are text."""
        table: dict[str, dict[str, dict[str, float]]] = {}
        for kind, tokens, rows, seconds in self.entries():
            table.setdefault(kind, {}).setdefault(str(tokens), {})[str(rows)] = seconds
        return table

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> "PassCosts":
        """The inverse of `to_dict`; a ValueError says what is malformed."""
        try:
            seconds: Any = {
                kind: {
                    int(tokens): {int(rows): each for rows, each in by_rows.items()} for tokens, by_rows in of.items()
                }
                for kind, of in table.items()
            }
        except (AttributeError, ValueError, TypeError) as error:
            raise ValueError(
                f"pass costs are malformed ({error}); give {{kind: {{tokens: {{rows: seconds}}}}}}"
            ) from error
        return cls(seconds)

    @classmethod
    def measure(cls, model: Any, lengths: Iterable[int], rows: Iterable[int], recorded: bool = False) -> "PassCosts":
        """
        Run every pass a few times on random tokens after a short context, each in turn with steps; medians count.

        Args:
            model: a TwoTower, measured where its parameters are.
            lengths: S to measure, of which 1 is always.
            rows: R to measure. From the first number on that the memory does not allow, all are left out with a
                warning.
            recorded: as CUDA graphs, as `compile=True` has them on a GPU; default eager.
        """
        lengths, rows = [*lengths], [*rows]
        for name, numbers in (("lengths", lengths), ("rows", rows)):
            if not all(isinstance(each, int) and each >= 1 for each in numbers) or (name == "rows" and not numbers):
                raise ValueError(f"{name} to measure are {numbers}; give whole numbers of at least 1")
        measured: dict[Pass, dict[int, dict[int, float]]] = {kind: {} for kind in PASSES}
        for count in sorted(set(rows)):
            try:
                taken = _measure_rows(model, sorted(set(lengths) - {1}), count, recorded)
            except torch.OutOfMemoryError:
                if not measured["step"]:
                    raise
                logger.warning(f"passes over {count} rows do not fit into the memory; their cost is extrapolated")
                break
            for (kind, tokens), seconds in taken.items():
                measured[kind].setdefault(tokens, {})[count] = seconds
        return cls(measured)


def costs_of(
    model: Any,
    block_size: int,
    rows: int,
    missing: Literal["measure", "anew", "none"] = "measure",
    recorded: bool = False,
) -> PassCosts | None:
    """
    What passes over up to `rows` rows cost: as set by the user, as kept with the model or in a file, or measured now.

    `model.pass_costs = PassCosts(...)` comes first. What is measured is kept with the model, where neither its state,
    config, copies nor pickles have it, and in `pass_costs_file()` for other processes.

    Args:
        model: a TwoTower.
        block_size: the longest draft, its newest known token included.
        rows: the most rows that are decoded at once.
        missing: what to do about passes that were never measured: measure them, or return None ("none"). Ranks that
            must take the same passes can not measure. With "anew" all are measured, and what was kept is dropped, for
            when that was measured beside other work.
        recorded: of passes that are recorded as CUDA graphs, see [`PassCosts.measure`].
    """
    lengths, buckets = draft_lengths(block_size), row_buckets(rows)
    chosen = getattr(model, "pass_costs", None)
    if chosen is not None:
        _check_chosen(chosen, lengths)
        return chosen
    with looking:
        return _kept_or_measured(model, lengths, buckets, missing, recorded)


def _kept_or_measured(
    model: Any, lengths: tuple[int, ...], buckets: tuple[int, ...], missing: str, recorded: bool
) -> PassCosts | None:
    """What `costs_of` returns where the user has set nothing."""
    kept: dict[str, PassCosts] = vars(model).setdefault("_kept_pass_costs", Kept())
    description = _description(model) | {"passes": "recorded" if recorded else "eager"}
    key = hashlib.sha256(json.dumps(description, sort_keys=True, default=str).encode()).hexdigest()[:16]
    costs: PassCosts | None = None
    if missing != "anew":
        costs = kept.get(key)
        if costs is None or costs.lacks(lengths, buckets):
            costs = _merged_costs(costs, _from_file(pass_costs_file(), key))
    if costs is None or costs.lacks(lengths, buckets):
        if missing == "none":
            return None
        costs = _merged_costs(costs, PassCosts.measure(model, lengths, buckets, recorded))
        assert costs is not None
        _to_file(pass_costs_file(), key, description, costs)
    kept[key] = costs
    return costs


def pass_costs_file() -> Path:
    """Where costs are kept for other processes."""
    return Path(constants.HF_HOME) / "twotower" / "pass_costs.json"


# Checks and lookups.


def _check_entries(kind: str, tokens: Any, by_rows: Any) -> None:
    what = f"pass costs of {kind!r} over {tokens!r} tokens"
    if not isinstance(tokens, int) or tokens < 1 or (tokens == 1) != (kind == "step"):
        raise ValueError(f'{what}: a "step" is over 1 token, any other pass over at least 2')
    if not isinstance(by_rows, Mapping) or not by_rows:
        raise ValueError(f"{what} are {by_rows!r}; give seconds by number of rows")
    for rows, seconds in by_rows.items():
        if not isinstance(rows, int) or rows < 1:
            raise ValueError(f"{what} are for {rows!r} rows; give a whole number of at least 1")
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
            raise ValueError(f"{what} and {rows} rows are {seconds!r} seconds; give a positive number")


def _check_chosen(costs: Any, lengths: Iterable[int]) -> None:
    if not isinstance(costs, PassCosts):
        raise ValueError(f"model.pass_costs is a {type(costs).__name__}; set a PassCosts, or None to have it measured")
    for length in lengths:
        costs.cycle(length, 1)


def _on_line(points: list[tuple[int, float]], rows: int) -> float:
    if len(points) == 1:
        return points[0][1]
    right = min(max(bisect_left(points, (rows,)), 1), len(points) - 1)
    (low, start), (high, end) = points[right - 1], points[right]
    # Measurements are noisy: what falls with the rows is not followed to zero and below.
    return max(start + (end - start) * (rows - low) / (high - low), min(start, end) / 2)


def _merged_costs(old: PassCosts | None, new: PassCosts | None) -> PassCosts | None:
    if old is None or new is None:
        return old or new
    return old.merged(new)


# Measuring.


@torch.no_grad()
def _measure_rows(model: Any, lengths: list[int], rows: int, recorded: bool) -> dict[tuple[Pass, int], float]:
    """
    Seconds of each pass: a step's, times the median of how many steps it took.

    Shared machines are slow for seconds at a time, which a step just before and a pass have in common, and which the
    fastest of either may not.
    """
    steps: list[float] = []
    with _passes(model, lengths, rows, recorded) as passes:
        for run in passes.values():
            run()
        step = passes.pop(("step", 1))
        taken: dict[tuple[Pass, int], list[float]] = {key: [] for key in passes}
        started = time.perf_counter()
        for _ in range(ROUNDS):
            for length in lengths or [1]:
                # As in decoding: steps follow each other, which find their weights in the processor's cache, and
                # drafts and verifications each other, which do not.
                step()
                steps.append(_timed(step))
                for key in [key for key in passes if key[1] == length]:
                    taken[key].append(_timed(passes[key]) / steps[-1])
            if time.perf_counter() - started > SECONDS:
                break
    seconds: dict[tuple[Pass, int], float] = {("step", 1): median(steps)}
    seconds |= {key: median(steps) * median(ratios) for key, ratios in taken.items()}
    # What else runs can only add to a time: a pass costs no more than one over more tokens did.
    for kind, tokens in sorted(seconds, reverse=True):
        longer = (each for (other, more), each in seconds.items() if other == kind and more > tokens)
        seconds[kind, tokens] = min(seconds[kind, tokens], *longer, math.inf)
    return seconds


@contextmanager
def _passes(
    model: Any, lengths: list[int], rows: int, recorded: bool
) -> Iterator[dict[tuple[Pass, int], Callable[[], torch.Tensor]]]:
    """What is timed, ready to be run as an engine would."""
    generator = torch.Generator().manual_seed(0)
    # Of an offloaded model accelerate moves what it is given to where it runs.
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    vocabulary, programs = model.config.vocab_size, CompiledPasses(model, alone=True) if recorded else None

    def run(part: str, *args: Any) -> Any:
        return getattr(model, part)(*args) if programs is None else programs(part, *args)

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(vocabulary, (rows, count), generator=generator, device="cpu").to(device)

    ids, times = {length: tokens(length) for length in (1, *lengths)}, torch.full((rows,), 0.5, device=device)
    cache = TwoTowerCache(model.config)

    def step() -> torch.Tensor:
        return run("context_lm_head", run("context_tower", ids[1], growing)[:, -1])

    def verify(length: int) -> torch.Tensor:
        logits = run("context_lm_head", run("context_tower", ids[length], cache, None, True))
        nothing = [0] * rows
        cache.accept(nothing) if programs is None else run("accept", cache, nothing)
        return logits

    passes: dict[tuple[Pass, int], Callable[[], torch.Tensor]] = {("step", 1): step}
    for length in lengths:
        passes["denoise", length] = partial(run, "denoise", ids[length], cache, times)
        passes["verify", length] = partial(verify, length)
    try:
        if programs is not None:
            programs.begin()
        cache.add_rows(rows)
        # Rows at their own places, as drafts leave them.
        counts = None if rows == 1 else [CONTEXT_TOKENS - row % 2 for row in range(rows)]
        run("context_tower", tokens(CONTEXT_TOKENS), cache, counts)
        # A step reads for good; the few tokens more are nothing beside a pass.
        growing = cache.copy_rows([*range(rows)])
        yield passes
    finally:
        if programs is not None:
            programs.close(cache)


def _timed(run: Callable[[], torch.Tensor]) -> float:
    # One thread's own time leaves out that others were given the core, which on a busy machine is most of it.
    precise = time.get_clock_info("thread_time").resolution < 1e-5  # not on every system
    clock = time.thread_time if torch.get_num_threads() == 1 and precise else time.perf_counter
    started, wall = clock(), time.perf_counter()
    device = run().device
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
        return time.perf_counter() - wall
    return clock() - started


def _description(model: Any) -> dict[str, Any]:
    """What passes' cost depends on."""
    config = model.config
    volatile = {"_name_or_path", "architectures", "auto_map", "dtype", "transformers_version", "return_dict"}
    devices = getattr(model, "hf_device_map", None) or {"": model.device}
    return {
        "config": {name: value for name, value in config.to_dict().items() if name not in volatile},
        "implementations": [config._attn_implementation, config._experts_implementation],
        "kernels": dict(model.kernels),
        "dtype": str(model.dtype),
        "devices": dict(Counter(map(str, devices.values()))),
        "device": _device_name(model.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "method": METHOD,
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _processor_name()


@lru_cache
def _processor_name() -> str:
    processors = Path("/proc/cpuinfo")
    lines = processors.read_text().splitlines() if processors.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


# The file.


def _from_file(file: Path, key: str) -> PassCosts | None:
    """The costs under `key`; None, with a warning where the file can not be read."""
    try:
        table = _tables(file).get(key)
        return None if table is None else PassCosts.from_dict(table["seconds"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        _warn(file, error)
        return None


def _to_file(file: Path, key: str, description: dict[str, Any], costs: PassCosts) -> None:
    """Put the costs beside what other models and processes have kept; a file that can not be read stays as it is."""
    staged = file.with_name(f"{file.name}.{secrets.token_hex(8)}")
    try:
        tables = _tables(file)
        tables[key] = {"of": description, "seconds": costs.to_dict()}
        file.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(json.dumps({"version": FILE_VERSION, "tables": tables}, indent=1, default=str), "utf-8")
        with suppress(OSError):  # who may read it is as before, where the file system knows of such
            staged.chmod(file.stat().st_mode & 0o777)
        os.replace(staged, file)
    except (OSError, ValueError) as error:
        with suppress(OSError):
            staged.unlink(missing_ok=True)
        _warn(file, error)


def _tables(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("version") != FILE_VERSION:
        raise ValueError(f"it is no table of version {FILE_VERSION}")
    if not isinstance(content.get("tables"), dict):
        raise ValueError("it holds no tables")
    return content["tables"]


def _warn(file: Path, error: Exception) -> None:
    logger.warning_once(
        f"costs of passes can not be kept in {file}: {error!r}; they are measured once in every process. Delete the "
        "file or make it writable"
    )


__all__ = ["PassCosts", "costs_of", "draft_lengths", "pass_costs_file", "row_buckets"]
