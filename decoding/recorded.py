"""
A pass as launches on a GPU that are recorded once and repeated: a CUDA graph of the kernels that an eager pass runs.

Nothing is compiled, so that a recording takes less than a second and computes what the eager pass does, bit for bit;
what it saves is the time that the host takes to launch some thousand kernels one by one. A recording knows tensors by
where they lie. It holds for the caches and weights that lay there, and [`Recording.fits`] says whether they do still.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import attrgetter, is_, is_not
from threading import Lock
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from ..cache_twotower import MambaState
from .kept import prepared

version_of = attrgetter("_version")
recording = Lock()


class Weights:
    """
    Modules' weights as they are now: where they lie, and which change of theirs this is.

    Every pass asks while the device waits, so that no Python runs for each of some hundred weights.
    """

    def __init__(self, modules: Iterable[torch.nn.Module]):
        # By module, as other tensors may come to stand in a weight's place.
        self.held: list[dict[str, Any]] = [
            held for module in modules for held in (module._parameters, module._buffers) if held
        ]
        self.found: list[Any] = []
        self.tensors: list[torch.Tensor] = []
        self.counted: list[torch.Tensor] = []

    def state(self) -> tuple[list[int], list[int]]:
        found: list[Any] = list(chain.from_iterable(map(dict.values, self.held)))
        if len(found) != len(self.found) or any(map(is_not, found, self.found)):
            self.found, self.tensors = found, [tensor for tensor in found if tensor is not None]
            # Those made in inference mode do not count their changes, of which they allow none outside of it.
            self.counted = [tensor for tensor in self.tensors if not tensor.is_inference()]
        return list(map(torch.Tensor.data_ptr, self.tensors)), list(map(version_of, self.counted))


class Recording:
    """
    A program's launches.

    Args:
        program: `program(model, static, *inputs)`; what is recorded reads nothing back from the device.
        model: [`TwoTowerForBlockDiffusion`].
        place: the card that it runs on, and a pool of memory, that of other recordings there, too: of all of them one
            runs at a time.
        static: tensors, in lists and tuples, that later passes find in the same place, and may write to.
        inputs: tensors, or None, whose values a later pass brings, maybe on the host.
        found: by module what is prepared of its weights, where it stays.
    """

    def __init__(
        self,
        program: Callable[..., Any],
        model: Any,
        place: tuple[torch.device, Any],
        static: Any,
        inputs: Sequence[Any],
        found: dict[Any, Any],
    ):
        device, pool = place
        self.static, self.places = static, _where_they_lie(static)
        self.inputs = [each if each is None else each.to(device, copy=True) for each in inputs]
        self.prepared = list(found.values())
        prepared.by_module = found
        try:
            self._record(program, model, pool)
        finally:
            prepared.by_module = None

    def _record(self, program: Callable[..., Any], model: Any, pool: Any) -> None:
        self._run_once(program, model)
        self.graph = torch.cuda.CUDAGraph()
        # A recording begins by a wait for the whole card, which ends that of another thread in an error. After one
        # that has failed torch leaves its stream the current one.
        captured = torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local")
        with recording, torch.cuda.stream(torch.cuda.current_stream()), captured:
            self.outputs = program(model, self.static, *self.inputs)

    def _run_once(self, program: Callable[..., Any], model: Any) -> None:
        """Kernels are loaded, and libraries given memory, in a first pass, which must not count."""
        leaves = tree_leaves(self.static, is_leaf=lambda each: isinstance(each, MambaState))
        states = [part for leaf in leaves if isinstance(leaf, MambaState) for part in leaf]
        before = [state.clone() for state in states]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                program(model, self.static, *self.inputs)
        finally:
            torch.cuda.current_stream().wait_stream(stream)
            # Keys and values are written again where they are, but states have gone on, some even if others failed.
            for state, old in zip(states, before, strict=True):
                state.copy_(old)

    def fits(self, static: Any) -> bool:
        """Whether these tensors lie where those of the recording did."""
        if len(static) == len(self.static) and all(map(is_, static, self.static)):
            return True
        if fits := _where_they_lie(static) == self.places:
            self.static = static  # by which they are known the next time
        return fits

    def __call__(self, inputs: Sequence[Any]) -> Any:
        """What the pass returns, until the next one overwrites it."""
        for target, source in zip(self.inputs, inputs, strict=True):
            if target is not None and source is not None:
                target.copy_(source, non_blocking=True)
        self.graph.replay()
        return self.outputs


def with_own_memory(tensors: Any) -> Any:
    """Copies of tensors, in lists and tuples as they are in."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, tensors)


def _where_they_lie(tensors: Any) -> list[Any]:
    return [
        (leaf.data_ptr(), leaf.shape, leaf.stride(), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf
        for leaf in tree_leaves(tensors)
    ]


__all__ = ["Recording", "Weights", "with_own_memory"]
