"""The one cache of a TwoTower: what the context tower has read, which the denoiser only looks at.

Attention keeps every token's keys and values, Mamba its convolution inputs and its state. Nothing in the model
encodes positions, so a row's tokens lie packed at the front of its buffers, whatever padding surrounded them in the
prompt, and `lengths` says how many there are: rows may differ, and dropping a row's newest keys is a change of its
length. A chunk may also be read tentatively: then each row keeps its own first few tokens of it, by `accept`.

Beside them it keeps the ids of these tokens and what is known of the model that read them, so that another text or
another model is refused rather than answered wrongly.

Shapes: B batch rows, L most tokens of any row, T tokens of a chunk, S tokens read tentatively, Hkv key/value heads, D
head dim, K kernel width, C channels, H Mamba heads, P their dim, G groups, N state, V vocabulary, E hidden size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any, NamedTuple
from weakref import ref

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache

from .configuration_twotower import TwoTowerConfig
from .kernels.causal_conv import conv_state
from .kernels.ssd import ssd_state


class KeyValues(NamedTuple):
    """Keys and values of one attention layer, each (B, Hkv, T, D)."""

    key: torch.Tensor
    value: torch.Tensor


class MambaState(NamedTuple):
    """Convolution inputs (B, K - 1, C) and float32 scan state (B, H, P, N) of one Mamba layer."""

    conv: torch.Tensor
    ssm: torch.Tensor


class MambaUpdate(NamedTuple):
    """
    What takes a Mamba layer's state through any number of a chunk's tokens.

    Convolution inputs and those before them (B, K - 1 + S, C), and the scan's x (B, S, H, P), dt (B, S, H), A (H,)
    and B (B, S, G, N).
    """

    inputs: torch.Tensor
    x: torch.Tensor
    dt: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor

    def apply(self, state: MambaState | None, counts: torch.Tensor) -> MambaState:
        """The state after each row's first `counts` (B,) tokens."""
        taps = self.inputs.shape[1] - self.x.shape[1] + 1
        ssm = ssd_state(self.x, self.dt, self.A, self.B, None if state is None else state.ssm, counts)
        return MambaState(conv_state(self.inputs, taps, counts), ssm)


class KeyValueSlot(NamedTuple):
    """Where a chunk's keys and values go: behind those `layer` holds, at column `width` or each row's start (B,)."""

    layer: "KeyValueLayer"
    width: int
    starts: torch.Tensor | None

    def append(self, chunk: KeyValues) -> KeyValues:
        """Write (B, Hkv, T, D); returns views of all there is then, (B, Hkv, width + T, D)."""
        return self.layer.write(chunk, self.width, self.starts)


Past = KeyValues | KeyValueSlot | MambaState | None
Present = KeyValues | MambaState | MambaUpdate | None


