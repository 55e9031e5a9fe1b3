"""Trains a tiny model in each of the processes it is started in: `train_in_processes.py MODE RESULT`."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import random_ids, student_model

STEPS = 6


def step_rows(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of four rows: of unlike numbers of labels, at step 1 of none, at step 2 of one row alone."""
    ids = random_ids(4, 12, seed=step)
    labelled = torch.tensor([12, 3, 7, 9]) * (step != 1)
    if step == 2:
        labelled[1:] = 0
    return ids, ids.masked_fill(torch.arange(12) >= labelled[:, None], -100)


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    backward: Callable[[torch.Tensor], None],
    rank: int = 0,
    world: int = 1,
) -> list[float]:
    """A few steps on this process's share of the rows; the masks are those of an evaluation, alike in any division."""
    losses = []
    for step in range(STEPS):
        ids, labels = step_rows(step)
        items = int((labels != -100).sum())
        loss = model(ids[rank::world], labels=labels[rank::world], num_items_in_batch=items).loss
        backward(loss * world)  # gradients are averaged over processes
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    total = torch.stack(losses)
    if world > 1:
        dist.all_reduce(total)
    return total.tolist()


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.5)


def with_accelerate(result: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = student_model("all kinds")
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    assert type(model) is torch.nn.parallel.DistributedDataParallel and not model.find_unused_parameters
    losses = train(model, optimizer, accelerator.backward, accelerator.process_index, accelerator.num_processes)
    if accelerator.is_main_process:
        state = accelerator.unwrap_model(model).state_dict()
        torch.save({"losses": losses, "weights": state, "processes": accelerator.num_processes}, result)


def with_fsdp(result: Path) -> None:
    """FSDP2: every layer of both towers sharded, the rest with the whole model."""
    from torch.distributed.checkpoint import state_dict as sharded
    from torch.distributed.fsdp import FSDPModule, fully_shard

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    model = student_model("all kinds")
    for layer in (*model.context_tower.layers, *model.denoiser_tower.layers):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model, FSDPModule)
    model.activation_checkpointing_enable()
    losses = train(model, optimizer_of(model), torch.Tensor.backward, rank, world)
    whole = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
    # Copies, since buffers are not.
    state = {name: tensor.clone() for name, tensor in sharded.get_model_state_dict(model, options=whole).items()}
    if rank == 0:
        model.save_pretrained(result.parent / "saved", state_dict=state)
    # And back into the shards, after other weights.
    other = {name: torch.zeros_like(tensor) for name, tensor in student_model("all kinds").state_dict().items()}
    for each in (other, dict(state) if rank == 0 else {}):  # which torch makes shards of
        options = sharded.StateDictOptions(full_state_dict=True, broadcast_from_rank0=each is not other)
        sharded.set_model_state_dict(model, each, options=options)
    restored = sharded.get_model_state_dict(model, options=whole)
    if rank == 0:
        torch.save({"losses": losses, "weights": state, "restored": restored, "processes": world}, result)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"accelerate": with_accelerate, "fsdp": with_fsdp}[sys.argv[1]](Path(sys.argv[2]))
    # The group is never destroyed, here or as Python ends: torch would wait, with Python's lock, for a gloo thread
    # that may wait for that lock to let go of a tensor (4 of 45 runs never ended).
    os._exit(0)
