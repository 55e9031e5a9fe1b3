"""CUDA graphs that exist in name only: what runs while one is captured runs again, on the very same tensors."""

from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS_BACK = ("_local_scalar_dense", "nonzero", "equal")


class FakeGraph:
    """In the place of `torch.cuda.CUDAGraph`."""

    made = 0

    def __init__(self):
        self.launches, self.replays = [], 0
        FakeGraph.made += 1

    def replay(self):
        self.replays += 1
        for function, args, kwargs, output in self.launches:
            found = function(*args, **kwargs)
            for old, new in zip(tree_leaves(output), tree_leaves(found), strict=True):
                # Of views and of what is done in place, the memory is that of an argument.
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Recorder(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph, self.undoing = graph, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in READS_BACK, f"{name} cannot be captured: the host would wait for the device"
        for place, argument in zip(args, function._schema.arguments, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.undoing.append((place, place.clone()))
        output = function(*args, **(kwargs or {}))
        self.graph.launches.append((function, args, kwargs or {}, output))
        return output


@contextmanager
def capture(graph, pool=None, capture_error_mode="global"):
    with Recorder(graph) as recorder:
        yield
    for place, before in reversed(recorder.undoing):  # capturing runs nothing
        place.copy_(before)


class FakeStream:
    def wait_stream(self, other):
        pass


def put_in_place(monkeypatch):
    """So that passes on a CPU are recorded."""
    from twotower.decoding import compiled

    FakeGraph.made = 0
    monkeypatch.setattr(compiled, "records_passes", lambda config, device: True)
    stand_ins = {
        "CUDAGraph": FakeGraph,
        "graph": capture,
        "Stream": FakeStream,
        "current_stream": FakeStream,
        "stream": lambda stream: nullcontext(),
        "graph_pool_handle": object,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return FakeGraph
