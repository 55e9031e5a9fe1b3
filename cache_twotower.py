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

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import index
from typing import Any, NamedTuple, TypeVar
from weakref import ref

import torch
from torch import nn
from transformers import Cache

from .configuration_twotower import TwoTowerConfig
from .kernels.block_attention import JOINED
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


Counts = Sequence[int] | torch.Tensor


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

    def apply(
        self, state: MambaState | None, counts: torch.Tensor, backend: str = "auto", in_place: bool = False
    ) -> MambaState:
        """The state after each row's first `counts` (B,) tokens, from the one before them, as asked in its place."""
        taps, before = self.inputs.shape[1] - self.x.shape[1] + 1, None if state is None else state.ssm
        conv = conv_state(self.inputs, taps, counts)
        ssm = ssd_state(self.x, self.dt, self.A, self.B, before, counts, in_place, backend)
        return MambaState(state.conv.copy_(conv) if in_place and state is not None else conv, ssm)


Rows = slice | torch.Tensor
Held = TypeVar("Held", KeyValues, MambaState)


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """
    In inference mode too, what is made within are ordinary tensors: a later call outside of it must be able to write
    to them. Leaving that mode turns gradients on; what is copied within `no_grad` must not begin to have any.
    """
    with_gradients = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(with_gradients):
        yield


class KeyValueLayer:
    """Buffers (rows, Hkv, columns, D) with room for more than is held; what of them counts is the cache's to say."""

    buffers: KeyValues | None = None
    shared = False  # with passes that need them for their gradients, so that they are not to be written to
    expected = 0  # how many columns there will be at least

    def reserve(self, like: KeyValues, rows: int, columns: int) -> KeyValues:
        """
        Buffers for so many rows and columns at least, of `like`'s other sizes, that can be written to; grown in
        buckets, by copying.
        """
        held_rows, held_columns = (0, 0) if self.buffers is None else self.buffers.key.shape[:3:2]
        if columns > held_columns:  # by a share at least, so that appending costs amortised constant time
            share = held_columns // (8 if held_columns < LONG else 32)
            columns = max(columns, held_columns + share, self.expected)
            columns += -columns % COLUMNS
        if rows > held_rows:
            rows = max(rows, 2 * held_rows)
        size = max(rows, held_rows), max(columns, held_columns)
        if size == (held_rows, held_columns) and self.buffers is not None and not self.shared:
            return self.buffers
        with ordinary_tensors():
            if self.buffers is None:
                self.buffers = KeyValues(
                    *(part.new_zeros(size[0], part.shape[1], size[1], part.shape[3]) for part in like)
                )
                return self.buffers
            # One after the other, so that only one is there twice; keys last, since they say how much room there is.
            for name in ("value", "key"):
                old = getattr(self.buffers, name)
                new = old.new_zeros(size[0], old.shape[1], size[1], old.shape[3])
                new[:held_rows, :, :held_columns] = old[:held_rows, :, :held_columns]
                del old
                self.buffers = self.buffers._replace(**{name: new})
            self.shared = False
            return self.buffers


