"""What `twotower train` is told: a recipe, read from YAML, every key and value of which is checked.

Fields without a default are required. A key nobody knows is an error, not something without an effect.
"""

import difflib
import re
import types
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..demo.tasks import Stream
from ..objective_twotower import DiffusionObjective

# Changing these between two calls does not change what is trained.
FREE_KEYS = frozenset(
    ("folder", "log", "save", "samples", "hub", "threads", "data.workers", "evaluation.data.workers")
)
# YAML 1.1 reads 1e-4 as text, unlike everything else that people write numbers with.
EXPONENTIAL = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


@dataclass(frozen=True)
class LoraRecipe:
    """
    Adapters on the denoiser (peft), trained instead of its weights.

    Args:
        rank, alpha, dropout: as in peft's `LoraConfig`.
        targets: which parts of the denoiser tower get one.
        merge: whether the finished model has them merged into its weights; `adapter/` holds them in any case.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[Literal["attention", "mamba", "shared_experts", "mlp", "routed_experts"]] = field(
        default_factory=lambda: ["attention", "mamba", "shared_experts", "mlp", "routed_experts"]
    )
    merge: bool = True

    def __post_init__(self) -> None:
        _at_least(self, 1, "rank")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha is {self.alpha}; it must be positive and finite")
        _shares(self, "dropout")
        if not self.targets:
            raise ValueError("targets is empty; name a part of the denoiser, e.g. attention")
        if self.dropout and "routed_experts" in self.targets:
            raise ValueError("dropout cannot be of routed_experts (peft); set it to 0, or leave them out of targets")


@dataclass(frozen=True)
class ModelRecipe:
    """
    What is trained: a TwoTower `checkpoint`, a denoiser on a NemotronH `backbone`, or new weights from a `config`.

    Args:
        checkpoint: folder or Hub repository of a TwoTower; "demo" is the embedded one.
        backbone: folder or Hub repository of a NemotronH.
        config: fields of a TwoTowerConfig.
        tokenizer: folder or Hub repository; default the checkpoint's or backbone's.
        dtype: of the weights as they are trained.
        block_size, mask_token_id: with `backbone`, which has neither.
        trained_towers: "denoiser" by the diffusion objective, "context" by next-token cross-entropy.
        reset_denoiser: begin with a copy of the context tower.
        lora: adapters instead of the denoiser's weights.
    """

    checkpoint: str | None = None
    backbone: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    block_size: int | None = None
    mask_token_id: int | None = None
    trained_towers: Literal["denoiser", "context"] = "denoiser"
    reset_denoiser: bool = False
    lora: LoraRecipe | None = None

    def __post_init__(self) -> None:
        _one_of(self, "checkpoint", "backbone", "config")
        if self.backbone is None and (self.block_size, self.mask_token_id) != (None, None):
            raise ValueError("block_size and mask_token_id go with backbone; others have them in their config")
        if self.backbone is not None and self.mask_token_id is None:
            raise ValueError("mask_token_id is missing; give the id of a token that no text has, for [MASK]")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("tokenizer is missing; give a folder or Hub repository, since config has none")
        if self.trained_towers == "context" and (self.lora or self.reset_denoiser):
            raise ValueError("lora and reset_denoiser are of the denoiser; leave them out, or trained_towers: context")
        if self.lora is not None and not self.lora.merge and (self.checkpoint is None or self.reset_denoiser):
            raise ValueError(
                "lora.merge is false, and what the adapter is of would be stored nowhere: a model that is new; set it "
                "to true, or give a checkpoint without reset_denoiser"
            )


@dataclass(frozen=True)
class DataRecipe:
    """
    Where documents come from, read as a stream by `datasets`, and how they are laid out.

    Args:
        files: paths or patterns, all .jsonl (or .json), .txt or .parquet.
        dataset, subset, split: a Hub repository, or a folder of files, its configuration and split.
        generated: word problems and Python functions without end, as the embedded checkpoint was trained on:
            "tasks", or with more of the sums that carry "some carries" or "carries" (demo/tasks.py).
        text: the column with the text; or
        prompt, completion: the columns of a beginning that is read and of what is to be written.
        text_by: what of a .txt file is a document.
        max_tokens: longer documents are cut into several.
        min_tokens: what a document must have; default a block, a smaller number fills blocks with end-of-text.
        unusable: what happens at an empty or too short document, and at too long a prompt.
        aligned: see [`BlockCollator`].
        block_sizes: tokens per block, one drawn per batch; default the model's.
        pool: documents read at a time, shuffled and put together by length.
        examples: with so many, the rest is not read.
        workers: processes that make the next pool into documents while one is trained on; 0 for none. The batches are
            the same.
    """

    files: list[str] | None = None
    dataset: str | None = None
    generated: Stream | None = None
    subset: str | None = None
    split: str = "train"
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    text_by: Literal["line", "paragraph", "document"] = "line"
    max_tokens: int = 2048
    min_tokens: int | None = None
    unusable: Literal["error", "skip"] = "error"
    aligned: float = 0.6
    block_sizes: list[int] | None = None
    pool: int = 1024
    examples: int | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        _at_least(self, 0, "workers")
        _one_of(self, "files", "dataset", "generated")
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("prompt and completion go together; give both columns, or text alone")
        if self.text is not None and self.prompt is not None:
            raise ValueError("text and prompt are both given; give text, or prompt and completion")
        _at_least(self, 1, "max_tokens", "min_tokens", "pool", "examples")
        if self.min_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens is {self.min_tokens}, more than max_tokens, {self.max_tokens}, to which documents are "
                "cut; lower it, or raise max_tokens"
            )
        _shares(self, "aligned")
        if self.dataset is None and (self.subset is not None or self.split != "train"):
            raise ValueError("subset and split go with dataset; leave them out")
        if self.files is None and self.text_by != "line":
            raise ValueError("text_by goes with files, of .txt; leave it out")
        if self.files is not None and not self.files:
            raise ValueError("files is empty; give at least one path")
        if self.block_sizes is not None and min(self.block_sizes, default=0) < 1:
            raise ValueError(f"block_sizes is {self.block_sizes}; give lengths of at least 1")


@dataclass(frozen=True)
class OptimizerRecipe:
    """
    AdamW, or Muon for hidden matrices beside it, under warmup-stable-decay.

    Args:
        name: "adamw" or "muon" (training/optimizer.py).
        lr: peak learning rate, of Muon's matrices in units of AdamW's.
        other_lr: with "muon", AdamW's for the rest; default half of `lr`.
        last_lr: what it falls to at the end.
        warmup: steps of linear rise.
        decay: share of the steps, at the end, of linear fall.
        weight_decay: on matrices.
        betas: AdamW's.
        max_norm: gradients are clipped to.
        balance_experts: change of a router's choice bias per step (Wang et al. 2024, arXiv 2408.15664); 0 for none.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-4
    other_lr: float | None = None
    last_lr: float = 0.0
    warmup: int = 0
    decay: float = 0.2
    weight_decay: float = 0.1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    max_norm: float = 1.0
    balance_experts: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr is {self.lr}; it must be positive and finite")
        if not 0 <= self.last_lr <= self.lr:
            raise ValueError(f"last_lr is {self.last_lr}; it must lie between 0 and lr, {self.lr}")
        if self.other_lr is not None and self.name != "muon":
            raise ValueError(f"other_lr is {self.other_lr}, which goes with name: muon; leave it out")
        if self.other_lr is not None and not 0 < self.other_lr < float("inf"):
            raise ValueError(f"other_lr is {self.other_lr}; it must be positive and finite")
        _at_least(self, 0, "warmup", "weight_decay", "balance_experts")
        _shares(self, "decay")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {self.betas}; give two numbers in [0, 1)")
        if not self.max_norm > 0:
            raise ValueError(f"max_norm is {self.max_norm}; it must be positive")


