"""What a cache holds, once more on the devices where the denoiser's layers look at it, if these are others.

A block takes many denoiser passes, of which each looks at the whole context. So that this does not go from device to
device every time, each device keeps what its layers need, and before a pass gets what is new since: of every row the
keys and values of the tokens read meanwhile, and, if there are any, its Mamba states after them. So what crosses per
block is the same at every length of the context. The states are sent as they are rather than computed again from what
the scan was given, a sixth of their bytes at the released geometry: so they are equal to the last bit, on devices of
any two kinds, and a read keeps no more than it would for one device.

A row's length says which of its tokens are held, since its columns that count never change and a row that leaves is
forgotten. Nothing here is part of what the cache is: it may be dropped at any time, as in copies and after errors.

Shapes: N new tokens of all rows, Hkv key/value heads, D head dim.
"""

from collections.abc import Sequence
from itertools import chain

import torch

from .cache_twotower import (
    KeyValueLayer,
    KeyValues,
    MambaLayer,
    MambaState,
    TwoTowerCache,
    exchange_rows,
    uploaded,
)

NOTHING = -1  # what is held of a row whose states are not known either

Layer = KeyValueLayer | MambaLayer


class Mirror:
    """
    A cache's layers on other devices; rows are in the cache's places.

    Args:
        places: by layer the device it is wanted on; None where that is the cache's own.
    """

    def __init__(self, places: Sequence[torch.device | None]):
        self.places = list(places)
        self.layers: dict[int, Layer] = {}
        self.held: list[int] = []  # of each row, how many of its tokens

    def pull(self, cache: TwoTowerCache, rows: Sequence[int], columns: int, room: int = 0) -> None:
        """Fetch what is new of some rows of a cache that is no part, and have room for so many columns, and rows."""
        lengths = cache.host_lengths or []
        room = max(room, len(lengths))
        self.held += [NOTHING] * (len(lengths) - len(self.held))
        stale = [row for row in rows if self.held[row] != lengths[row]]
        fresh = [row for row in stale if not 0 <= self.held[row] < lengths[row]]
        news = _News(stale, [0 if row in fresh else self.held[row] for row in stale], [lengths[row] for row in stale])
        for idx, place in enumerate(self.places):
            home = cache.layers[idx]
            if place is None:
                continue
            own = self.layers.setdefault(idx, type(home)())
            if isinstance(home, KeyValueLayer) and home.buffers is not None:
                assert isinstance(own, KeyValueLayer)
                buffers = own.buffers
                if buffers is None or len(buffers.key) < room or buffers.key.shape[2] < columns:
                    like = KeyValues(*(buffer[:0].to(place) for buffer in home.buffers))
                    buffers = own.reserve(like, room, columns)
                if stale:
                    news.fetch_tokens(home.buffers, buffers, fresh)
            elif isinstance(home, MambaLayer) and home.state is not None and stale:
                assert isinstance(own, MambaLayer)
                like_state = MambaState(*(part[:0].to(place) for part in home.state))
                news.fetch_states(home.state, own.reserve(like_state, room))
        # Only now, so that after an error in the middle all of it is fetched again.
        for row in stale:
            self.held[row] = lengths[row]

    # What the cache does to its rows.

    def forget(self, kept: int) -> None:
        """The rows behind the first `kept` are gone."""
        del self.held[kept:]

    def swap_rows(self, first: int, second: int) -> None:
        self.held += [NOTHING] * (max(first, second) + 1 - len(self.held))
        self.held[first], self.held[second] = self.held[second], self.held[first]
        for part in self._tensors():
            if max(first, second) < len(part):
                exchange_rows(part, first, second)
            else:  # one of them is newer than what is held, and has no place here yet
                self.held[first] = self.held[second] = NOTHING

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these, in that order; what is held of them need not be fetched again."""
        self.held = [self.held[row] if row < len(self.held) else NOTHING for row in rows]
        # Those of which nothing is held have no place yet, and will be fetched into any.
        chosen = [row if held != NOTHING else 0 for row, held in zip(rows, self.held, strict=True)]
        with torch.inference_mode(False), torch.no_grad():
            for layer in self.layers.values():
                if isinstance(layer, KeyValueLayer) and layer.buffers is not None:
                    layer.buffers = KeyValues(*(part[uploaded(chosen, part.device)] for part in layer.buffers))
                elif isinstance(layer, MambaLayer) and layer.state is not None:
                    layer.state = MambaState(*(part[uploaded(chosen, part.device)] for part in layer.state))

    def _tensors(self) -> list[torch.Tensor]:
        held = (layer.buffers if isinstance(layer, KeyValueLayer) else layer.state for layer in self.layers.values())
        return list(chain.from_iterable(parts or () for parts in held))


class _News:
    """
    What is new of some rows.

    Args:
        rows: their places.
        starts, stops: of each the columns from, and before, which it is new.
    """

    def __init__(self, rows: Sequence[int], starts: Sequence[int], stops: Sequence[int]):
        self.rows = rows
        columns = [range(*ends) for ends in zip(starts, stops, strict=True)]
        self.tokens = (
            [row for row, own in zip(rows, columns, strict=True) for _ in own],
            list(chain.from_iterable(columns)),
        )
        self.uploaded: dict[torch.device, tuple[torch.Tensor, ...]] = {}

    def on(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Rows (R,), and of every new token (N,) its row and its column."""
        if device not in self.uploaded:
            self.uploaded[device] = tuple(uploaded(each, device) for each in (self.rows, *self.tokens))
        return self.uploaded[device]

    def fetch_tokens(self, source: KeyValues, target: KeyValues, fresh: Sequence[int]) -> None:
        for theirs, ours in zip(source, target, strict=True):
            if fresh:
                # What a masked column holds of a row that has left has no weight, but NaN times nothing is NaN.
                ours[uploaded(fresh, ours.device)] = 0
            _, rows, columns = self.on(theirs.device)
            moved = theirs.transpose(1, 2)[rows, columns].to(ours.device)  # (N, Hkv, D)
            _, rows, columns = self.on(ours.device)
            ours.transpose(1, 2)[rows, columns] = moved

    def fetch_states(self, source: MambaState, target: MambaState) -> None:
        for theirs, ours in zip(source, target, strict=True):
            ours[self.on(ours.device)[0]] = theirs[self.on(theirs.device)[0]].to(ours.device)


