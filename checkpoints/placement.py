"""Which part of a TwoTower goes to which device: device maps of towers, and where a placed module computes.

A tower is divided between devices by layers, so that the largest share is as small as it can be.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

import torch
from torch import nn

from ..compat_twotower import is_accelerate_available

# Without the condition, transformers would ask everybody who loads an exported model to install accelerate.
if is_accelerate_available():
    from accelerate.utils import convert_file_size_to_int, get_max_memory

Device = int | str | torch.device
CONTEXT_PARTS = ("context_tower", "context_lm_head")
# In the order in which a pass goes through them.
DENOISER_PARTS = ("t_embedder", "t_block", "scale_shift_tables", "denoiser_tower", "lm_head")
TOWERS = ("context_tower", "denoiser_tower")


def towers_device_map(
    model: nn.Module,
    devices: Sequence[Device],
    itemsize: int | None = None,
    max_memory: Mapping[Any, int | str] | None = None,
) -> dict[str, Device]:
    """
    The device map "towers" of a model, which may be on the meta device.

    Args:
        model: [`TwoTowerForBlockDiffusion`].
        devices: of an even number, the context tower and its head get the first half, the denoiser, its head and its
            time conditioning the second; a tower with several devices is divided by layers, by bytes. Of an odd
            number, or if a half has not the room, both towers together are: one device then has layers of both.
        itemsize: bytes of a number; default as many as the model's have.
        max_memory: device -> most bytes, or such as "70GB"; default no limit.

    Returns:
        Module -> device, by names that `from_pretrained` and accelerate take as a `device_map`.

    Raises:
        ValueError: for no devices, one given twice, one that is none, and where a tower does not fit.
    """
    devices = _checked(devices)
    limits = [_limit(device, max_memory) for device in devices]
    towers = [parts for parts in (CONTEXT_PARTS, DENOISER_PARTS) if hasattr(model, parts[0])]
    units = [_units(model, parts, itemsize) for parts in towers]
    half = len(devices) // 2
    if len(units) == 2 and len(devices) % 2 == 0:
        context = _divided(units[0], devices[:half], limits[:half])
        denoiser = _divided(units[1], devices[half:], limits[half:])
        if context is not None and denoiser is not None:
            return _joined(context | denoiser)
    together = [*chain.from_iterable(units)]
    device_map = _divided(together, devices, limits)
    if device_map is None:
        places = ", ".join(f"{device} ({_human(limit)})" for device, limit in zip(devices, limits, strict=True))
        raise ValueError(
            f"{_human(sum(size for _, size in together))} of weights do not fit on {places}, layer by layer; allow "
            'more in max_memory, give more devices, offload with device_map="auto", or load one tower with '
            'towers="context"'
        )
    return _joined(device_map)


def devices_for_towers(max_memory: Mapping[Any, int | str] | None = None) -> list[Device]:
    """The accelerators named in `max_memory`, or all that there are; without any, the CPU."""
    if max_memory is not None:
        named: list[Device] = [device for device in max_memory if device not in ("cpu", "disk")]
        return named or ["cpu"]
    if not torch.accelerator.is_available():
        return ["cpu"]
    kind, count = str(torch.accelerator.current_accelerator()).split(":")[0], torch.accelerator.device_count()
    if kind == "mps":
        return ["mps"]
    return list(range(count)) if kind == "cuda" else [f"{kind}:{number}" for number in range(count)]


def memory_for_towers(max_memory: Mapping[Any, int | str] | None = None) -> Mapping[Any, int | str]:
    """`max_memory`, and for accelerators it does not name what they have free."""
    free = get_max_memory() if is_accelerate_available() and torch.accelerator.is_available() else {}
    free.pop("cpu", None)
    # accelerate numbers accelerators of every kind.
    names = dict(enumerate(devices_for_towers()))
    return {**{names.get(device, device): size for device, size in free.items()}, **(max_memory or {})}


def execution_device(module: nn.Module) -> torch.device | None:
    """Where a module with a weight computes: where that is, or if it is offloaded, where accelerate brings it."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    hook = getattr(module, "_hf_hook", None)
    if weight.device.type != "meta" or hook is None:
        return weight.device
    found = (getattr(one, "execution_device", None) for one in getattr(hook, "hooks", (hook,)))
    device = next((one for one in found if one is not None), None)
    return None if device is None else torch.empty(0, device=device).device  # "cuda" as "cuda:0"


def prompts_device(model: Any) -> torch.device:
    """Where a model's token ids go: not to the meta device, where offloaded embeddings are while nobody computes."""
    embeddings = model.context_tower.embeddings
    device = execution_device(embeddings) or embeddings.weight.device
    if device.type == "meta":
        raise ValueError(
            "the model's weights hold no data, as on the meta device; load it with from_pretrained, without "
            'device_map="meta"'
        )
    return device


def stays_in_place(hook: Any) -> bool:
    """Whether accelerate's hook leaves the weights of its module where they are."""
    return not any(getattr(one, "offload", True) for one in getattr(hook, "hooks", (hook,)))


