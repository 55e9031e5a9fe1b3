"""One of two ranks that generate with one sharded model; see test_synchronisation.py.

`python generate_sharded.py RANK FOLDER` prints as JSON, per case, the rank's text or its error.
"""

import json
import os
import sys
from datetime import timedelta

import torch
from tiny import random_ids, tiny_model, without_special_tokens
from torch import distributed
from torch.distributed.fsdp import fully_shard

MODES = ("mask_diffusion", "self_speculative", "mock_ar", "ar")
# Per case: which modules are sharded on their own, and per rank its prompts' shape and the arguments of `generate`.
CASES = {mode: ("layers", ((2, 5), {"max_new_tokens": 5}), ((1, 9), {"max_new_tokens": 14})) for mode in MODES}
CASES = {
    name: (sharded, *((shape, {"mode": name, **given}) for shape, given in ranks))
    for name, (sharded, *ranks) in CASES.items()
}
CASES |= {
    "different modes": (
        "towers",
        ((2, 5), {"mode": "ar", "max_new_tokens": 9}),
        ((3, 2), {"mode": "mask_diffusion", "max_new_tokens": 11, "prefill_chunk_size": 1}),
    ),
    "sampling": (
        "towers",
        ((2, 5), {"mode": "mask_diffusion", "max_new_tokens": 9, "do_sample": True, "seed": 1}),
        ((2, 5), {"mode": "mask_diffusion", "max_new_tokens": 9, "do_sample": True, "seed": 2}),
    ),
    "an error": (
        "layers",
        ((1, 5), {"mode": "mask_diffusion", "max_new_tokens": 14, "step_callback": "fails"}),
        ((1, 5), {"mode": "mask_diffusion", "max_new_tokens": 14}),
    ),
}


def model_of_all():
    return without_special_tokens(tiny_model())


def text(model, rank, shape, given):
    if given.get("step_callback") == "fails":
        given = {**given, "step_callback": fail_in_second_block}
    try:
        return model.generate(random_ids(*shape, seed=rank), **given).tolist()
    except RuntimeError as error:
        return str(error)


def fail_in_second_block(state):
    if state.block == 1:
        raise RuntimeError("the callback failed")


def shard(model, by):
    towers = (model.context_tower, model.denoiser_tower)
    parts = [layer for tower in towers for layer in tower.layers]
    if by == "towers":
        parts = [*towers, model.context_lm_head, model.lm_head, model.t_block]
    for part in (*parts, model):
        fully_shard(part)
    return model


def main(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=30)
    )
    models = {by: shard(model_of_all(), by) for by in ("layers", "towers")}
    texts = {}
    for name, (by, *ranks) in CASES.items():
        shape, given = ranks[rank]
        # Asked for, or noticed.
        synced = {} if name == "sampling" else {"synced_gpus": True}
        texts[name] = text(models[by], rank, shape, {**given, **synced})
    print(json.dumps(texts), flush=True)
    os._exit(0)  # without destroying the group, which may never end: tests/tools/train_in_processes.py


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
