"""
How many of 200 held-out problems get the text of mode "ar" in mode "self_speculative", at every setting: written to
equality.json beside this file, or where the one argument says. Takes ten minutes on one core.
"""

import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

import twotower
from twotower.bench.reports import write_json
from twotower.demo.evaluation import MAX_NEW_TOKENS, conditions
from twotower.demo.tasks import held_out_tasks
from twotower.evaluation.answers import cut_after_end, end_ids, tokenized
from twotower.modeling_twotower import TwoTowerForBlockDiffusion

PROBLEMS = 200
DRAFT_STEPS, BLOCK_SIZES, BATCH_SIZES = (1, 2, 4), (4, 8, 16, 32), (1, 8)
GREEDY: dict[str, Any] = {"do_sample": False}
SAMPLED = [{"do_sample": True, "temperature": temperature, "top_p": 0.9} for temperature in (0.7, 1.0)]


def main(file: Path) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    models = [load(dtype) for dtype in (torch.float32, torch.bfloat16)]
    rows = [row for model in models for row in compare(model)]
    # Each row says its own dtype.
    where = {name: value for name, value in conditions(models[0]).items() if name != "dtype"}
    write_json(file, {"problems": PROBLEMS, "rows": rows} | where)


def load(dtype: torch.dtype) -> TwoTowerForBlockDiffusion:
    return TwoTowerForBlockDiffusion.from_pretrained(twotower.demo_checkpoint(), dtype=dtype).eval()


def compare(model: TwoTowerForBlockDiffusion) -> list[dict[str, Any]]:
    """Float32 at every setting, greedy and at the trained block size sampled; bfloat16 greedy at the defaults."""
    full = model.dtype == torch.float32
    grid = list(product(DRAFT_STEPS, BLOCK_SIZES, BATCH_SIZES)) if full else [(1, 16, size) for size in BATCH_SIZES]
    rows = []
    for sampling in (GREEDY, *SAMPLED) if full else (GREEDY,):
        # In bfloat16 "ar" itself depends on the batch size.
        expected = {size: texts(model, size, mode="ar", **sampling) for size in BATCH_SIZES}
        assert not full or expected[BATCH_SIZES[0]] == expected[BATCH_SIZES[1]]
        for draft_steps, block_size, batch_size in grid:
            if sampling["do_sample"] and block_size != 16:
                continue
            settings = {"draft_steps": draft_steps, "block_size": block_size}
            found = texts(model, batch_size, mode="self_speculative", **settings, **sampling)
            equal = sum(text == other for text, other in zip(found, expected[batch_size], strict=True))
            rows.append(
                {
                    "dtype": str(model.dtype).removeprefix("torch."),
                    **settings,
                    "batch_size": batch_size,
                    **sampling,
                    "equal": equal,
                }
            )
            print(rows[-1], flush=True)
    return rows


def texts(model: TwoTowerForBlockDiffusion, batch_size: int, **options: Any) -> list[list[int]]:
    """Every problem's answer; sampled, with its own number as seed."""
    tokenizer = AutoTokenizer.from_pretrained(twotower.demo_checkpoint())
    ends, found = end_ids(model), list[list[int]]()
    prompts = [task.prompt for task in held_out_tasks("words", PROBLEMS, 0)]
    for batch in tokenized(prompts, batch_size, tokenizer, model):
        if options["do_sample"]:
            options["seed"] = list(range(len(found), len(found) + len(batch.input_ids)))
        sequences: Any = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, **options)
        found += [cut_after_end(row, ends) for row in sequences[:, batch.input_ids.shape[1] :].tolist()]
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("equality.json"))