def views_on(cache: TwoTowerCache, devices: Sequence[torch.device | None]) -> list[KeyValues | MambaState | None]:
    """
    A cache's `views`, each layer's on its device.

    Args:
        devices: by layer; None where the cache's own will do. In a pass with gradients it does always:
            these go through a tensor that is moved, but not through one that is written to.
    """
    whole = cache if cache.whole is None else cache.whole
    if torch.is_grad_enabled() or whole.host_lengths is None:
        return cache.views()
    cache._check(settled=False)
    places = [
        None if home is None or device in (None, home) else device
        for device, home in zip(devices, map(_home, whole.layers), strict=True)
    ]
    if all(place is None for place in places):
        return cache.views()
    if whole.mirror is None or whole.mirror.places != places:
        whole.mirror = Mirror(places)
    rows = range(len(whole.host_lengths)) if cache is whole else cache.indices
    whole.mirror.pull(whole, rows, cache.columns or cache.width)
    return cache.views([whole.mirror.layers.get(idx, layer) for idx, layer in enumerate(whole.layers)])


def _home(layer: object) -> torch.device | None:
    """Where a layer of a cache holds what it holds; None where that is nothing."""
    held = (
        layer.buffers if isinstance(layer, KeyValueLayer) else layer.state if isinstance(layer, MambaLayer) else None
    )
    return None if held is None else held[0].device


__all__ = ["Mirror", "views_on"]
