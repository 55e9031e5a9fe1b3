"""CUDA graphs that exist in name only: what runs while one is captured runs again, on the very same tensors."""

from contextlib import contextmanager
from weakref import WeakSet

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS_BACK = ("_local_scalar_dense", "nonzero", "equal")


class FakeGraph:
    """In the place of `torch.cuda.CUDAGraph`."""

    made = 0
    alive = WeakSet()
    emptied = []  # pools whose graphs have all gone, which torch takes for none any more

    def __init__(self):
        self.launches, self.fresh, self.pool, self.replays = [], [], None, 0
        FakeGraph.made += 1
        self.number = FakeGraph.made
        FakeGraph.alive.add(self)

    def __del__(self):
        if self.pool is not None and not any(
            other.pool is self.pool for other in FakeGraph.alive if other is not self
        ):
            FakeGraph.emptied.append(self.pool)

    def replay(self):
        assert FakeDevice.chosen, "a graph runs on the current card"
        self.replays += 1
        # What this one has freed, graphs of its pool that were captured later may have taken.
        for other in FakeGraph.alive:
            if other.pool is self.pool and other.number > self.number:
                for tensor in other.fresh:
                    tensor.fill_(77)
        with torch._C.DisableTorchFunction():  # a graph knows where its tensors are
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
        there = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        self.graph.fresh += [leaf for leaf in leaves if _storage(leaf) not in there]
        return output


def _storage(tensor):
    return tensor.untyped_storage().data_ptr()


@contextmanager
def capture(graph, pool=None, capture_error_mode="global"):
    assert not any(pool is each for each in FakeGraph.emptied), "use_count > 0 INTERNAL ASSERT FAILED"
    assert FakeDevice.chosen, "the current card is captured"
    graph.pool = pool
    before, FakeStream.current = FakeStream.current, FakeStream()
    with Recorder(graph) as recorder:
        yield  # torch stays on its stream if this fails
    FakeStream.current = before
    for place, before in reversed(recorder.undoing):  # capturing runs nothing
        place.copy_(before)


class FakeStream:
    current = None

    def wait_stream(self, other):
        pass


DEFAULT_STREAM = FakeStream.current = FakeStream()


@contextmanager
def on(stream):
    before, FakeStream.current = FakeStream.current, stream
    try:
        yield
    finally:
        FakeStream.current = before


class FakeDevice:
    chosen = []

    def __init__(self, device):
        self.device = device

    def __enter__(self):
        self.chosen.append(self.device)

    def __exit__(self, *_):
        self.chosen.pop()


def put_in_place(monkeypatch):
    """So that passes on a CPU are recorded."""
    from twotower.decoding import compiled

    FakeGraph.made, FakeStream.current = 0, DEFAULT_STREAM
    FakeGraph.emptied.clear()
    monkeypatch.setattr(compiled, "records_passes", lambda config, device: True)
    stand_ins = {
        "CUDAGraph": FakeGraph,
        "graph": capture,
        "Stream": FakeStream,
        "current_stream": lambda: FakeStream.current,
        "stream": on,
        "device": FakeDevice,
        "graph_pool_handle": object,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return FakeGraph
