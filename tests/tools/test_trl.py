"""
TRL's SFTTrainer: with our loss it trains the denoiser, with its own next-token loss the context tower. GRPOTrainer.
"""

from itertools import islice
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny import student_model, tiny_tokenizer
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from twotower.demo.tasks import training_tasks
from twotower.training.collator import BlockCollator


class DenoiserSFTTrainer(SFTTrainer):
    """SFTTrainer computes a next-token loss of its own; Trainer takes the model's."""

    compute_loss = Trainer.compute_loss


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def train(kind: type[SFTTrainer], model, tokenizer, folder: Path, **arguments) -> set[str]:
    """Two steps on worked problems; returns the parts of the model that changed."""
    problems = [{"prompt": each.prompt, "completion": " " + each.answer} for each in islice(training_tasks(1), 4)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    defaults = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_strategy": "no"}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False, "dataloader_pin_memory": False}
    collator = {"data_collator": arguments.pop("data_collator")} if "data_collator" in arguments else {}
    config = SFTConfig(str(folder), **{**defaults, **quiet, **arguments})
    kind(model, config, **collator, train_dataset=Dataset.from_list(problems), processing_class=tokenizer).train()
    return {name.split(".")[0] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def test_the_denoiser_learns_with_our_loss(tokenizer, tmp_path):
    model = student_model("all kinds", vocab_size=len(tokenizer))
    changed = train(DenoiserSFTTrainer, model, tokenizer, tmp_path)
    assert changed == {"denoiser_tower", "lm_head", "t_embedder", "t_block", "scale_shift_tables"}


def test_it_takes_our_collator(tokenizer, tmp_path):
    """Which lays out what SFTTrainer makes of prompts and completions."""
    model, widths = student_model("all kinds", vocab_size=len(tokenizer)), []
    collate = BlockCollator(tokenizer.eos_token_id, model.config.block_size)

    def watched(rows):
        batch = collate(rows)
        widths.append(batch["input_ids"].shape[1] % model.config.block_size)
        # A prompt is read and not trained on.
        assert (batch["labels"] == -100).sum() > (batch["attention_mask"] == 0).sum()
        return batch

    changed = train(DenoiserSFTTrainer, model, tokenizer, tmp_path, data_collator=watched)
    assert changed == {"denoiser_tower", "lm_head", "t_embedder", "t_block", "scale_shift_tables"}
    assert set(widths) == {0}


def test_the_context_tower_learns_with_its_own_if_asked_to(tokenizer, tmp_path):
    model = student_model("all kinds", vocab_size=len(tokenizer))
    model.set_trained_towers("context")
    assert train(SFTTrainer, model, tokenizer, tmp_path) == {"context_tower", "context_lm_head"}


def test_its_own_loss_does_not_train_a_frozen_context_tower(tokenizer, tmp_path):
    model = student_model("all kinds", vocab_size=len(tokenizer))
    with pytest.raises(RuntimeError, match="does not require grad"):
        train(SFTTrainer, model, tokenizer, tmp_path)


def test_the_context_tower_learns_from_rewards_for_its_own_texts(tokenizer, tmp_path):
    """GRPOTrainer says disable_compile=True, which is so anyway."""
    model = student_model("all kinds", vocab_size=len(tokenizer))
    model.set_trained_towers("context")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False, "dataloader_pin_memory": False}
    sizes = {"per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 6, "max_steps": 1}
    config = GRPOConfig(str(tmp_path), **quiet, **sizes, save_strategy="no", generation_kwargs={"mode": "ar"})
    problems = Dataset.from_list([{"prompt": each.prompt} for each in islice(training_tasks(1), 2)])
    rewards = iter(range(100))
    GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(next(rewards)) for _ in completions],
        args=config,
        train_dataset=problems,
        processing_class=tokenizer,
    ).train()
    changed = {
        name.split(".")[0] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed == {"context_tower", "context_lm_head"}
