"""
A pass as launches on a GPU that are recorded once and repeated: a CUDA graph of the kernels that an eager pass runs.

Nothing is compiled, so that a recording takes less than a second and computes what the eager pass does, bit for bit;
what it saves is the time that the host takes to launch some thousand kernels one by one. A recording knows tensors by
where they lie. It holds for the caches and weights that lay there, and [`Recording.fits`] says whether they do still.
"""

from collections.abc import Callable, Sequence
from operator import attrgetter, is_not
from threading import Lock
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from ..cache_twotower import MambaState
from .kept import prepared

version_of = attrgetter("_version")
recording = Lock()


class Weights:
    """A model's weights as they are now: where they lie, and which change of theirs this is."""

    def __init__(self, model: Any):
        # By module, as other tensors may come to stand in a weight's place.
        self.held = [held for module in model.modules() for held in (module._parameters, module._buffers) if held]
        self.tensors: list[torch.Tensor] = []
        self.counted: list[torch.Tensor] = []

    def state(self) -> tuple[list[int], list[int]]:
        tensors = [tensor for held in self.held for tensor in held.values() if tensor is not None]
        if len(tensors) != len(self.tensors) or any(map(is_not, tensors, self.tensors)):
            self.tensors = tensors
            # Those made in inference mode do not count their changes, of which they allow none outside of it.
            self.counted = [tensor for tensor in tensors if not tensor.is_inference()]
        return list(map(torch.Tensor.data_ptr, tensors)), list(map(version_of, self.counted))


class Recording:
    """
    A program's launches.

    Args:
        program: `program(model, static, *inputs)`; what is recorded reads nothing back from the device.
        model: [`TwoTowerForBlockDiffusion`].
        static: tensors, in lists and tuples, that later passes find in the same place, and may write to.
        inputs: tensors, or None, whose values a later pass brings.
        found: by module what is prepared of its weights, where it stays.
        pool: of memory, that of other recordings, too: of all of them one runs at a time.
    """

    def __init__(
        self,
        program: Callable[..., Any],
        model: Any,
        static: Any,
        inputs: Sequence[Any],
        found: dict[Any, Any],
        pool: Any,
    ):
        self.static, self.places = static, _where_they_lie(static)
        self.inputs = with_own_memory(list(inputs))
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
        with torch.cuda.stream(stream):
            program(model, self.static, *self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        # Keys and values are written again where they are, but states have gone on.
        for state, old in zip(states, before, strict=True):
            state.copy_(old)

    def fits(self, static: Any) -> bool:
        """Whether these tensors lie where those of the recording did."""
        return static is self.static or _where_they_lie(static) == self.places

    def __call__(self, inputs: Sequence[Any]) -> Any:
        """What the pass returns, until the next one overwrites it."""
        targets, sources = tree_leaves(self.inputs), tree_leaves(list(inputs))
        for target, source in zip(targets, sources, strict=True):
            if target is not None:
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
