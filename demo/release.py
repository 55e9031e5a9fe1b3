"""
From a finished denoiser run to the checkpoint that the package embeds.

    python -m twotower.demo.release MODEL FOLDER TEMPERATURE

It is stored in bfloat16; its config asks for float32, in which a CPU runs it faster. The denoiser's confidence is
tempered (temperature scaling, Guo et al. 2017) by its head: what it predicts stays, but it must be surer of it to pass
the threshold. The temperature is chosen on the validation seed of demo/skills_evaluation.py.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from ..configuration_twotower import TwoTowerConfig
from ..generation_twotower import TwoTowerGenerationConfig
from ..modeling_twotower import TwoTowerForBlockDiffusion
from .skills_evaluation import MAX_NEW_TOKENS


def release(trained: Path, folder: Path, temperature: float) -> None:
    model = TwoTowerForBlockDiffusion.from_pretrained(trained, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    with torch.no_grad():
        model.lm_head.weight /= temperature
    model.generation_config = TwoTowerGenerationConfig(
        mode="mask_diffusion",
        block_size=model.config.block_size,
        steps_per_block=16,
        confidence_threshold=0.8,
        max_new_tokens=MAX_NEW_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder, save_original_format=False)
    tokenizer.save_pretrained(folder)
    config = TwoTowerConfig.from_pretrained(folder)
    config.dtype = torch.float32
    config.save_pretrained(folder)


if __name__ == "__main__":
    release(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