@dataclass(frozen=True)
class EvaluationRecipe:
    """The loss on other data, every so many steps, under masks that are the same every time."""

    data: DataRecipe
    every: int = 500
    batch_size: int = 8

    def __post_init__(self) -> None:
        _at_least(self, 1, "every", "batch_size")
        if self.data.generated and not self.data.examples:
            raise ValueError("data.examples is missing; generated tasks have no end")
        if self.data.block_sizes is not None or self.data.aligned != DataRecipe.aligned:
            raise ValueError(
                "data.block_sizes and data.aligned are of training; leave them out: an evaluation is of the model's "
                "blocks, from where a prompt ends"
            )


@dataclass(frozen=True)
class SamplesRecipe:
    """Texts the model writes to these prompts, every so many steps, into samples.jsonl."""

    prompts: list[str]
    every: int = 500
    max_new_tokens: int = 64
    mode: Literal["mask_diffusion", "self_speculative", "mock_ar", "ar"] = "mask_diffusion"

    def __post_init__(self) -> None:
        _at_least(self, 1, "every", "max_new_tokens")
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise ValueError("prompts holds nothing, or an empty one; give beginnings of texts")


@dataclass(frozen=True)
class SaveRecipe:
    """Checkpoints: every so many steps, of which the newest are kept."""

    every: int = 200
    keep: int = 2

    def __post_init__(self) -> None:
        _at_least(self, 1, "every", "keep")