class KeyValueSlot(NamedTuple):
    """
    Where a chunk's keys and values go: in `rows` of the layer's, of which there are `of`, at column `width` or where
    rows differ at each one's start (B,).
    """

    layer: KeyValueLayer
    rows: Rows
    of: int
    width: int
    starts: torch.Tensor | None

    def update(self, chunk: KeyValues) -> KeyValues:
        """Write (B, Hkv, T, D); returns all there is then, (B, Hkv, width + T, D), of a slice of rows in views."""
        key, value = self.write(chunk)
        columns = self.width + chunk.key.shape[2]
        return rows_of(KeyValues(key.narrow(2, 0, columns), value.narrow(2, 0, columns)), self.rows)

    def write(self, chunk: KeyValues) -> KeyValues:
        """Write (B, Hkv, T, D); returns the buffers."""
        rows, tokens = self.rows, chunk.key.shape[2]
        held = self.layer.buffers
        lacking = held is None or held.key.shape[0] < self.of or held.key.shape[2] < self.width + tokens
        del held  # which is to be freed as it grows
        if lacking or self.layer.shared:
            self.layer.reserve(chunk, self.of, self.width + tokens)
        buffers = self.layer.buffers
        assert buffers is not None
        if self.starts is None and isinstance(rows, slice):
            for buffer, new in zip(buffers, chunk, strict=True):
                if new.shape[3] > 0:
                    place = buffer.narrow(2, self.width, tokens)
                    (place if rows == slice(0, buffer.shape[0]) else place[rows]).copy_(new)
            return buffers
        device = chunk.key.device
        chosen = torch.arange(len(chunk.key), device=device) if isinstance(rows, slice) else rows
        places = torch.arange(tokens, device=device) + (self.width if self.starts is None else self.starts[:, None])
        for buffer, new in zip(buffers, chunk, strict=True):
            buffer.transpose(1, 2)[chosen[:, None], places] = new.transpose(1, 2)
        return buffers

    def write_ids(self, ids: torch.Tensor) -> None:
        """Write (B, T) token ids, as keys without values; 0 stands for none."""
        keys = (ids.long() + 1)[:, None, :, None]
        self.write(KeyValues(keys, keys.narrow(3, 0, 0)))

    def read_with(self, chunk: KeyValues) -> tuple[KeyValues, KeyValues | None]:
        """
        Write (B, Hkv, T, D); returns the context (B, Hkv, width, D) and the chunk. Where these are one token or few
        columns, attention costs less over them as one: (B, Hkv, width + T, D) and None.
        """
        columns, tokens = self.update(chunk), chunk.key.shape[2]
        if tokens == 1 or self.width + tokens <= JOINED:
            return columns, None
        return KeyValues(*(part[:, :, : self.width] for part in columns)), chunk


class MambaLayer:
    """
    The state after each row's last token, of as many rows as the cache has at least; None while none has any.

    Rows are written in place, unless the tensors are `shared` with who may want them back.
    """

    state: MambaState | None = None
    shared = False

    def reserve(self, like: MambaState, rows: int) -> MambaState:
        """States of so many rows at least, zeros where there were none, that can be written to in place."""
        held = self.state
        grown = held is None or len(held.ssm) < rows
        if held is None or grown or self.shared or torch.is_grad_enabled() or held.ssm.is_inference():
            with ordinary_tensors():
                count = max(rows, 0 if held is None else (1 + grown) * len(held.ssm))
                new = MambaState(*(part.new_zeros(count, *part.shape[1:]) for part in like))
                for old, place in zip(held or (), new, strict=False):
                    place[: len(old)] = old
            self.state, self.shared = new, False
            return new
        return held


def rows_of(held: Held, rows: Rows) -> Held:
    """Views of a slice of rows, copies of others."""
    if isinstance(rows, slice):
        # What was computed in inference mode, a pass with gradients could not save.
        cloned = torch.is_grad_enabled() and held[0].is_inference()
        if rows == slice(0, held[0].shape[0]) and not cloned:
            return held
        return type(held)(*(part[rows].clone() if cloned else part[rows] for part in held))
    return type(held)(*(part.index_select(0, rows.to(part.device)) for part in held))


def _rows_on(device: torch.device, rows: Rows) -> Rows:
    return rows if isinstance(rows, slice) else rows.to(device)


Past = KeyValues | KeyValueSlot | MambaState | None
Present = KeyValues | MambaState | MambaUpdate | None


class StatelessLayer:
    """MoE and MLP layers keep nothing."""