class KeyValueLayer:
    """Growing buffers (B, Hkv, capacity, D); the first `lengths` columns of each row are valid."""

    def __init__(self) -> None:
        self.buffers: KeyValues | None = None

    def view(self, width: int) -> KeyValues | None:
        if self.buffers is None or width == 0:
            return None
        return KeyValues(self.buffers.key[:, :, :width], self.buffers.value[:, :, :width])

    def slot(self, width: int, starts: torch.Tensor | None) -> KeyValueSlot:
        return KeyValueSlot(self, width, starts)

    def write(self, chunk: KeyValues, width: int, starts: torch.Tensor | None) -> KeyValues:
        """Write (B, Hkv, T, D) at column `width`, or where rows differ at each row's start; views of all up to it."""
        tokens = chunk.key.shape[2]
        self._reserve(chunk, width + tokens)
        held = self.view(width + tokens)
        assert held is not None
        for buffer, new in zip(held, chunk, strict=True):
            if starts is None:
                buffer[:, :, width:] = new
            else:
                columns = starts[:, None] + torch.arange(tokens, device=new.device)
                buffer.scatter_(2, columns[:, None, :, None].expand_as(new), new)
        return held

    def accept(self, counts: torch.Tensor) -> None:
        """The rows' lengths say which of the columns written count."""

    # In inference mode too, buffers are ordinary tensors: a later call outside of it must be able to write to them.
    @torch.inference_mode(False)
    def _reserve(self, like: KeyValues, columns: int) -> None:
        """Grow by an eighth at least, so that appending costs amortised constant time."""
        # From the beginning of a text on, buffers can only be those of a read that failed, maybe of other rows.
        if columns == like.key.shape[2]:
            self.buffers = None
        held = 0 if self.buffers is None else self.buffers.key.shape[2]
        if columns <= held:
            return
        capacity = max(columns, held + held // 8 + 64)
        grown = [new.new_zeros(*new.shape[:2], capacity, new.shape[3]) for new in like]
        if self.buffers is not None:
            for old, new in zip(self.buffers, grown, strict=True):
                new[:, :, :held] = old
        self.buffers = KeyValues(*grown)

    @torch.inference_mode(False)
    def select_rows(self, rows: torch.Tensor, width: int) -> None:
        held = self.view(width)
        self.buffers = held and KeyValues(*(part.index_select(0, rows.to(part.device)) for part in held))

    @torch.inference_mode(False)
    def replace_rows(self, layers: Sequence["KeyValueLayer"], rows: Sequence[int], width: int) -> None:
        held = [layer.view(width) for layer in layers]
        parts = [[F.pad(part, (0, 0, 0, width - part.shape[2])) for part in each] for each in _with_zeros(held, rows)]
        self.buffers = KeyValues(*map(torch.cat, zip(*parts, strict=True))) if parts else None


class TokenLayer(KeyValueLayer):
    """
    The ids read, plus one, in the place of keys (B, 1, capacity, 1), and values of no dimension.

    So 0, which fills buffers, says that a token's id is not known.
    """

    def write_ids(self, ids: torch.Tensor, width: int, starts: torch.Tensor | None) -> None:
        key = (ids.long() + 1)[:, None, :, None]
        self.write(KeyValues(key, key[..., :0]), width, starts)


class MambaLayer:
    """The state after each row's last token; `update` holds what a chunk read tentatively would do to it."""

    def __init__(self) -> None:
        self.state: MambaState | None = None
        self.update: MambaUpdate | None = None

    def view(self, width: int) -> MambaState | None:
        if self.state is not None and torch.is_grad_enabled() and self.state.ssm.is_inference():
            self.state = MambaState(*(part.clone() for part in self.state))
        return self.state

    def slot(self, width: int, starts: torch.Tensor | None) -> MambaState | None:
        return self.view(width)

    def write(self, present: MambaState | MambaUpdate) -> None:
        if isinstance(present, MambaUpdate):
            self.update = present
        else:
            self.state = present

    def accept(self, counts: torch.Tensor) -> None:
        assert self.update is not None
        self.state, self.update = self.update.apply(self.state, counts.to(self.update.dt.device)), None

    def select_rows(self, rows: torch.Tensor, width: int) -> None:
        if self.state is not None:
            self.state = MambaState(*(part.index_select(0, rows.to(part.device)) for part in self.state))

    def replace_rows(self, layers: Sequence["MambaLayer"], rows: Sequence[int], width: int) -> None:
        parts = _with_zeros([layer.state for layer in layers], rows)
        self.state = MambaState(*map(torch.cat, zip(*parts, strict=True))) if parts else None


class StatelessLayer:
    """MoE and MLP layers keep nothing."""

    def view(self, width: int) -> None:
        return None

    def slot(self, width: int, starts: torch.Tensor | None) -> None:
        return None

    def accept(self, counts: torch.Tensor) -> None:
        return None

    def select_rows(self, rows: torch.Tensor, width: int) -> None:
        return None

    def replace_rows(self, layers: Sequence["StatelessLayer"], rows: Sequence[int], width: int) -> None:
        return None


def _with_zeros(held: Sequence[KeyValues | MambaState | None], rows: Sequence[int]) -> list[tuple[torch.Tensor, ...]]:
    """What is held, with zeros for so many rows where nothing has been read; empty if nothing has been anywhere."""
    like = next((parts for parts in held if parts is not None), None)
    if like is None:
        return []
    nothing = [tuple(part.new_zeros(count, *part.shape[1:]) for part in like) for count in rows]
    return [zeros if parts is None else tuple(parts) for parts, zeros in zip(held, nothing, strict=True)]


CACHE_LAYERS = {"full_attention": KeyValueLayer, "linear_attention": MambaLayer}


# What of a config says which model a cache is of, in the order in which a difference is looked for.
GEOMETRY = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_key_value_heads",
    "head_dim",
    "mamba_num_heads",
    "mamba_head_dim",
    "ssm_state_size",
    "n_groups",
    "conv_kernel",
)


