"""A training run: from a recipe to a finished model, going on from the last checkpoint where there is one.

What a step draws (masks, dropout) is drawn from the recipe's seed, the step and the number of the batch in it, and
nothing else; so a run that was killed goes on bit for bit, and processes share the batches of a step as
accumulation would.
"""

import hashlib
import json
import time
from contextlib import closing, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedType
from transformers import PreTrainedTokenizerBase

from ..modeling_twotower import TwoTowerForBlockDiffusion
from .collator import IGNORED, BlockCollator
from .data import Batches, Documents, sizes_of
from .models import build_model, with_adapter
from .optimizer import ExpertBalancer, build_optimizer, lr_factor
from .recipe import DataRecipe, EvaluationRecipe, Recipe, changed_key
from .saving import FolderLock, checkpoints, clean, cut_lines, load_checkpoint, prune, save_checkpoint, write_whole
from .sharding import gathered, shard, whole

LOG, SAMPLES = "log.jsonl", "samples.jsonl"
MODEL, ADAPTER = "model", "adapter"


class Step(NamedTuple):
    """What a step tells: `items` labels in `batches` of all processes."""

    loss: float
    norm: float
    items: int


def train(recipe: Recipe) -> Path:
    """
    Run a recipe to its end; returns the folder of the finished model.

    Raises:
        ValueError: for what a recipe, its data or its folder has wrong; for a loss that is no number, naming the step
            and the last good checkpoint.
    """
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    accelerator = Accelerator(cpu=recipe.device == "cpu", mixed_precision=recipe.mixed_precision)
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"accelerate is set to {accelerator.distributed_type.value}, whose weights `twotower train` cannot store; "
            "use plain processes (accelerate launch --multi_gpu), and sharded: true in the recipe to divide weights"
        )
    if recipe.sharded and accelerator.num_processes == 1:
        raise ValueError(
            "sharded is true, but there is one process to hold all weights; leave it out, or start several "
            "(accelerate launch --multi_gpu --num_processes 2 -m twotower.cli.commands train RECIPE.yaml)"
        )
    folder = Path(recipe.folder).expanduser()
    with FolderLock(folder) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            clean(folder)
        accelerator.wait_for_everyone()
        run = Run(recipe, folder, accelerator)
        with closing(run.batches):
            run.go()
        accelerator.wait_for_everyone()
    return folder / run.finished


