"""
What programs look at of a cache: buffers padded to a program's sizes, which stay where they are.

The first rows are looked at in the cache itself, others in copies, from which what is new is written back. Recordings
know tensors by where they lie, so that a cache that ends leaves its buffers to the next one; and where the denoiser is
on a card of its own, it looks at a [`Mirror`] there, of which there is one for each number of columns.

Shapes: R rows of a pass, B of its program.
"""

from collections.abc import Sequence
from operator import is_not
from typing import Any, cast

import torch

from ..cache_twotower import KeyValueLayer, KeyValues, KeyValueSlot, MambaLayer, MambaState, TwoTowerCache, uploaded
from ..mirror_twotower import Mirror
from .programs import LayerContent, Programs
from .recorded import with_own_memory

# Over fewer columns attention would cost no less that could be felt.
LEAST_COLUMNS = 256


def padded_size(count: int, least: int = 1) -> int:
    """The power of two to which a size is padded."""
    return max(least, 1 << (count - 1).bit_length())


class ProgramBuffers:
    """
    Where an engine's passes find what its cache holds.

    Args:
        model: [`TwoTowerForBlockDiffusion`].
        devices: of the "context" and the "denoiser".
    """

    def __init__(self, model: Any, devices: dict[str, torch.device]):
        self.model, self.device, self.devices = model, devices["context"], devices
        self.programs, self.records = Programs(), False
        self.templates: list[LayerContent] = []  # by layer what the cache will hold, of no rows
        self.scratch: dict[Any, list[LayerContent]] = {}  # by sizes, for copies of rows that do not lie together
        self.own: dict[int, KeyValues] = {}  # by layer's id, those made here, which nobody can want back
        # By sizes, see `_fitted` and `_first_rows`.
        self.fitted: dict[Any, tuple[list[LayerContent], list[LayerContent]]] = {}
        self.first: dict[Any, tuple[list[LayerContent], list[LayerContent]]] = {}

    def begin(self, programs: Programs, records: bool) -> None:
        """From now on passes run by these, compiled or recorded."""
        self.records = records
        if self.programs is not programs:
            self.programs, self.templates, self.scratch = programs, [], {}
            self.fitted, self.first = {}, {}

    def columns(self, cache: TwoTowerCache, tokens: int) -> int:
        """As many as the cache has, or more if these are too few for `tokens` more, or no power of two."""
        buffers = [layer.buffers for layer in cache.layers if isinstance(layer, KeyValueLayer)]
        held = [each.key.shape[2] for each in buffers if each is not None]
        return padded_size(max(cache.width + tokens, *held, 1), LEAST_COLUMNS) if buffers else 0

    def denoised(self, cache: TwoTowerCache, rows: int, columns: int) -> list[LayerContent]:
        """What the denoiser looks at, on its card: of B rows, R of them `cache`'s."""
        if self.devices["denoiser"] != self.device:
            return self._mirrored(cache, rows, columns)
        return self.held(cache, rows, columns, writes=False)[0]

    def held(
        self, cache: TwoTowerCache, rows: int, columns: int | None, writes: bool
    ) -> tuple[list[LayerContent], bool]:
        """
        What layers hold of B rows, R of them `cache`'s, and whether it is a copy.

        The first rows are looked at where they are, with what is behind them as padding; which must not be others'
        if the pass writes. Without `columns`, states alone.
        """
        whole = cache if cache.whole is None else cache.whole
        held = self._fitted(whole, max(whole.batch_size, rows), columns)
        return self._rows_of(held, cache, rows, columns, writes)

    def _rows_of(
        self, held: list[LayerContent], cache: TwoTowerCache, rows: int, columns: int | None, writes: bool
    ) -> tuple[list[LayerContent], bool]:
        """The cache's, padded to B, of what layers hold of all rows; see `held`."""
        count, whole = cache.batch_size, cache if cache.whole is None else cache.whole
        if isinstance(cache.rows, slice) and (not writes or count in (rows, whole.batch_size)):
            return self._first_rows(held, rows, columns), False
        return self._copied(held, [*cache.indices, *[cache.indices[0]] * (rows - count)], columns), True

    def _mirrored(self, cache: TwoTowerCache, rows: int, columns: int) -> list[LayerContent]:
        """What layers hold of B rows, on the denoiser's card. Of so many columns one mirror, which keeps its place."""
        whole, device = cache if cache.whole is None else cache.whole, self.devices["denoiser"]
        room = max(whole.batch_size, rows)
        self._fitted(whole, room, columns)
        mirror = self.programs.mirrors.get(columns)
        if mirror is None:
            devices = [device if isinstance(layer, KeyValueLayer | MambaLayer) else None for layer in whole.layers]
            mirror = self.programs.mirrors[columns] = Mirror(devices)
        if whole.mirror is not mirror:
            mirror.held, whole.mirror = [], mirror
        mirror.pull(whole, range(whole.batch_size) if cache is whole else cache.indices, columns, room)
        contents = [_content(mirror.layers.get(idx)) for idx in range(len(whole.layers))]
        known = self.fitted.get((device, columns))
        if known is None or any(map(is_not, contents, known[0])):
            known = self.fitted[device, columns] = contents, contents
        return self._rows_of(known[1], cache, rows, columns, writes=False)[0]

    def _fitted(self, whole: TwoTowerCache, rows: int, columns: int | None) -> list[LayerContent]:
        """What layers hold of so many rows and columns: the same list as long as it is the same that they hold."""
        known = self.fitted.get((rows, columns))
        if known is not None and not any(map(is_not, map(_content_to_write, whole.layers), known[0])):
            return known[1]
        self._fit(whole, rows, columns)
        contents = list(map(_content_to_write, whole.layers))
        held = [None if columns is None and isinstance(each, KeyValues) else each for each in contents]
        self.fitted[rows, columns] = contents, held
        return held

    def _first_rows(self, held: list[LayerContent], rows: int, columns: int | None) -> list[LayerContent]:
        """Views of them, the same ones as long as what is looked at stays where it is."""
        sizes = rows, columns, _device(held)
        known = self.first.get(sizes)
        if known is None or known[0] is not held:
            views = [each and self._static(type(each)(*(part[:rows] for part in each))) for each in held]
            known = self.first[sizes] = held, views
        return known[1]

    def _copied(self, held: list[LayerContent], indices: Sequence[int], columns: int | None) -> list[LayerContent]:
        """Copies of rows, which always lie in the same place."""
        # Of compiled programs, unlike recordings, another engine may run some at the same time.
        scratch = self.programs.scratch if self.records else self.scratch
        device = _device(held) or self.device
        index, sizes = uploaded(indices, device), (len(indices), columns, device)
        if sizes not in scratch:
            copies = [each and type(each)(*(part.index_select(0, index) for part in each)) for each in held]
            scratch[sizes] = [each and self._static(each) for each in copies]
            return scratch[sizes]
        for place, each in zip(scratch[sizes], held, strict=True):
            for copy, part in zip(place or (), each or (), strict=True):
                torch.index_select(part, 0, index, out=copy)
        return scratch[sizes]

    def write_back(self, cache: TwoTowerCache, held: list[LayerContent], tokens: int, states: bool = True) -> None:
        """Take over from copies of rows their last `tokens` keys and values, and their states."""
        whole, count = cache if cache.whole is None else cache.whole, cache.batch_size
        rows, own = uploaded(cache.indices, self.device), torch.arange(count, device=self.device)[:, None]
        places = uploaded(cache.host_lengths or [], self.device)[:, None] + torch.arange(tokens, device=self.device)
        for layer, each in zip(whole.layers, held, strict=True):
            if isinstance(each, KeyValues) and tokens:
                for buffer, copy in zip(layer.buffers, each, strict=True):
                    buffer.transpose(1, 2)[rows[:, None], places] = copy.transpose(1, 2)[own, places]
            elif isinstance(each, MambaState) and states:
                for state, copy in zip(layer.state, each, strict=True):
                    state.index_copy_(0, rows, copy[:count])

    def write_ids(self, ids: torch.Tensor, cache: TwoTowerCache) -> None:
        whole = cache if cache.whole is None else cache.whole
        starts = cache.lengths if cache.ragged else None
        slot = KeyValueSlot(whole.tokens, cache.rows, whole.batch_size, cache.width, starts)
        slot.write_ids(ids.to(cache.device))

    def _fit(self, whole: TwoTowerCache, rows: int, columns: int | None) -> None:
        """Room for so many rows, and just so many columns; zeros where nothing has been read."""
        for idx, layer in enumerate(whole.layers):
            if isinstance(layer, MambaLayer):
                layer.reserve(layer.state or self._template(idx), rows)
            elif isinstance(layer, KeyValueLayer) and columns is not None:
                held = layer.buffers or self._template(idx)
                if len(held.key) < rows or held.key.shape[2] != columns:
                    grown = self._grown(layer, idx, held, max(rows, len(held.key)), columns)
                    for old, new in zip(held, grown, strict=True):
                        new[: len(old), :, : old.shape[2]] = old
                    if self.records and self.own.get(id(layer)) is layer.buffers is not None:
                        self._leave(idx, held, len(whole.layers))
                    layer.buffers = self.own[id(layer)] = grown

    def _template(self, layer_idx: int) -> Any:
        """What a layer will hold, of no rows, as a pass over one token shows it."""
        if not self.templates:
            cache = TwoTowerCache(self.model.config)
            self.model.context_tower(torch.zeros(1, 1, dtype=torch.long, device=self.device), cache)
            self.templates = [each and type(each)(*(part[:0].clone() for part in each)) for each in cache.views()]
        return self.templates[layer_idx]

    def _static(self, held: Any) -> Any:
        """For a compiler's CUDA graphs, which would copy what they write to, or not be made."""
        if self.device.type == "cuda" and not self.records:
            for part in held:
                torch._dynamo.mark_static_address(part, guard=False)
        return held

    def reuse(self, cache: TwoTowerCache, tokens: int) -> None:
        """
        A cache without tokens takes over what an earlier one has left, if it would want as much: recordings know where
        it lies.
        """
        spare, whole = self.programs.spare, cache if cache.whole is None else cache.whole
        if not spare or not self.records or whole.width > 0:
            return
        rows = padded_size(whole.batch_size)
        expected = max([layer.expected for layer in whole.layers if isinstance(layer, KeyValueLayer)], default=0)
        room = self.programs.rooms.pop(padded_size(max(expected, tokens), LEAST_COLUMNS), [])
        self.programs.spare = ()
        for contents in (spare, room):
            if any(len(each[0]) < rows for each in contents if each is not None):
                continue
            for layer, content in zip(whole.layers, contents, strict=False):
                if content is not None:
                    for part in content:
                        part.zero_()
                    if isinstance(layer, KeyValueLayer):
                        layer.buffers = self.own[id(layer)] = cast(KeyValues, content)
                    else:
                        layer.state, layer.shared = cast(MambaState, content), False

    def _grown(self, layer: Any, layer_idx: int, held: KeyValues, rows: int, columns: int) -> KeyValues:
        """Zeros for keys and values to grow into; where passes are recorded, in their place of the last time."""
        known = self.programs.rooms.get(columns) if self.records else None
        there = known[layer_idx] if known else None
        if there is not None and len(there[0]) >= rows and there[0].shape[1::2] == held.key.shape[1::2]:
            known[layer_idx] = None  # type: ignore[index]
            for part in there:
                part.zero_()
            grown = cast(KeyValues, there)
        else:
            grown = KeyValueLayer().reserve(held, rows, columns)
        return grown

    def leave(self, cache: TwoTowerCache) -> None:
        """
        The cache leaves its buffers to the next one. If it is kept, it leaves those that were made here, which an
        error would not bring back, and has copies instead.
        """
        if cache.mirror in self.programs.mirrors.values():
            cache.mirror = None  # which is another's from now on
        # States that an eager pass has left may be of inference mode, and could not be written to.
        kept = any(getattr(each, "shared", False) or _is_inference(_content(each)) for each in cache.layers)
        if not kept:
            copied = with_own_memory if cache.batch_size else lambda content: None
            self.programs.spare = [getattr(layer, "state", None) for layer in cache.layers]
            for idx, held in enumerate(cache.layers):
                if isinstance(held, MambaLayer):
                    held.state = copied(held.state)
                elif (buffers := _content(held)) and (cache.batch_size == 0 or self.own.get(id(held)) is buffers):
                    self._leave(idx, buffers, len(cache.layers))
                    held.buffers = copied(buffers)
        self.own, self.fitted, self.first = {}, {}, {}  # which would keep buffers that have been outgrown

    def _leave(self, layer_idx: int, held: KeyValues, layers: int) -> None:
        """Nobody has these keys and values any more."""
        self.programs.rooms.setdefault(held.key.shape[2], [None] * layers)[layer_idx] = held


def _content(layer: Any) -> Any:
    return layer.buffers if isinstance(layer, KeyValueLayer) else getattr(layer, "state", None)


def _device(held: Sequence[LayerContent]) -> torch.device | None:
    return next((each[0].device for each in held if each is not None), None)


def _content_to_write(layer: Any) -> Any:
    """The same, but no states that are not to be written in place."""
    return None if isinstance(layer, MambaLayer) and layer.shared else _content(layer)


def _is_inference(held: LayerContent) -> bool:
    return held is not None and any(part.is_inference() for part in held)


__all__ = ["LEAST_COLUMNS", "ProgramBuffers", "padded_size"]