class TwoTowerCache(Cache):
    """
    Keys, values and states of the context tower after `lengths` tokens of each row; behind them, `tentative` columns
    that do not count until `accept` says how many of them do.

    Args:
        config: [`TwoTowerConfig`], of the model that will read with it.
    """

    def __init__(self, config: TwoTowerConfig):
        super().__init__(layers=[CACHE_LAYERS.get(kind, StatelessLayer)() for kind in config.layers_block_type])
        self.tokens = TokenLayer()
        self.lengths: torch.Tensor | None = None
        self.width = 0
        self.ragged = False
        self.tentative = 0
        self.geometry = _geometry(config)
        # Of the model that has read, once one has.
        self.dtype: torch.dtype | None = None
        self.embeddings: torch.Tensor | None = None
        self.reader: ref[nn.Module] | None = None  # the context tower that has read, or one like it

    @property
    def ids(self) -> torch.Tensor | None:
        """(B, L) tokens read, -1 where given as embeddings, meaningless beyond a row's own; None if none are known."""
        held = self.tokens.view(self.width)
        return None if held is None else held.key[:, 0, :, 0] - 1

    def write_ids(self, ids: torch.Tensor) -> None:
        """Keep a chunk's ids (B, T), which count as its states do; -1 where a token was given as an embedding."""
        ids = ids if self.lengths is None else ids.to(self.lengths.device)
        self.tokens.write_ids(ids, self.width, self.lengths if self.ragged else None)

    def sign(self, tower: Any) -> None:
        """Remember which context tower has read, and some of its embeddings in case it is no more."""
        if self.dtype is None:
            embeddings = tower.embeddings.weight
            self.dtype, self.embeddings, self.reader = _computing_dtype(embeddings), _some_of(embeddings), ref(tower)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "reader": None}  # which cannot be pickled

    def check_model(self, config: TwoTowerConfig, tower: Any) -> None:
        """
        Refuse a model that would not have read what is held: of another geometry, dtype, or with other weights.

        Weights are compared in a few places, those of all layers while the tower that has read is still there.

        Args:
            config: the model's.
            tower: its context tower.
        """
        embeddings = tower.embeddings.weight
        remedy = "give a cache of this model, or leave past_key_values out"
        dtype = _computing_dtype(embeddings)
        if self.dtype not in (None, dtype):
            raise ValueError(f"past_key_values was read in {self.dtype}, this model computes in {dtype}; {remedy}")
        reader = None if self.reader is None else self.reader()
        # Every pass asks, and comparing weights waits for the device.
        if reader is tower:
            return
        for name, expected in _geometry(config).items():
            if (held := self.geometry.get(name)) != expected:
                raise ValueError(
                    f"past_key_values is of another model: its {name} is {held!r}, this model's {expected!r}; {remedy}"
                )
        if _differ(self.embeddings, _some_of(embeddings)):
            raise ValueError(f"past_key_values is of a model with other embeddings than this model's; {remedy}")
        if reader is not None:
            own = dict(tower.named_parameters())
            for name, read in reader.named_parameters():
                if name in own and _differ(_some_of(read), _some_of(own[name])):
                    raise ValueError(f"past_key_values is of a model with another {name} than this model's; {remedy}")
        if self.embeddings is not None:
            self.reader = ref(tower)

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """
        If what is done within fails, leave the cache as it was.

        Nothing is copied for that: columns that count are never written over, and states, and buffers that grow or
        lose rows, are replaced by new ones. (So the old ones live on until this ends.)
        """
        before = self._sharing_all()
        try:
            yield
        except BaseException:
            self.__dict__.update(before.__dict__)
            raise

    def _sharing_all(self) -> "TwoTowerCache":
        """A cache of its own with the same tensors."""
        shared = copy(self)
        shared.layers, shared.tokens = [copy(layer) for layer in self.layers], copy(self.tokens)
        return shared

    def view(self, layer_idx: int) -> KeyValues | MambaState | None:
        """What layer `layer_idx` holds; keys and values are views of the first `width` columns, not copies."""
        return self.layers[layer_idx].view(self.width)

    def slot(self, layer_idx: int) -> KeyValueSlot | MambaState | None:
        """What layer `layer_idx` reads a chunk with: its state, or where its keys and values go."""
        self._check_accepted()
        return self.layers[layer_idx].slot(self.width, self.lengths if self.ragged else None)

    def write(self, layer_idx: int, present: MambaState | MambaUpdate) -> None:
        """Keep a layer's state after its newest chunk, which counts once `advance` or `accept` has been called."""
        self.layers[layer_idx].write(present)

    def advance(self, batch: int, tokens: int, counts: torch.Tensor | None, device: torch.device) -> None:
        """Make a chunk of `tokens` columns count: all of them, or each row's first `counts` (B,)."""
        lengths = torch.zeros(batch, dtype=torch.long, device=device) if self.lengths is None else self.lengths
        if counts is None:
            self.lengths, self.width = lengths + tokens, self.width + tokens
        else:
            self._set_lengths(lengths + counts.to(lengths.device))

    def accept(self, counts: torch.Tensor) -> None:
        """
        Let each row's first tokens of the chunk read tentatively count, and forget the rest of it.

        Args:
            counts: (B,) tokens per row, 0 to S.

        Raises:
            ValueError: when no chunk was read tentatively, or for counts outside its size.
        """
        if self.tentative == 0:
            raise ValueError("accept was called, but no chunk has been read with tentative=True since the last call")
        fewest, most = torch.stack(counts.aminmax()).tolist()
        if fewest < 0 or most > self.tentative:
            raise ValueError(f"counts are {counts.tolist()}; the chunk read tentatively has {self.tentative} tokens")
        for layer in self.layers:
            layer.accept(counts)
        self.advance(len(counts), fewest, None if fewest == most else counts, counts.device)
        self.tentative = 0

    def _check_accepted(self) -> None:
        if self.tentative:
            raise ValueError(f"the cache holds {self.tentative} tokens read tentatively; call accept(counts) first")

    def context_mask(self) -> torch.Tensor | None:
        """(B, 1, 1, L) bool, True on a row's own tokens; None while all rows are equally long."""
        if not self.ragged or self.lengths is None:
            return None
        columns = torch.arange(self.width, device=self.lengths.device)
        return (columns < self.lengths[:, None])[:, None, None]

    def visible_to(self, tokens: int) -> torch.Tensor | None:
        """
        (B or 1, 1, T, width + T) bool, what each of T columns behind a row's own may see; None when that is all of
        them, or at the beginning, where causality says the same.
        """
        if self.lengths is None or self.width == 0 or (tokens == 1 and not self.ragged):
            return None
        starts = self.lengths if self.ragged else self.lengths[:1]
        newest = starts[:, None] + torch.arange(tokens, device=starts.device)
        return (torch.arange(self.width + tokens, device=starts.device) <= newest[..., None])[:, None]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.width

    @property
    def batch_size(self) -> int:
        return -1 if self.lengths is None else len(self.lengths)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep the rows of index `rows` (R,), in that order, and no more columns than they use."""
        self._check_accepted()
        # Of a cache that has read nothing, any rows.
        lengths = torch.zeros_like(rows) if self.lengths is None else self.lengths.index_select(0, rows)
        self._set_lengths(lengths)
        for layer in (*self.layers, self.tokens):
            layer.select_rows(rows, self.width)

    def copy_rows(self, rows: torch.Tensor) -> "TwoTowerCache":
        """A cache of its own for copies of the rows of index `rows` (R,), which may repeat."""
        copied = self._sharing_all()
        copied.select_rows(rows)
        return copied

    def replace_rows(self, caches: Sequence["TwoTowerCache"]) -> None:
        """Hold the rows of `caches`, one cache after the other, instead of what was held."""
        for cache in (self, *caches):
            cache._check_accepted()
        lengths = [cache.lengths for cache in caches if cache.lengths is not None]
        assert len(lengths) == len(caches) > 0, "a cache that has read nothing has rows once some were selected"
        self._set_lengths(torch.cat(lengths))
        signed = next((cache for cache in caches if cache.dtype is not None), caches[0])
        self.geometry, self.dtype, self.embeddings = signed.geometry, signed.dtype, signed.embeddings
        held = ((*cache.layers, cache.tokens) for cache in (self, *caches))
        for layer, *replacements in zip(*held, strict=True):
            layer.replace_rows(replacements, [len(each) for each in lengths], self.width)

    def _set_lengths(self, lengths: torch.Tensor) -> None:
        shortest, longest = torch.stack(lengths.aminmax()).tolist()
        self.lengths, self.width, self.ragged = lengths, longest, shortest != longest


def _geometry(config: TwoTowerConfig) -> dict[str, Any]:
    facts = {name: getattr(config, name) for name in GEOMETRY}
    return facts | {f"layers_block_type[{idx}]": kind for idx, kind in enumerate(config.layers_block_type)}


def _computing_dtype(embeddings: torch.Tensor) -> torch.dtype:
    """Of the keys a model with such embeddings computes; they may be offloaded (device "meta")."""
    device = embeddings.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return embeddings.dtype


def _differ(some: torch.Tensor | None, others: torch.Tensor | None) -> bool:
    """Whether two samples of weights are known and not the same."""
    return some is not None and others is not None and not some.to(others.device).equal(others)


def _some_of(weights: torch.Tensor) -> torch.Tensor | None:
    """A few numbers to tell models apart by; None where they are offloaded, sharded or quantised."""
    if weights.device.type == "meta" or type(weights) not in (torch.Tensor, torch.nn.Parameter):
        return None
    rows = weights.detach()[:: max(1, len(weights) // 16)]
    return rows.flatten(1)[:, :8].clone() if rows.ndim > 1 else rows.clone()


__all__ = ["KeyValueSlot", "KeyValues", "MambaState", "MambaUpdate", "Past", "Present", "TwoTowerCache"]
