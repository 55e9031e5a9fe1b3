"""Training of the demonstration model: the context tower autoregressively, then, frozen, a denoiser on top of it."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..configuration_twotower import TwoTowerConfig
from ..generation_twotower import TwoTowerGenerationConfig
from ..inputs_twotower import pack_tokens
from ..modeling_twotower import TwoTowerForBlockDiffusion
from ..training.optimizer import ExpertBalancer, MatrixOptimizer
from .batches import IGNORED, Batch, training_batches
from .problems import training_problems
from .tokenizer import train_tokenizer

TOKENIZER_PROBLEMS = 20_000
STATE_FILE = "training_state.pt"
# What the denoiser's logits are divided by in the end. A tower this small is surer than it is right: see `_release`.
CONFIDENCE_TEMPERATURE = 1.75


@dataclass(frozen=True)
class Stage:
    """
    One stage of training.

    Args:
        name: "context" or "denoiser".
        steps: optimiser steps.
        batch_size: problems per step.
        matrix_lr, other_lr: peak learning rates of Muon and AdamW.
        weight_decay: on matrices.
        warmup: steps of linear warmup.
        decay: share of the steps, at the end, over which the learning rate falls linearly to zero.
        aligned: share of rows whose first block starts where the prompt ends.
        numbers_only: share of rows in which only digits are masked and counted.
    """

    name: Literal["context", "denoiser"]
    steps: int
    batch_size: int = 32
    matrix_lr: float = 4e-3
    other_lr: float = 2e-3
    weight_decay: float = 0.1
    warmup: int = 100
    decay: float = 0.4
    aligned: float = 0.6
    numbers_only: float = 0.0

    def lr_factor(self, step: int) -> float:
        """Warmup-stable-decay."""
        left = (self.steps - step) / max(1, self.decay * self.steps)
        return min(1.0, (step + 1) / self.warmup, left)


CONTEXT = Stage("context", steps=3600)
DENOISER = Stage("denoiser", steps=7200, batch_size=24, matrix_lr=3e-3, other_lr=1.5e-3, numbers_only=0.5)


def demo_config() -> TwoTowerConfig:
    """Geometry of the demonstration model: ten layers of all three kinds, 1.9 M parameters per tower."""
    return TwoTowerConfig(
        vocab_size=512,
        hidden_size=128,
        hybrid_override_pattern="MEM*EMEM*E",
        mamba_num_heads=8,
        mamba_head_dim=32,
        ssm_state_size=32,
        n_groups=1,
        chunk_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        moe_shared_expert_intermediate_size=256,
        max_position_embeddings=2048,
    )


def context_loss(model: TwoTowerForBlockDiffusion, batch: Batch, _: torch.Generator) -> torch.Tensor:
    """Next-token cross-entropy over the answers, mean over tokens."""
    # Tokens first: behind them, padding needs no mask in a causal tower.
    packed = pack_tokens(batch.input_ids, batch.attention_mask)
    labels = batch.labels if packed.columns is None else batch.labels.gather(1, packed.columns)
    hidden_states = model.context_tower(packed.ids[:, :-1])
    wanted = labels[:, 1:] != IGNORED
    return F.cross_entropy(model.context_lm_head(hidden_states[wanted]).float(), labels[:, 1:][wanted])


def denoiser_loss(model: TwoTowerForBlockDiffusion, batch: Batch, generator: torch.Generator) -> torch.Tensor:
    """The masked-diffusion objective over the answers, every block counting alike, masked twice per context pass."""
    return model(**batch._asdict(), generator=generator, loss_weighting="inverse_timestep", corruptions=2).loss


LOSSES: dict[str, Callable[[TwoTowerForBlockDiffusion, Batch, torch.Generator], torch.Tensor]] = {
    "context": context_loss,
    "denoiser": denoiser_loss,
}


def train_demo(
    folder: Path, stages: tuple[Stage, ...] = (CONTEXT, DENOISER), seed: int = 0, save_every: int = 200
) -> None:
    """
    Train tokenizer and model into `folder`, continuing where an earlier call with the same folder stopped.

    Args:
        folder: gets `log.jsonl` (one line per ten steps), `last/` (the newest state, float32) and at the end the
            tokenizer and the model in bfloat16.
        stages: in order; a finished one is not run again.
        seed: of weights, problems, batches and masks.
        save_every: steps between saves.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    last, old = folder / "last", folder / "last.old"
    if old.exists() and not last.exists():  # stopped in the middle of `_save`
        old.rename(last)
    state = torch.load(last / STATE_FILE, weights_only=True) if last.exists() else {"done": []}
    if last.exists():
        tokenizer = AutoTokenizer.from_pretrained(last)
        model = TwoTowerForBlockDiffusion.from_pretrained(last)
    else:
        tokenizer = train_tokenizer(islice(training_problems(seed), TOKENIZER_PROBLEMS), demo_config().vocab_size)
        model = TwoTowerForBlockDiffusion(demo_config())
    for stage in stages:
        if stage.name not in state["done"]:
            state = run_stage(model, tokenizer, stage, state, folder, seed, save_every)
    _release(last, folder)