CACHE_LAYERS = {"full_attention": KeyValueLayer, "linear_attention": MambaLayer}
# Buffers have a multiple of so many columns, so that a program compiled for a size serves many widths.
COLUMNS = 64
# Those with as many grow by less: there room that is not used costs more than copies.
LONG = 2**14


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
    Keys, values and states of the context tower after the first tokens of each row; behind them, `tentative` columns
    that do not count until `accept` says how many of them do.

    The host knows all lengths (`host_lengths`, `width` the longest, `ragged` whether they differ), so that nothing
    here reads from the device, but of counts and rows that are given as tensors, which are read at once.

    Rows can be added, dropped and exchanged, and [`~TwoTowerCache.part`] is a cache of some of them, which the model
    reads and denoises with.

    Args:
        config: [`TwoTowerConfig`], of the model that will read with it.
    """

    def __init__(self, config: TwoTowerConfig):
        super().__init__(layers=[CACHE_LAYERS.get(kind, StatelessLayer)() for kind in config.layers_block_type])
        self.geometry = {name: getattr(config, name) for name in GEOMETRY}
        self.geometry |= {f"layers_block_type[{idx}]": kind for idx, kind in enumerate(config.layers_block_type)}
        self.reset()

    def reset(self) -> None:
        """Forget what was read, by whom, and all rows."""
        self.layers: list[Any] = [type(layer)() for layer in self.layers]
        # The ids read, plus one, as keys (B, 1, columns, 1) with values of no dimension. So 0, which fills buffers,
        # says that a token's id is not known.
        self.tokens = KeyValueLayer()
        self.host_lengths: list[int] | None = None  # replaced, never changed in place
        self.width = 0
        self.ragged = False
        self.tentative = 0
        self.updates: dict[int, MambaUpdate] = {}  # by layer, of the chunk read tentatively
        self.limits: list[int] | None = None  # how many of its tokens each row has; None for all
        self.device = torch.device("cpu")
        self.uploaded: torch.Tensor | None = None  # `host_lengths`, once wanted
        # Of a part: whose rows it has, and which; else all. What `rows` index is all that `version` stands for.
        self.whole: TwoTowerCache | None = None
        self.rows: Rows = slice(0, 0)
        self.indices: Sequence[int] = ()
        self.version = object()
        # Of a part with `room`: how many columns buffers have, which it then always looks at, whatever counts.
        self.columns: int | None = None
        self.undoing: list[Callable[[], None]] | None = None  # how to take back what was done in place, oldest first
        # Of the model that has read, once one has.
        self.computed_in: torch.dtype | None = None  # not "dtype", by which accelerate would take it for a tensor
        self.embeddings: torch.Tensor | None = None
        self.reader: ref[nn.Module] | None = None  # the context tower that has read, or one like it
        self.kernels: Mapping[str, str] = {}  # operation -> backend, of the tower that read last
        self.mirror: Any = None  # a [`Mirror`] for layers of the denoiser on other devices, once a pass has needed it

    @property
    def lengths(self) -> torch.Tensor | None:
        """(B,) `host_lengths` on the device; None while no rows are known."""
        if self.uploaded is None and self.host_lengths is not None:
            self.uploaded = uploaded(self.host_lengths, self.device)
        return self.uploaded

    @property
    def ids(self) -> torch.Tensor | None:
        """(B, L) tokens read, -1 where given as embeddings, meaningless beyond a row's own; None if none are known."""
        if self.tokens.buffers is None or self.width == 0:
            return None
        return rows_of(self.tokens.buffers, self.rows).key[:, 0, : self.width, 0] - 1

    def sign(self, tower: Any) -> None:
        """Remember which context tower has read, and some of its embeddings in case it is no more."""
        self.kernels = tower.kernels
        if self.computed_in is None:
            embeddings = tower.embeddings.weight
            facts = {
                "computed_in": _computed_in(embeddings),
                "embeddings": _sample(embeddings),
                "reader": ref(tower),
            }
            for cache in (self,) if self.whole is None else (self, self.whole):
                cache.__dict__.update(facts)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "reader": None, "undoing": None, "mirror": None}  # which are not what it is

    def __copy__(self) -> "TwoTowerCache":
        """Not a shallow one: two caches cannot go on with different texts in one place."""
        return copy.deepcopy(self)

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
        dtype = _computed_in(embeddings)
        if self.computed_in not in (None, dtype):
            raise ValueError(
                f"past_key_values was read in {self.computed_in}, this model computes in {dtype}; {remedy}"
            )
        reader = None if self.reader is None else self.reader()
        # Every pass asks, and comparing weights waits for the device.
        if reader is tower:
            return
        some = _sample(embeddings)
        for name, expected in TwoTowerCache(config).geometry.items():
            if (held := self.geometry.get(name)) != expected:
                raise ValueError(
                    f"past_key_values is of another model: its {name} is {held!r}, this model's {expected!r}; {remedy}"
                )
        if _differ(self.embeddings, some):
            raise ValueError(f"past_key_values is of a model with other embeddings than this model's; {remedy}")
        if reader is not None:
            own = dict(tower.named_parameters())
            for name, read in reader.named_parameters():
                if name in own and _differ(_sample(read), _sample(own[name])):
                    raise ValueError(f"past_key_values is of a model with another {name} than this model's; {remedy}")
        if self.embeddings is not None:
            self.reader = ref(tower)

    @contextmanager
    def undone_on_error(self, only_read: bool = False) -> Iterator[None]:
        """
        If what is done within fails, leave the cache as it was. With `only_read` no rows are added, dropped or moved
        within: buffers then need not be as small as they were, so that those that grow can be freed at once.

        Little is copied for that. Columns that count are never written over, but by rows that take others' places,
        which is noted; states, and buffers that grow or lose rows, are replaced by new ones. (So the old ones live on
        until this ends.)
        """
        whole = self if self.whole is None else self.whole
        holders = [self, whole, whole.tokens, *whole.layers]
        if only_read:
            holders = [holder for holder in holders if not isinstance(holder, KeyValueLayer)]
        before = [dict(vars(holder)) for holder in holders]
        outer = whole.undoing
        steps = whole.undoing = [] if outer is None else outer
        begun = len(steps)
        for layer in whole.layers:
            if isinstance(layer, MambaLayer):
                layer.shared = True
        try:
            yield
        except BaseException:
            while len(steps) > begun:
                steps.pop()()
            for holder, attributes in zip(holders, before, strict=True):
                holder.__dict__.clear()
                holder.__dict__.update(attributes)
            whole.mirror = None  # of which nothing was noted
            raise
        finally:
            whole.undoing = outer

    def expect(self, columns: int) -> None:
        """
        Let buffers have so many columns at once when they grow next: a long text is then read in chunks without ever
        holding two copies of what has been read of it.
        """
        for layer in (*self.layers, self.tokens):
            if isinstance(layer, KeyValueLayer):
                layer.expected = columns

    def views(self, layers: Sequence[Any] | None = None) -> list[KeyValues | MambaState | None]:
        """
        What each layer holds of the rows; of all or of the first rows views, no copies.

        With `layers`, what these hold, which are like the cache's.
        """
        self._check(settled=False)
        columns = self.columns or self.width
        rows = self.rows
        held: list[KeyValues | MambaState | None] = []
        for layer in self.layers if layers is None else layers:
            if isinstance(layer, KeyValueLayer) and layer.buffers is not None and columns > 0:
                rows = _rows_on(layer.buffers.key.device, rows)  # once for all layers there
                held.append(rows_of(KeyValues(*(buffer[:, :, :columns] for buffer in layer.buffers)), rows))
            elif isinstance(layer, MambaLayer) and layer.state is not None:
                rows = _rows_on(layer.state.ssm.device, rows)
                held.append(rows_of(layer.state, rows))
            else:
                held.append(None)
        return held

    def share(self) -> None:
        """A pass needs for its gradients what is held: let the next chunk be written to copies of it."""
        for layer in self.layers:
            if isinstance(layer, KeyValueLayer):
                layer.shared = True

    def view(self, layer_idx: int) -> KeyValues | MambaState | None:
        return self.views()[layer_idx]

    # A pass of the context tower asks for `slots`, writes keys and values to them, and ends with `append`.

    def slots(self, input_ids: torch.Tensor) -> list[KeyValueSlot | MambaState | None]:
        """
        What each layer reads a chunk with: its states, or where its keys and values go.

        The chunk's ids (B, T), -1 where a token is given as an embedding, are written at once.
        """
        self._check()
        batch, tokens = input_ids.shape
        self.go_to(input_ids.device)
        rows, of, width, starts = self.rows, batch, self.width, None
        if self.host_lengths is None:
            rows = slice(0, batch)
            # Nothing is held yet: buffers can only be those of a read that failed, maybe of other rows.
            for layer in (*self.layers, self.tokens):
                layer.__dict__.pop("buffers", None)
        else:
            of = len((self if self.whole is None else self.whole).host_lengths or ())
            starts = self.lengths if self.ragged or self.columns is not None else None
        if self.columns is not None:
            if width + tokens > self.columns:
                raise ValueError(
                    f"{tokens} tokens behind {width} do not fit in the {self.columns} columns of this part; take one "
                    "with more room"
                )
            width = self.columns - tokens
        KeyValueSlot(self.tokens, rows, of, width, starts).write_ids(input_ids.to(self.device))
        slots: list[KeyValueSlot | MambaState | None] = []
        for layer in self.layers:
            if isinstance(layer, KeyValueLayer):
                slots.append(KeyValueSlot(layer, rows, of, width, starts))
            elif isinstance(layer, MambaLayer) and layer.state is not None:
                slots.append(rows_of(layer.state, rows))
            else:
                slots.append(None)
        return slots

    def go_to(self, device: torch.device) -> None:
        """The first read says where the cache is: rows may have been added, or a part of them taken, before it."""
        if self.tokens.buffers is not None:
            return
        for cache in (self,) if self.whole is None else (self, self.whole):
            if cache.device != device:
                cache.device, cache.uploaded = device, None
        if isinstance(self.rows, torch.Tensor):
            self.rows = self.rows.to(device)

    def append(
        self,
        input_ids: torch.Tensor,
        presents: Sequence[Present],
        counts: Sequence[int] | None = None,
        tentative: bool = False,
    ) -> None:
        """
        Keep a chunk (B, T) that has been written to its slots: all of it, or each row's first `counts` tokens.

        `presents` are by layer its states after them, or if `tentative`, what takes its states through any number.
        """
        batch, tokens = input_ids.shape
        if tentative:
            self.updates = {idx: each for idx, each in enumerate(presents) if isinstance(each, MambaUpdate)}
            self.tentative, self.limits = tokens, None if counts is None else list(counts)
        else:
            states = {idx: each for idx, each in enumerate(presents) if isinstance(each, MambaState)}
            self._advance(states, [tokens] * batch if counts is None else counts)

    def _advance(self, states: dict[int, MambaState], counts: Sequence[int]) -> None:
        """Replace layers' states of the rows, and let so many tokens more of each row count."""
        whole = self if self.whole is None else self.whole
        places = []
        for idx, state in states.items():
            layer, batch = self.layers[idx], len(state.ssm)
            if self is whole and (layer.state is None or len(layer.state.ssm) <= batch):
                layer.state, layer.shared = state, False
            else:
                places.append((layer.reserve(state, len(whole.host_lengths or ())), state))
        # Only now, after all that may lack memory.
        for place, state in places:
            for old, new in zip(place, state, strict=True):
                old[self.rows if isinstance(self.rows, slice) else self.rows.to(old.device)] = new
        before = [0] * len(counts) if self.host_lengths is None else self.host_lengths
        self._set_lengths([length + count for length, count in zip(before, counts, strict=True)])

    def accept(self, counts: Counts) -> None:
        """
        Let each row's first tokens of the chunk read tentatively count, and forget the rest of it.

        Args:
            counts: (B,) tokens per row, 0 to as many as it has of the chunk's.

        Raises:
            ValueError: when no chunk was read tentatively, or for counts outside its size or of other rows.
        """
        if self.tentative == 0:
            raise ValueError("accept was called, but no chunk has been read with tentative=True since the last call")
        self._check(settled=False)
        accepted = [index(count) for count in listed(counts)]
        rows = len(accepted) if self.host_lengths is None else len(self.host_lengths)
        limits = [self.tentative] * rows if self.limits is None else self.limits
        if len(accepted) != rows or not all(
            0 <= count <= limit for count, limit in zip(accepted, limits, strict=True)
        ):
            raise ValueError(
                f"counts are {accepted}; the chunk read tentatively has {self.tentative} tokens of each of {rows} rows"
                if self.limits is None or len(accepted) != rows
                else f"counts are {accepted}; of the chunk read tentatively, the rows have {limits} tokens"
            )
        states = {}
        for idx, update in self.updates.items():
            ends = counts if isinstance(counts, torch.Tensor) else uploaded(accepted, update.dt.device)
            state = self.layers[idx].state
            before = None if state is None else rows_of(state, self.rows)
            states[idx] = update.apply(before, ends.to(update.dt.device), self.kernels["ssd_state"])
        self._advance(states, accepted)
        self.tentative, self.limits, self.updates = 0, None, {}

    def _check(self, settled: bool = True) -> None:
        """Raise a ValueError where nothing may be done to the rows, or not unless what was read tentatively counts."""
        if settled and self.tentative:
            raise ValueError(f"the cache holds {self.tentative} tokens read tentatively; call accept(counts) first")
        if self.whole is not None and self.version is not self.whole.version:
            raise ValueError("the rows of this part's cache have changed since it was taken; take a new part")

    def context_lengths(self) -> torch.Tensor | None:
        """(B,) how many columns of its context a row may see; None for all of its `width`."""
        return None if self.columns is None and not self.ragged else self.lengths

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.width

    @property
    def batch_size(self) -> int:
        return -1 if self.host_lengths is None else len(self.host_lengths)

    # Rows.

    def part(self, rows: slice | Sequence[int], room: int | None = None) -> "TwoTowerCache":
        """
        The rows of index `rows`, distinct, as a cache of their own that shares what this one holds.

        The model reads and denoises with it, and so does `accept`: what is read is written to this cache at once, so
        there is nothing to join. Of a `slice(0, n)` it looks at views, of a list at copies (`index_select`). Its
        `width` is that of its own longest row. It is good for as long as nothing but itself changes this cache's rows.

        With `room`, for so many tokens more, all columns of the buffers are looked at behind a mask by length, and
        states are written in place: then tensors have the same shapes at all widths of a bucket, ragged or not, so
        that a compiled pass serves them all. Something must have been read before.
        """
        self._check()
        if self.host_lengths is None or self.whole is not None:
            raise ValueError("only a cache with rows that is no part itself has parts; add_rows gives it some")
        batch = len(self.host_lengths)
        indices = list(range(batch)[rows] if isinstance(rows, slice) else rows)
        if len(set(indices)) < len(indices) or not all(0 <= row < batch for row in indices) or not indices:
            raise ValueError(f"a part of rows {indices} was asked for; give distinct rows of the {batch} there are")
        part: TwoTowerCache = object.__new__(TwoTowerCache)
        first = indices == list(range(len(indices)))
        place = slice(0, len(indices)) if first else uploaded(indices, self.device)
        part.__dict__ = {**vars(self), "whole": self, "rows": place, "indices": indices, "updates": {}}
        part._set_lengths([self.host_lengths[row] for row in indices], write=False)
        if room is not None:
            if self.tokens.buffers is None:
                raise ValueError("a part with room was asked for of a cache that has read nothing yet; read first")
            part.columns = max(part.width + room, self.tokens.buffers.key.shape[2])
            part.columns += -part.columns % COLUMNS
            for layer in (*self.layers, self.tokens):
                if isinstance(layer, KeyValueLayer) and layer.buffers is not None:
                    layer.reserve(layer.buffers, batch, part.columns)
                elif isinstance(layer, MambaLayer) and layer.state is not None:
                    layer.reserve(layer.state, batch)
        return part

    def add_rows(self, count: int) -> None:
        """Add so many rows without tokens behind the others."""
        self._check_whole()
        lengths = self.host_lengths or []
        before, batch = len(lengths), len(lengths) + count
        for layer in (*self.layers, self.tokens):
            if isinstance(layer, KeyValueLayer) and layer.buffers is not None:
                # What a masked column holds has no weight, but NaN times nothing is NaN.
                for buffer in layer.reserve(layer.buffers, batch, layer.buffers.key.shape[2]):
                    buffer[before:batch].zero_()
            elif isinstance(layer, MambaLayer) and layer.state is not None:
                for part in layer.reserve(layer.state, batch):
                    part[before:batch].zero_()
        self._set_lengths(lengths + [0] * count)

    def drop_rows(self, count: int) -> None:
        """Forget the last `count` rows; their room stays."""
        self._check_whole()
        lengths = self.host_lengths or []
        if not 0 <= count <= len(lengths):
            raise ValueError(f"{count} rows are to be dropped of the {len(lengths)} there are")
        kept = len(lengths) - count
        if self.mirror is not None:
            self.mirror.forget(kept)
        if self.undoing is not None:
            for layer in (*self.layers, self.tokens):
                for buffer in (isinstance(layer, KeyValueLayer) and layer.buffers) or ():
                    rows = buffer[kept : len(lengths)]
                    self.undoing.append(partial(_copy, rows.clone(), rows))
        self._set_lengths(lengths[:kept])

    def swap_rows(self, first: int, second: int) -> None:
        """Exchange two rows."""
        self._check_whole()
        lengths = list(self.host_lengths or ())
        if not 0 <= min(first, second) <= max(first, second) < len(lengths):
            raise ValueError(f"rows {first} and {second} are to be exchanged, of the {len(lengths)} there are")
        for layer in (*self.layers, self.tokens):
            if isinstance(layer, KeyValueLayer):
                for buffer in layer.buffers or ():
                    exchange_rows(buffer, first, second)
                    if self.undoing is not None:
                        self.undoing.append(partial(_exchange_back, ref(buffer), first, second))
            elif isinstance(layer, MambaLayer) and layer.state is not None:
                for part in layer.reserve(layer.state, len(lengths)):
                    exchange_rows(part, first, second)
        if self.mirror is not None:
            self.mirror.swap_rows(first, second)
        lengths[first], lengths[second] = lengths[second], lengths[first]
        self._set_lengths(lengths)

    def select_rows(self, rows: Counts) -> None:
        """Keep the rows of index `rows` (R,), in that order, and no more columns than they use."""
        self._check_whole()
        chosen = listed(rows)
        # Of a cache that has read nothing, any rows.
        if self.host_lengths is not None and not all(0 <= row < len(self.host_lengths) for row in chosen):
            raise ValueError(f"rows {chosen} are to be selected, of the {len(self.host_lengths)} there are")
        lengths = [0 if self.host_lengths is None else self.host_lengths[row] for row in chosen]
        if self.host_lengths is None and isinstance(rows, torch.Tensor):
            self.device = rows.device
        place, width = uploaded(chosen, self.device), max(lengths, default=0)
        with ordinary_tensors():
            for layer in (*self.layers, self.tokens):
                if isinstance(layer, KeyValueLayer):
                    held = layer.buffers if width else None
                    layer.buffers = held and rows_of(KeyValues(*(part[:, :, :width] for part in held)), place)
        for layer in self.layers:
            if isinstance(layer, MambaLayer):
                layer.state, layer.shared = layer.state and rows_of(layer.state, place), False
        if self.mirror is not None:
            self.mirror.select_rows(chosen)
        self._set_lengths(lengths)

    # transformers' names.

    def reorder_cache(self, beam_idx: Counts) -> None:
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: Counts) -> None:
        self.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select_rows([row for row in range(self.batch_size) for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise ValueError(
                f"crop({tokens_to_remove}) is not supported by a TwoTower's cache, as Mamba states cannot go back; "
                "keep a copy (copy_rows) of what is to be gone back to, or read with tentative=True and accept(counts)"
            )

    def copy_rows(self, rows: Counts) -> "TwoTowerCache":
        """A cache of its own for copies of the rows of index `rows` (R,), which may repeat."""
        if self.whole is not None:
            self._check()
            return self.whole.copy_rows([self.indices[row] for row in listed(rows)])
        copied: TwoTowerCache = object.__new__(TwoTowerCache)
        copied.__dict__ = self.__getstate__()
        copied.layers, copied.tokens = [copy.copy(layer) for layer in self.layers], copy.copy(self.tokens)
        copied.select_rows(rows)
        return copied

    def replace_rows(self, caches: Sequence["TwoTowerCache"]) -> None:
        """Hold the rows of `caches`, one cache after the other, instead of what was held."""
        self._check_whole()
        for cache in caches:
            cache._check()
        lengths = [cache.host_lengths for cache in caches if cache.host_lengths is not None]
        assert len(lengths) == len(caches) > 0, "a cache that has read nothing has rows once some were selected"
        counts, width = [len(each) for each in lengths], max(cache.width for cache in caches)
        held = [list(parts) for parts in zip(*(cache.views() for cache in caches), strict=True)]
        tokens = [
            rows_of(KeyValues(*(part[:, :, : cache.width] for part in cache.tokens.buffers)), cache.rows)
            if cache.tokens.buffers is not None and cache.width
            else None
            for cache in caches
        ]
        signed = next((cache for cache in caches if cache.computed_in is not None), caches[0])
        with ordinary_tensors():
            everything: list[Sequence[KeyValues | MambaState | None]] = [*held, tokens]
            for layer, parts in zip((*self.layers, self.tokens), everything, strict=True):
                if isinstance(layer, KeyValueLayer):
                    wide = [[_widened(part, width) for part in each] for each in _with_zeros(parts, counts)]
                    layer.buffers = KeyValues(*map(torch.cat, zip(*wide, strict=True))) if wide else None
        for layer, parts in zip(self.layers, held, strict=True):
            if isinstance(layer, MambaLayer):
                each = _with_zeros(parts, counts)
                layer.state = MambaState(*map(torch.cat, zip(*each, strict=True))) if each else None
                layer.shared = False
        self.geometry, self.computed_in, self.embeddings = signed.geometry, signed.computed_in, signed.embeddings
        self.device, self.mirror = signed.device, None
        self._set_lengths([length for each in lengths for length in each])

    def _check_whole(self) -> None:
        if self.whole is not None:
            raise ValueError("a part's rows are those of another cache; change that one's")
        self._check()

    def _set_lengths(self, lengths: list[int], write: bool = True) -> None:
        self.host_lengths, self.uploaded = lengths, None
        self.width = max(lengths, default=0)
        self.ragged = min(lengths, default=0) != self.width
        if self.whole is None:
            self.rows, self.version = slice(0, len(lengths)), object()
        elif write:
            assert self.whole.host_lengths is not None
            everyone = list(self.whole.host_lengths)
            for row, length in zip(self.indices, lengths, strict=True):
                everyone[row] = length
            self.whole._set_lengths(everyone)
            self.version = self.whole.version


def check_cache(cache: Any, model: Any) -> None:
    """Refuse what a model cannot go on from."""
    if not isinstance(cache, TwoTowerCache):
        raise ValueError(f"past_key_values is a {type(cache).__name__}; give the TwoTowerCache of an earlier call")
    cache.check_model(model.config, model.context_tower)


def listed(counts: Counts) -> list[int]:
    """Counts as the host knows them; a tensor (B,) is read from its device."""
    return counts.tolist() if isinstance(counts, torch.Tensor) else list(counts)


def uploaded(values: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.long) -> torch.Tensor:
    """Numbers in lists as a tensor on the device, without waiting for it (as `torch.tensor(..., device=)` does)."""
    return torch.tensor(values, dtype=dtype, device="cpu").to(device, non_blocking=True)


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    target.copy_(source)


def exchange_rows(tensor: torch.Tensor, first: int, second: int) -> None:
    """Exchange two rows in place."""
    kept = tensor[first].clone()
    tensor[first] = tensor[second]
    tensor[second] = kept


def _exchange_back(tensor: "ref[torch.Tensor]", first: int, second: int) -> None:
    """The same of a tensor that may be no more."""
    if (rows := tensor()) is not None:
        exchange_rows(rows, first, second)


def _widened(part: torch.Tensor, width: int) -> torch.Tensor:
    """(R, heads, T, d) with as many columns as `width`; d may be 0, which torch 2.9's `pad` refuses."""
    return torch.cat([part, part.new_zeros(*part.shape[:2], width - part.shape[2], part.shape[3])], dim=2)


def _with_zeros(held: Sequence[KeyValues | MambaState | None], rows: Sequence[int]) -> list[tuple[torch.Tensor, ...]]:
    """What is held, with zeros for so many rows where nothing has been read; empty if nothing has been anywhere."""
    like = next((parts for parts in held if parts is not None), None)
    if like is None:
        return []
    nothing = [tuple(part.new_zeros(count, *part.shape[1:]) for part in like) for count in rows]
    return [zeros if parts is None else tuple(parts) for parts, zeros in zip(held, nothing, strict=True)]


def _differ(some: torch.Tensor | None, others: torch.Tensor | None) -> bool:
    """Whether two samples of weights are known and not the same."""
    return some is not None and others is not None and not some.to(others.device).equal(others)


def _computed_in(weights: torch.Tensor) -> torch.dtype:
    """The dtype of the keys that a model with such embeddings computes."""
    device = weights.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weights.dtype


def _sample(weights: torch.Tensor) -> torch.Tensor | None:
    """A few numbers that models are told apart by; None where they are offloaded, sharded or quantised."""
    if weights.device.type == "meta" or type(weights) not in (torch.Tensor, torch.nn.Parameter):
        return None
    rows = weights.detach()[:: max(1, len(weights) // 16)]
    return rows.flatten(1)[:, :8].clone() if rows.ndim > 1 else rows.clone()


__all__ = [
    "Counts",
    "KeyValueSlot",
    "KeyValues",
    "MambaState",
    "MambaUpdate",
    "Past",
    "Present",
    "TwoTowerCache",
    "check_cache",
    "exchange_rows",
    "listed",
    "uploaded",
]
