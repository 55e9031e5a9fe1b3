"""The one cache of a TwoTower: what the context tower has read, which the denoiser only looks at.

Attention keeps every token's keys and values, Mamba its convolution inputs and its state. Nothing in the model
encodes positions, so a row's tokens lie packed at the front of its buffers, whatever padding surrounded them in the
prompt, and `lengths` says how many there are: rows may differ, and dropping a row's newest keys is a change of its
length.

Shapes: B batch rows, L most tokens of any row, Hkv key/value heads, D head dim, K kernel width, C channels,
H Mamba heads, P their dim, N state.
"""

from typing import NamedTuple

import torch
from transformers import Cache
from transformers.cache_utils import DummyLayer

from .configuration_twotower import TwoTowerConfig


class KeyValues(NamedTuple):
    """Keys and values of one attention layer, each (B, Hkv, T, D)."""

    key: torch.Tensor
    value: torch.Tensor


class MambaState(NamedTuple):
    """Convolution inputs (B, K - 1, C) and float32 scan state (B, H, P, N) of one Mamba layer."""

    conv: torch.Tensor
    ssm: torch.Tensor


class KeyValueLayer:
    """Growing buffers (B, Hkv, capacity, D); the first `lengths` columns of each row are valid."""

    def __init__(self) -> None:
        self.buffers: KeyValues | None = None

    def view(self, width: int) -> KeyValues | None:
        return None if self.buffers is None else KeyValues(*(buffer[:, :, :width] for buffer in self.buffers))

    def write(self, present: KeyValues, width: int, starts: torch.Tensor | None) -> None:
        """Write (B, Hkv, T, D) at column `width`, or where rows differ at each row's own start (B,)."""
        tokens = present.key.shape[2]
        self._reserve(present, width + tokens)
        assert self.buffers is not None
        for buffer, new in zip(self.buffers, present, strict=True):
            if starts is None:
                buffer[:, :, width : width + tokens] = new
            else:
                columns = starts[:, None] + torch.arange(tokens, device=new.device)
                buffer.scatter_(2, columns[:, None, :, None].expand_as(new), new)

    def _reserve(self, like: KeyValues, columns: int) -> None:
        """Grow by an eighth at least, so that appending costs amortised constant time."""
        held = 0 if self.buffers is None else self.buffers.key.shape[2]
        if columns <= held:
            return
        capacity = max(columns, held + held // 8 + 64)
        grown = [new.new_zeros(*new.shape[:2], capacity, new.shape[3]) for new in like]
        if self.buffers is not None:
            for old, new in zip(self.buffers, grown, strict=True):
                new[:, :, :held] = old
        self.buffers = KeyValues(*grown)

    def select_rows(self, rows: torch.Tensor) -> None:
        if self.buffers is not None:
            self.buffers = KeyValues(*(buffer.index_select(0, rows.to(buffer.device)) for buffer in self.buffers))


class MambaLayer:
    """The state after each row's last token."""

    def __init__(self) -> None:
        self.state: MambaState | None = None

    def view(self, width: int) -> MambaState | None:
        return self.state

    def write(self, present: MambaState, width: int, starts: torch.Tensor | None) -> None:
        self.state = present

    def select_rows(self, rows: torch.Tensor) -> None:
        if self.state is not None:
            self.state = MambaState(*(part.index_select(0, rows.to(part.device)) for part in self.state))


class StatelessLayer(DummyLayer):
    """MoE and MLP layers keep nothing."""

    def view(self, width: int) -> None:
        return None

    def select_rows(self, rows: torch.Tensor) -> None:
        return None


CACHE_LAYERS = {"full_attention": KeyValueLayer, "linear_attention": MambaLayer}


class TwoTowerCache(Cache):
    """
    Keys, values and states of the context tower after `lengths` tokens of each row.

    Args:
        config: [`TwoTowerConfig`], for the kind of each layer.
    """

    def __init__(self, config: TwoTowerConfig):
        super().__init__(layers=[CACHE_LAYERS.get(kind, StatelessLayer)() for kind in config.layers_block_type])
        self.lengths: torch.Tensor | None = None
        self.width = 0
        self.ragged = False

    def view(self, layer_idx: int) -> KeyValues | MambaState | None:
        """What layer `layer_idx` holds; keys and values are views of the first `width` columns, not copies."""
        return self.layers[layer_idx].view(self.width)

    def write(self, layer_idx: int, present: KeyValues | MambaState | None) -> None:
        """Add a layer's newest chunk. It counts once `advance` has been called for the chunk."""
        if present is not None:
            self.layers[layer_idx].write(present, self.width, self.lengths if self.ragged else None)

    def advance(self, batch: int, tokens: int, counts: torch.Tensor | None, device: torch.device) -> None:
        """Make a chunk of `tokens` columns count: all of them, or each row's first `counts` (B,)."""
        lengths = torch.zeros(batch, dtype=torch.long, device=device) if self.lengths is None else self.lengths
        if counts is None:
            self.lengths, self.width = lengths + tokens, self.width + tokens
        else:
            self.lengths = lengths + counts
            shortest, self.width = self.lengths.min().item(), int(self.lengths.max())
            self.ragged = shortest != self.width

    def context_mask(self) -> torch.Tensor | None:
        """(B, 1, 1, L) bool, True on a row's own tokens; None while all rows are equally long."""
        if not self.ragged or self.lengths is None:
            return None
        columns = torch.arange(self.width, device=self.lengths.device)
        return (columns < self.lengths[:, None])[:, None, None]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.width

    @property
    def batch_size(self) -> int:
        return -1 if self.lengths is None else len(self.lengths)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep the rows of index `rows` (R,), in that order."""
        for layer in self.layers:
            layer.select_rows(rows)
        if self.lengths is not None:
            self.lengths = self.lengths.index_select(0, rows)
            self.width = int(self.lengths.max())
            self.ragged = bool((self.lengths != self.width).any())


__all__ = ["KeyValues", "MambaState", "TwoTowerCache"]