def _release(last: Path, folder: Path) -> None:
    """
    Store the model in bfloat16; its config asks for float32, in which a CPU runs it faster.

    The denoiser's confidence is tempered (temperature scaling, Guo et al. 2017), by its head: what it predicts stays,
    but it must be surer of it to pass the threshold.
    """
    model = TwoTowerForBlockDiffusion.from_pretrained(last, dtype=torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight /= CONFIDENCE_TEMPERATURE
    tokenizer = AutoTokenizer.from_pretrained(last)
    model.generation_config = TwoTowerGenerationConfig(
        mode="mask_diffusion",
        block_size=model.config.block_size,
        steps_per_block=16,
        confidence_threshold=0.8,
        max_new_tokens=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder, save_original_format=False)
    tokenizer.save_pretrained(folder)
    config = TwoTowerConfig.from_pretrained(folder)
    config.dtype = torch.float32
    config.save_pretrained(folder)


def run_stage(
    model: TwoTowerForBlockDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    stage: Stage,
    state: dict,
    folder: Path,
    seed: int,
    save_every: int,
) -> dict:
    """Run one stage to its end, from the saved state where that is of the same stage; returns the state after it."""
    resumed = state.get("stage") == stage.name
    if stage.name == "denoiser" and not resumed:
        model.reset_denoiser()
    model.set_trained_towers(stage.name)
    optimizer = MatrixOptimizer(model, stage.matrix_lr, stage.other_lr, stage.weight_decay)
    balancer = ExpertBalancer((model.context_tower if stage.name == "context" else model.denoiser_tower).modules())
    first, seconds = (state["step"], state["seconds"]) if resumed else (0, 0.0)
    if resumed:
        optimizer.load_state_dict(state["optimizer"])
    generator = torch.Generator().manual_seed(seed)
    if resumed:
        generator.set_state(state["generator"])
    batches = training_batches(
        tokenizer,
        stage.batch_size,
        model.config.block_size,
        stage.aligned,
        seed + 1,
        stage.numbers_only,
    )
    # An interrupted run goes on with the batches and masks it would have gone on with.
    batches = islice(batches, first, None)
    started = time.monotonic() - seconds
    with open(folder / "log.jsonl", "a") as log, _progress_bar() as progress:
        task = progress.add_task(stage.name, total=stage.steps, completed=first, loss="")
        for step in range(first, stage.steps):
            record = _train_step(model, next(batches), stage, step, optimizer, balancer, generator)
            record["seconds"] = round(time.monotonic() - started, 1)
            progress.update(task, advance=1, loss=f"{record['loss']:.4f}")
            if step % 10 == 0 or step + 1 == stage.steps:
                log.write(json.dumps(record) + "\n")
                log.flush()
            state = {**state, "stage": stage.name, "step": step + 1, "seconds": record["seconds"]}
            if (step + 1) % save_every == 0:
                kept = {"optimizer": optimizer.state_dict(), "generator": generator.get_state()}
                _save(model, tokenizer, {**state, **kept}, folder)
    state = {"done": [*state["done"], stage.name]}
    _save(model, tokenizer, state, folder)
    return state


def _train_step(
    model: TwoTowerForBlockDiffusion,
    batch: Batch,
    stage: Stage,
    step: int,
    optimizer: MatrixOptimizer,
    balancer: ExpertBalancer,
    generator: torch.Generator,
) -> dict:
    with torch.autocast("cpu", torch.bfloat16):
        loss = LOSSES[stage.name](model, batch, generator)
    loss.backward()
    norm = optimizer.step(stage.lr_factor(step))
    balancer.update()
    return {
        "stage": stage.name,
        "step": step,
        "loss": round(loss.item(), 5),
        "grad_norm": round(norm, 4),
        "answer_tokens": int((batch.labels != IGNORED).sum()),
    }


def _save(model: TwoTowerForBlockDiffusion, tokenizer: PreTrainedTokenizerBase, state: dict, folder: Path) -> None:
    """Replace `last/` as a whole, so that an interrupted save loses nothing."""
    new, last, old = folder / "last.new", folder / "last", folder / "last.old"
    shutil.rmtree(new, ignore_errors=True)
    model.save_pretrained(new)
    tokenizer.save_pretrained(new)
    torch.save(state, new / STATE_FILE)
    shutil.rmtree(old, ignore_errors=True)
    if last.exists():
        last.rename(old)
    new.rename(last)
    shutil.rmtree(old, ignore_errors=True)


def _progress_bar() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
    )
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn())
