"""
Accelerators that exist in name only, so that what a model on several of them moves can be counted on a CPU.

Within `Cards()` every tensor has a card, "cpu" or what it was put on, and says so when asked for its device. Computing
with tensors on different cards is refused, as by real ones; what moves from one to another is noted. The numbers
themselves stay where they are.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from accelerate.hooks import AlignDevicesHook, attach_align_device_hook_on_blocks
from torch.overrides import TorchFunctionMode

HOST = torch.device("cpu")
MOVES = {"to", "cpu", "cuda", "pin_memory"}
READS = {"tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__", "equal", "allclose"}
WRITES = {"copy_", "set_"}
NEW = {
    "zeros",
    "ones",
    "empty",
    "full",
    "tensor",
    "as_tensor",
    "arange",
    "randint",
    "randn",
    "rand",
    "eye",
    "linspace",
}


class Crossing(NamedTuple):
    """Bytes that went from one card to another, or the host, and by which function."""

    source: str
    target: str
    bytes: int
    by: str


class Cards(TorchFunctionMode):
    """The mode; `crossings` is what moved so far."""

    def __init__(self) -> None:
        super().__init__()
        self.crossings: list[Crossing] = []

    def between(self, *cards: str) -> int:
        """Bytes that went from one of these to another of them, since `crossings` was last cleared."""
        return sum(each.bytes for each in self.crossings if each.source in cards and each.target in cards)

    def place(self, model: torch.nn.Module, device_map: dict[str, str], main: str) -> None:
        """As accelerate's `dispatch_model`, with its own hooks."""
        for part, device in device_map.items():
            module = model.get_submodule(part)
            self.put_model(module, torch.device(device))
        # The numbers are there already, and a parameter that is made anew would not know its card.
        with mock.patch.object(AlignDevicesHook, "init_hook", lambda hook, module: module):
            devices = {name: torch.device(device) for name, device in device_map.items()}
            attach_align_device_hook_on_blocks(
                model,
                execution_device={**devices, "": torch.device(main)},
                offload=dict.fromkeys(devices, False),
                skip_keys=model._skip_keys_device_placement,
            )
        model.hf_device_map = dict(device_map)

    def put_model(self, model: torch.nn.Module, device: torch.device) -> None:
        """Put all of it on one card, as `model.to(device)` does, without hooks."""
        put([*model.parameters(), *model.buffers()], device)

    def adopt(self, cache: Any, device: torch.device) -> Any:
        """Put on a card what a cache has read elsewhere."""
        for layer in (*cache.layers, cache.tokens):
            put(getattr(layer, "buffers", None) or getattr(layer, "state", None), device)
        cache.device, cache.uploaded, cache.mirror = device, None, None
        put(cache.embeddings, device)
        return cache

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        if func == torch.Tensor.device.__get__:
            return card_of(args[0])
        if name == "__get__":
            result = func(*args)
            return put(result, card_of(args[0])) if isinstance(result, torch.Tensor) else result
        if name in MOVES:
            return self.move(func, name, args, kwargs)
        given = kwargs.pop("device", None)
        made = None if given is None else torch.device(given)
        if name in NEW:
            result = func(*args, **kwargs)
            on = HOST if made is None else made
            if name in ("tensor", "as_tensor"):
                source = card_of(args[0]) if isinstance(args[0], torch.Tensor) else HOST
                self.note(source, on, result, name)
            return put(result, on)
        if name in READS:
            for tensor in tensors_in((args, kwargs)):
                self.note(card_of(tensor), HOST, tensor, name)
            return func(*args, **kwargs)
        if name in ("__getitem__", "__setitem__"):
            on = self.index(name, *args)
        elif name in WRITES:
            on = card_of(args[0])
            self.note(card_of(args[1]), on, args[1], name)
        else:
            on = agreed(name, tensors_in((args, kwargs)))
        return put(func(*args, **kwargs), on if made is None else made)

    def move(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        tensor, others = args[0], list(args[1:])
        target = HOST if name == "cpu" else card_of(tensor)
        kwargs.pop("non_blocking", None)
        if "device" in kwargs:
            given = kwargs.pop("device")
            target = target if given is None else torch.device(given)
        for place, other in enumerate(others):
            if isinstance(other, str | int | torch.device) and not isinstance(other, bool):
                target = torch.device(other)
                others[place] = HOST
            elif isinstance(other, torch.Tensor):
                target = card_of(other)
        result = tensor if name != "to" or not (others or kwargs) else func(tensor, *others, **kwargs)
        if target == card_of(tensor):
            return put(result, target)
        self.note(card_of(tensor), target, result, name)
        return put(result.clone() if result is tensor else result, target)

    def index(self, name: str, tensor: torch.Tensor, index: Any, value: Any = None) -> torch.device:
        """Indices may lie on the host, and are moved then; what is written may come from elsewhere, if by slices."""
        here, indices = card_of(tensor), list(tensors_in([index]))
        for part in indices:
            if card_of(part) not in (here, HOST):
                raise RuntimeError(f"{name}: a tensor on {here} is indexed by one on {card_of(part)}")
            self.note(card_of(part), here, part, name)
        if isinstance(value, torch.Tensor) and card_of(value) != here:
            if indices and value.ndim > 0:
                raise RuntimeError(f"{name}: {card_of(value)} is written to places of {here}")
            self.note(card_of(value), here, value, name)
        return here

    def note(self, source: torch.device, target: torch.device, tensor: torch.Tensor, by: str) -> None:
        if source != target:
            self.crossings.append(Crossing(str(source), str(target), tensor.numel() * tensor.element_size(), by))


def card_of(tensor: torch.Tensor) -> torch.device:
    return getattr(tensor, "_card", HOST)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)


def agreed(name: str, tensors: Iterable[torch.Tensor]) -> torch.device:
    """The card of all tensors; single numbers on the host go with any."""
    cards = {card_of(tensor) for tensor in tensors if tensor.ndim > 0 or card_of(tensor) != HOST}
    if len(cards) > 1:
        raise RuntimeError(f"{name}: tensors on {' and '.join(sorted(map(str, cards)))}")
    return next(iter(cards), HOST)


def put(result: Any, card: torch.device) -> Any:
    for tensor in tensors_in(result):
        tensor._card = card
    return result