def check_in_place(wanted: str, *modules: nn.Module) -> None:
    """Raise a ValueError that `wanted` changes weights which accelerate has elsewhere, and here nothing to change."""
    for hooked in (each for module in modules for each in module.modules() if hasattr(each, "_hf_hook")):
        if any(weight.is_meta for weight in hooked.parameters(recurse=False)):
            raise ValueError(
                f"{wanted} changes weights in place, and those of an offloaded module ({type(hooked).__name__}) are "
                "not here; load the model without a device_map that offloads, change it, and save it"
            )


def _checked(devices: Sequence[Device]) -> list[Device]:
    if isinstance(devices, str | int | torch.device) or len(devices) == 0:
        raise ValueError(f"devices for the towers are {devices!r}; give a list of one or more, such as [0, 1]")
    kinds = []
    for device in devices:
        try:
            if isinstance(device, bool):
                raise TypeError
            kinds.append(device if device == "disk" or isinstance(device, int) else str(torch.device(device)))
        except (RuntimeError, TypeError):
            raise ValueError(
                f"{device!r} is no device; give numbers of accelerators, or names such as 'cpu'"
            ) from None
        if isinstance(device, int) and device < 0:
            raise ValueError(f"{device} is no device; accelerators are numbered from 0")
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"devices for the towers are {list(devices)}, one of them twice; name each once")
    return list(devices)


def _limit(device: Device, max_memory: Mapping[Any, int | str] | None) -> float:
    value = None if max_memory is None else max_memory.get(device)
    return float("inf") if value is None else _bytes(device, value)


def _bytes(device: Device, value: int | str) -> float:
    size = -1
    if isinstance(value, int | str) and not isinstance(value, bool):
        with suppress(ValueError):
            size = convert_file_size_to_int(value)
    if size < 0:
        raise ValueError(f"max_memory of {device!r} is {value!r}; give a number of bytes, or one as '70GB' or '65GiB'")
    return size


def _units(model: nn.Module, parts: Sequence[str], itemsize: int | None) -> list[tuple[str, int]]:
    """What is not divided, in the order of a pass, and its bytes: a tower's layers, and what is before and behind."""
    names: list[str] = []
    for part in parts:
        module = model.get_submodule(part)
        if part not in TOWERS:
            names.append(part)
            continue
        for name, child in module.named_children():
            inner = [f".{idx}" for idx in range(len(list(child.children())))] if name == "layers" else [""]
            names += [f"{part}.{name}{number}" for number in inner]
    return [(name, _size(model.get_submodule(name), itemsize)) for name in names]


def _size(module: nn.Module, itemsize: int | None) -> int:
    return sum(
        tensor.numel() * (itemsize if itemsize and tensor.is_floating_point() else tensor.element_size())
        for tensor in module.state_dict().values()
    )


def _divided(
    units: Sequence[tuple[str, int]], devices: Sequence[Device], limits: Sequence[float]
) -> dict[str, Device] | None:
    """Runs of units for each device, the largest as small as it can be where each keeps to its limit, if any can."""
    total = sum(size for _, size in units)
    if _filled(units, devices, limits, total) is None:
        return None
    low, high = 0, total
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _filled(units, devices, limits, middle) is not None else (middle + 1, high)
    return _filled(units, devices, limits, low)


def _filled(
    units: Sequence[tuple[str, int]], devices: Sequence[Device], limits: Sequence[float], most: int
) -> dict[str, Device] | None:
    """Each device in turn filled as far as it may be, with `most` bytes at most; None if some are left."""
    placed: dict[str, Device] = {}
    number, free = 0, min(limits[0], most)
    for name, size in units:
        while size > free:
            number += 1
            if number == len(devices):
                return None
            free = min(limits[number], most)
        placed[name] = devices[number]
        free -= size
    return placed


def _joined(device_map: dict[str, Device]) -> dict[str, Device]:
    """With one entry for a tower, or a model, that is on one device."""
    if len(set(device_map.values())) == 1:
        return {"": next(iter(device_map.values()))}
    for tower in TOWERS:
        own = {name: device for name, device in device_map.items() if name.startswith(f"{tower}.")}
        if len(set(own.values())) == 1:
            joined = {tower: next(iter(own.values()))}
            device_map = joined | {name: device for name, device in device_map.items() if name not in own}
    return device_map


def _human(size: float) -> str:
    if size == float("inf"):
        return "no limit"
    power = sum(size >= 1000**power for power in (1, 2, 3))
    return f"{size / 1000**power:.1f} {('B', 'KB', 'MB', 'GB')[power]}"


__all__ = [
    "CONTEXT_PARTS",
    "DENOISER_PARTS",
    "check_in_place",
    "devices_for_towers",
    "execution_device",
    "memory_for_towers",
    "prompts_device",
    "stays_in_place",
    "towers_device_map",
]