class Run:
    """One process's part of a run: model, optimiser, data and where they are."""

    def __init__(self, recipe: Recipe, folder: Path, accelerator: Accelerator):
        self.recipe, self.folder, self.accelerator = recipe, folder, accelerator
        found = checkpoints(folder)
        # 1. What was begun earlier, if it is this run.
        if not found and (folder / self.finished).exists():
            raise ValueError(
                f"{folder / self.finished} is there already, of a run without checkpoints to go on from; give another "
                "folder, or delete it to train anew"
            )
        self.last = found[-1] if found else None
        state = None if self.last is None else load_checkpoint(self.last)
        self.files = sizes_of(recipe.data)
        if state is not None:
            self._check_same(state)
        self.step = 0 if state is None else state["step"]
        self.seconds = 0.0 if state is None else state["seconds"]
        # 2. Model and data.
        torch.manual_seed(recipe.seed)  # of new weights
        self.plain, self.tokenizer = self._model()
        self.size = self.plain.config.block_size
        collator = BlockCollator(**self._layout(recipe.data))
        self.batches = self._batches(recipe.data, recipe.batch_size, collator, recipe.seed)
        if recipe.evaluation is not None:
            # What is wrong with its data is known now, not steps later.
            try:
                with closing(self._evaluation_batches(recipe.evaluation)) as batches:
                    next(batches)
            except ValueError as error:
                raise ValueError(f"evaluation: {error}") from error
        # 3. Where all of them are.
        self.model = self._spread(self._adapted(self.plain))
        inner = accelerator.unwrap_model(self.model)
        self.trained = [parameter for parameter in inner.parameters() if parameter.requires_grad]
        self.optimizer = build_optimizer(inner, recipe.optimizer)
        tower = self.plain.context_tower if self._trains_context else self.plain.denoiser_tower
        self.balancer = ExpertBalancer(tower.modules(), recipe.optimizer.balance_experts)
        if state is not None:
            self.optimizer.load_state_dict(state["optimizer"])
            self.batches.go_to(state["data"])
        if accelerator.is_main_process:
            prune(folder, recipe.save.keep)
            for name in (LOG, SAMPLES):
                cut_lines(folder / name, self.step)

    @property
    def _trains_context(self) -> bool:
        return self.recipe.model.trained_towers == "context"

    def _check_same(self, state: dict[str, Any]) -> None:
        changed = changed_key(state["recipe"] | {"steps": self._steps_begun_with(state)}, self.recipe)
        if changed is not None:
            key, old, new = changed
            raise ValueError(
                f"{key} is {new!r}, but {self.folder} was begun with {old!r}; put it back, or give another folder"
            )
        for file in sorted(state["files"].keys() | self.files.keys()):  # a pattern may name more than it did
            before, now = (files.get(file, "no") for files in (state["files"], self.files))
            if before != now:
                raise ValueError(
                    f"{file} has {now} bytes, but had {before} when {self.folder} was begun; put the data back, or "
                    "give another folder"
                )
        processes = self.accelerator.num_processes
        if state["processes"] != processes:
            raise ValueError(
                f"{self.folder} was begun with {state['processes']} processes, not {processes}; start as many, or "
                "give another folder"
            )

    def _steps_begun_with(self, state: dict[str, Any]) -> int:
        """The recipe's, where a run begun with them would have gone as this one has until now: no rate decays yet."""
        done, old, new = state["step"], state["recipe"]["steps"], self.recipe.steps
        optimizer = self.recipe.optimizer
        same = all(lr_factor(optimizer, step, old) == lr_factor(optimizer, step, new) for step in range(done))
        return new if same and done < min(old, new) else old

    def _model(self) -> tuple[TwoTowerForBlockDiffusion, PreTrainedTokenizerBase]:
        """The model without adapters: with them, a checkpoint holds nothing else."""
        recipe = self.recipe.model
        model, tokenizer = build_model(recipe, self.last if recipe.lora is None else None)
        model.objective = self.recipe.objective
        if not self.recipe.sharded:  # of which each process copies its part
            in_own_memory(model)
        return model, tokenizer

    def _adapted(self, plain: TwoTowerForBlockDiffusion) -> Any:
        lora = self.recipe.model.lora
        return plain if lora is None else with_adapter(plain, lora, self.last)

    def _spread(self, model: Any) -> Any:
        """The model as this process trains it: a copy that is kept like the others', or its part of the weights."""
        if self.recipe.gradient_checkpointing:
            self.plain.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        if not self.recipe.sharded:
            return self.accelerator.prepare_model(model)
        shard(self.plain, self.accelerator.device)
        return model

    def _layout(self, data: DataRecipe) -> dict[str, Any]:
        return {
            "eos_token_id": self.tokenizer.eos_token_id,
            "pad_token_id": self.tokenizer.pad_token_id,
            "block_size": data.block_sizes or self.size,
            "aligned": data.aligned,
            "seed": self.recipe.seed,
        }

    def _batches(self, data: DataRecipe, batch_size: int, collator: BlockCollator, seed: int) -> Batches:
        documents = Documents(data, self.tokenizer, self.size, self.plain.config.mask_token_id, seed)
        return Batches(documents, collator, batch_size, seed)

    # Steps

    def go(self) -> None:
        """All steps that are left, and the finished model."""
        recipe, started = self.recipe, time.monotonic() - self.seconds
        board = self._tensorboard()
        while self.step < recipe.steps:
            taken = self._take_step()
            self.step += 1
            self.seconds = time.monotonic() - started
            if self.step % recipe.log.every == 0 or self.step in (1, recipe.steps):
                figures = {"loss": taken.loss, "grad_norm": taken.norm, "items": taken.items}
                factor = lr_factor(recipe.optimizer, self.step - 1, recipe.steps)
                self._log({**figures, "lr": recipe.optimizer.lr * factor, "seconds": round(self.seconds, 2)}, board)
            if recipe.evaluation and self._due(recipe.evaluation.every):
                self._log({"eval_loss": self.evaluate()}, board)
            if recipe.samples and self._due(recipe.samples.every):
                self._write_samples()
            if self._due(recipe.save.every):
                self._save()
        self._finish()

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.recipe.steps

    def _take_step(self) -> Step:
        """
        One optimiser step over the batches of all processes.

        Every process reads all of the step's batches, which costs a process the others' tokenizing and spares all
        agreement on the data; it computes every one in so many.
        """
        recipe, world = self.recipe, self.accelerator.num_processes
        batches = [next(self.batches) for _ in range(world * recipe.accumulation)]
        items = sum(self._items(batch) for batch in batches)
        total = torch.zeros((), device=self.accelerator.device)
        for number in range(recipe.accumulation):
            index = number * world + self.accelerator.process_index
            last = number + 1 == recipe.accumulation
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                share = self._loss(batches[index], items, index)
                self.accelerator.backward(share * world)  # processes average their gradients
            total += share.detach()
        loss = float(self.accelerator.reduce(total, "sum"))
        norm = float(whole(torch.nn.utils.clip_grad_norm_(self.trained, recipe.optimizer.max_norm)))
        self._check_finite(loss, norm)
        self.optimizer.update(lr_factor(recipe.optimizer, self.step, recipe.steps))
        self.balancer.update(partial(self.accelerator.reduce, reduction="sum"))
        return Step(loss, norm, items)

    def _items(self, batch: dict[str, Any]) -> int:
        labels = batch["labels"][:, 1:] if self._trains_context else batch["labels"]
        return int((labels != IGNORED).sum())

    def _loss(self, batch: dict[str, Any], items: int, index: int) -> torch.Tensor:
        """A batch's share of the step's loss, under draws of its own."""
        seed = _seed(self.recipe.seed, self.step, index)
        torch.manual_seed(seed)  # dropout
        batch = {name: _moved(value, self.accelerator.device) for name, value in batch.items()}
        with self.accelerator.autocast():
            if self._trains_context:
                return self._next_token_loss(self.model, batch, items)
            generator = torch.Generator().manual_seed(seed)
            return self.model(**batch, generator=generator, num_items_in_batch=items).loss

    def _next_token_loss(self, model: Any, batch: dict[str, Any], items: int) -> torch.Tensor:
        output = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        targets = batch["labels"][:, 1:]
        total = F.cross_entropy(
            output.logits[:, :-1][targets != IGNORED], targets[targets != IGNORED], reduction="sum"
        )
        return total / max(items, 1)

    def _check_finite(self, loss: float, norm: float) -> None:
        """Before anything is changed by it, let alone stored."""
        for name, value in (("loss", loss), ("gradients' norm", norm)):
            if not torch.tensor(value).isfinite():
                good = f"the last good checkpoint is {self.last}" if self.last else "there is no checkpoint yet"
                raise ValueError(
                    f"the {name} of step {self.step + 1} is {value}; {good}. Nothing was changed: lower optimizer.lr "
                    "or look at the step's data, in another folder with that checkpoint as model.checkpoint"
                )

    @torch.no_grad()
    def evaluate(self) -> float:
        """
        The mean loss over the evaluation's data: of batches by their masked tokens (of the context tower, by their
        tokens), which under `weighting: mean` is the mean over all of these.
        """
        assert self.recipe.evaluation is not None
        batches = self._evaluation_batches(self.recipe.evaluation)
        sums = torch.zeros(2, device=self.accelerator.device, dtype=torch.float64)
        number, world, rank = 0, self.accelerator.num_processes, self.accelerator.process_index
        # Not the model of several processes: its passes wait for each other, and a process may have no batch.
        model = self._inner().eval()
        with closing(batches):
            while True:
                batch = next(batches)
                if batches.epoch:
                    break
                if number % world == rank:
                    sums += self._evaluated(model, batch).to(sums.device)
                number += 1
        if self.recipe.sharded and 0 < number % world <= rank:
            self._evaluated(model, batch)  # in vain, but the others need this process's part of the weights
        model.train()
        self.balancer.loads.clear()
        loss, items = self.accelerator.reduce(sums, "sum").tolist()
        return loss / max(items, 1)

    def _evaluation_batches(self, evaluation: EvaluationRecipe) -> Batches:
        # As the model is to be used: one block length, each first block where a prompt ends.
        layout = {**self._layout(evaluation.data), "block_size": self.size, "aligned": 1.0}
        # Generated tasks of the same seed would be those that are trained on.
        seed = _seed(self.recipe.seed)
        return self._batches(evaluation.data, evaluation.batch_size, BlockCollator(**layout), seed)

    def _evaluated(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """A batch's summed loss, and over how many tokens."""
        batch = {name: _moved(value, self.accelerator.device) for name, value in batch.items()}
        with self.accelerator.autocast():
            if self._trains_context:
                items = self._items(batch)
                loss = self._next_token_loss(model, batch, items)
            else:
                output = model(**batch)
                loss, items = output.loss, int(output.masked_tokens)
        return torch.tensor([float(loss) * items, items], dtype=torch.float64)

    # What is written

    def _log(self, figures: dict[str, Any], board: Any) -> None:
        if not self.accelerator.is_main_process:
            return
        _append(self.folder / LOG, {"step": self.step, **figures})
        for name, value in figures.items():
            if board is not None:
                board.add_scalar(name, value, self.step)
        if board is not None:
            board.flush()

    def _tensorboard(self) -> Any:
        if not (self.recipe.log.tensorboard and self.accelerator.is_main_process):
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError('log.tensorboard needs tensorboard; pip install "twotower[train]"') from error
        return SummaryWriter(self.folder / "tensorboard", purge_step=self.step + 1)

    def _write_samples(self) -> None:
        samples, is_main = self.recipe.samples, self.accelerator.is_main_process
        assert samples is not None
        if not (is_main or self.recipe.sharded):
            return
        self.model.eval()
        model = self.accelerator.unwrap_model(self.model)
        for prompt in samples.prompts:
            inputs = self.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(
                self.accelerator.device
            )
            with torch.no_grad():
                output = model.generate(
                    **inputs, max_new_tokens=samples.max_new_tokens, mode=samples.mode, do_sample=False
                )
            text = self.tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
            if is_main:
                _append(self.folder / SAMPLES, {"step": self.step, "prompt": prompt, "text": text})
        self.model.train()
        self.balancer.loads.clear()

    def _save(self) -> None:
        is_main, model = self.accelerator.is_main_process, self._inner()
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        stored = model.state_dict()
        if self.recipe.model.lora is not None:
            stored = {name: stored[name] for name in trained}
        stored, optimizer = gathered(stored, is_main), gathered(self.optimizer.state_dict(), is_main)
        if not is_main:
            return
        bad = [name for name in trained if not _finite(stored[name])]
        if bad:
            good = f"the last good checkpoint is {self.last}" if self.last else "there is none"
            raise ValueError(f"{bad[0]} is no number after step {self.step}, and was not stored; {good}")
        state = {
            "data": self.batches.position(),
            "files": self.files,
            "processes": self.accelerator.num_processes,
            "recipe": asdict(self.recipe),
            "seconds": self.seconds,
        }
        write_model = partial(self._write_model, model, stored if self.recipe.sharded else None)
        self.last = save_checkpoint(self.folder, self.step, write_model, optimizer, state, self.recipe.save.keep)

    def _inner(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def _write_model(self, model: Any, weights: dict[str, torch.Tensor] | None, place: Path) -> None:
        """Weights or adapter, and tokenizer. (Experts of a layer in one tensor, which is as they are trained.)"""
        options: dict[str, Any] = {} if self.recipe.model.lora is not None else {"save_original_format": False}
        model.save_pretrained(place, **options, **({} if weights is None else {"state_dict": weights}))
        self.tokenizer.save_pretrained(place)

    def _finish(self) -> None:
        """The finished model, and where there is one its adapter; and again to the Hub, if it was there before."""
        lora, hub = self.recipe.model.lora, self.recipe.hub
        if not self.accelerator.is_main_process:
            return
        if not (self.folder / self.finished).exists():
            # Of divided weights, the last checkpoint has all.
            model = self._adapted(self._model()[0]) if self.recipe.sharded else self._inner()
            if lora is not None:
                write_whole(self.folder / ADAPTER, partial(self._write_model, model, None))
            if self.finished == MODEL:
                merged = model if lora is None else model.merge_and_unload()
                write_whole(self.folder / MODEL, partial(self._write_finished, merged))
        if hub is not None:
            from ..checkpoints.export import export

            export(self.folder / MODEL, self.folder / "export", hub.repository, hub.private, overwrite=True)

    @property
    def finished(self) -> str:
        lora = self.recipe.model.lora
        return MODEL if lora is None or lora.merge else ADAPTER

    def _write_finished(self, model: TwoTowerForBlockDiffusion, place: Path) -> None:
        model.save_pretrained(place)
        self.tokenizer.save_pretrained(place)


def in_own_memory(model: TwoTowerForBlockDiffusion) -> TwoTowerForBlockDiffusion:
    """
    Move weights to memory that torch allocates.

    Loaded ones lie where they lie in their file, at addresses a checkpoint of another layout has them not, and what a
    matrix product of a CPU rounds depends on how they are aligned: a resumed run would differ in the last bit.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def _finite(tensor: torch.Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _append(file: Path, record: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(record) + "\n")


def _seed(*numbers: int) -> int:
    """A seed of its own for every combination of numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "big") >> 1


__all__ = ["Run", "train"]