@dataclass(frozen=True)
class LogRecipe:
    """Lines of log.jsonl: every so many steps; also for TensorBoard."""

    every: int = 10
    tensorboard: bool = False

    def __post_init__(self) -> None:
        _at_least(self, 1, "every")


@dataclass(frozen=True)
class HubRecipe:
    """Where the finished model is uploaded to, exported with its code."""

    repository: str
    private: bool | None = None

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.repository)
        except HFValidationError as error:
            raise ValueError(f"repository is {self.repository!r}; give NAME or OWNER/NAME") from error


@dataclass(frozen=True)
class Recipe:
    """
    A training run.

    Args:
        folder: gets checkpoints, logs and the finished model; relative to where the command is run.
        steps: of the optimiser.
        batch_size: documents per forward pass and process.
        accumulation: forward passes per step and process.
        seed: of new weights, of order, layout and masks of the data, of dropout.
        device: "auto" takes a GPU where there is one.
        mixed_precision: "bf16" computes in bfloat16 on weights of `model.dtype`.
        gradient_checkpointing: compute layers twice to keep less of them.
        sharded: divide weights, gradients and the optimiser's state among the processes, of which there are several
            then (FSDP2), for a model that one device cannot hold.
        threads: of a CPU; default as torch has it.
    """

    folder: str
    model: ModelRecipe
    data: DataRecipe
    steps: int
    batch_size: int = 8
    accumulation: int = 1
    seed: int = 0
    objective: DiffusionObjective = field(default_factory=DiffusionObjective)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    evaluation: EvaluationRecipe | None = None
    samples: SamplesRecipe | None = None
    save: SaveRecipe = field(default_factory=SaveRecipe)
    log: LogRecipe = field(default_factory=LogRecipe)
    hub: HubRecipe | None = None
    device: Literal["auto", "cpu"] = "auto"
    mixed_precision: Literal["no", "bf16"] = "no"
    gradient_checkpointing: bool = False
    sharded: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        _at_least(self, 1, "steps", "batch_size", "accumulation", "threads")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; it must be at least 0 and below 2**64")
        if self.model.trained_towers == "context" and self.objective != DiffusionObjective():
            raise ValueError("objective is the denoiser's; leave it out under trained_towers: context")
        if self.model.trained_towers == "context" and self.samples is not None and self.samples.mode != "ar":
            raise ValueError(
                f"samples.mode is {self.samples.mode}, of a denoiser that is not trained; set it to ar under "
                "trained_towers: context"
            )
        if self.model.lora is not None and self.optimizer.balance_experts:
            raise ValueError(
                "optimizer.balance_experts moves routers, which an adapter does not hold; leave it out under "
                "model.lora"
            )
        if self.hub is not None and self.model.lora is not None and not self.model.lora.merge:
            raise ValueError("hub uploads a whole model; leave it out, or set model.lora.merge: true")


def read_recipe(file: str | Path) -> Recipe:
    """A recipe from a YAML file; a ValueError of one line names what is wrong in it."""
    file = Path(file)
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text; save it as such") from error
    return recipe_of(content, str(file))


def recipe_of(content: Any, origin: str = "the recipe") -> Recipe:
    """A recipe from plain mappings, lists and values."""
    return _built(Recipe, content, "", origin)


def changed_key(before: dict[str, Any], recipe: Recipe) -> tuple[str, Any, Any] | None:
    """The first key that a recipe has otherwise than an earlier one, and both values; not one that changes nothing."""
    with suppress(ValueError):  # of keys that there are no more
        before = asdict(recipe_of(before))  # with what has come to recipes since
    old, new = _flat(before), _flat(asdict(recipe))
    for key in sorted(old.keys() | new.keys()):
        if FREE_KEYS.isdisjoint((key, key.split(".")[0])) and old.get(key) != new.get(key):
            return key, old.get(key), new.get(key)
    return None


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


class _StrictLoader(yaml.SafeLoader):
    """A key given twice is an error, not the last one's value."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Before `<<` brings in another mapping's keys, which its own go before.
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.composer.ComposerError(None, None, f"{key.value} is given twice", key.start_mark)
        return node


def _built(kind: type, content: Any, where: str, origin: str) -> Any:
    """An instance of a dataclass; `where` is its key with a dot behind it."""
    names = [each.name for each in fields(kind)]
    shown = where.rstrip(".") or origin
    if not isinstance(content, dict):
        raise ValueError(f"{shown} is {_shown(content)}; give keys and values, of {', '.join(names)}")
    for key in content:
        if key not in names:
            close = difflib.get_close_matches(str(key), names, 1)
            remedy = f"did you mean {close[0]}?" if close else f"use {', '.join(names)}"
            raise ValueError(f"{where}{key} is no key of a recipe; {remedy}")
    hints, values = get_type_hints(kind), {}
    for each in fields(kind):
        if each.name in content:
            values[each.name] = _converted(content[each.name], hints[each.name], where + each.name, origin)
        elif each.default is MISSING and each.default_factory is MISSING:
            raise ValueError(f"{where}{each.name} is missing in {origin}; see docs/training.md")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error


def _converted(value: Any, hint: Any, where: str, origin: str) -> Any:
    """A value as its field wants it."""
    kind = get_origin(hint)
    if kind in (Union, types.UnionType):
        if value is None:
            return None
        [hint] = [option for option in get_args(hint) if option is not type(None)]
        return _converted(value, hint, where, origin)
    if is_dataclass(hint):
        return _built(hint, value, where + ".", origin)  # type: ignore[arg-type]
    if kind is Literal:
        if value is False and "no" in get_args(hint):
            return "no"  # as YAML 1.1 reads it
        if value not in get_args(hint) or isinstance(value, bool):
            raise ValueError(f"{where} is {_shown(value)}; use one of {', '.join(map(str, get_args(hint)))}")
        return value
    if kind is list:
        if not isinstance(value, list):
            raise ValueError(f"{where} is {_shown(value)}; give a list")
        return [_converted(each, get_args(hint)[0], f"{where}[{at}]", origin) for at, each in enumerate(value)]
    if kind is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {_shown(value)}; give keys and values")
        return value
    return _plain(value, hint, where)


def _plain(value: Any, kind: type, where: str) -> Any:
    if kind is float and isinstance(value, str) and EXPONENTIAL.fullmatch(value):
        return float(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind or value == "":
        names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
        raise ValueError(f"{where} is {_shown(value)}; give {names[kind]}")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def _at_least(recipe: Any, low: int, *names: str) -> None:
    for name in names:
        value = getattr(recipe, name)
        if value is not None and not low <= value < float("inf"):
            raise ValueError(f"{name} is {value}; it must be at least {low}")


def _shares(recipe: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(recipe, name) <= 1:
            raise ValueError(f"{name} is {getattr(recipe, name)}; give a share in [0, 1]")


def _one_of(recipe: Any, *names: str) -> None:
    given = [name for name in names if getattr(recipe, name) is not None]
    if len(given) != 1:
        raise ValueError(f"{' and '.join(given) or 'none'} given; give one of {', '.join(names)}")


__all__ = ["FREE_KEYS", "DataRecipe", "ModelRecipe", "Recipe", "changed_key", "read_recipe", "recipe_of"]
