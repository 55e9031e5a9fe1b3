"""
Passes as compiled programs, for `generate(..., compile=True)`.

A program serves passes of one kind over so many tokens, rows and columns of the cache. These are powers of two, to
which a pass is padded, so that a few programs serve all texts, and what of it counts is told by tensors of one shape.
Programs belong to the model and are compiled when a pass first needs them. Weights are among their inputs, so that
they see every change of them. Heads, what is chosen from logits, and code of the user's run between passes. On a GPU
they are recorded rather than compiled ([`Recording`]), unless a config asks for a compiler; then the towers may be on
two cards, too, and the denoiser looks at what a [`Mirror`] holds on its own.

Shapes: R rows and T tokens of a pass, B and S of its program, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from operator import is_not
from threading import Lock
from types import FunctionType
from typing import Any, cast
from weakref import ref

import torch
from transformers import CompileConfig

from ..cache_twotower import KeyValueLayer, KeyValues, KeyValueSlot, MambaLayer, MambaState, TwoTowerCache, uploaded
from ..checkpoints.placement import CONTEXT_PARTS, stays_in_place
from ..compat_twotower import tqdm
from ..mirror_twotower import Mirror
from .kept import Kept
from .recorded import Recording, Weights, with_own_memory

# Longer chunks are read in pieces of so many tokens: the program of a scan grows with its length.
MOST_TOKENS = 512
# Over fewer columns attention would cost no less that could be felt.
LEAST_COLUMNS = 256

# Packages whose modules change in no way that a pass could see, but by weights, mode and hooks.
PLAIN = {"torch", "transformers", "transformers_modules", __name__.partition(".")[0]}
# Of a module: weights and modules, which are looked at by themselves.
HOLDERS = {"_parameters", "_buffers", "_modules", "_kept_programs", "_prepared"}

LayerContent = KeyValues | MambaState | None


def padded_size(count: int, least: int = 1) -> int:
    """The power of two to which a size is padded."""
    return max(least, 1 << (count - 1).bit_length())


# The programs: the model, and else tensors whose shapes never change.


def denoising(
    model: Any,
    held: Sequence[LayerContent],
    ids: torch.Tensor,
    lengths: torch.Tensor,
    timestep: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """A denoiser pass: (B, S) -> (B, S, V)."""
    return model.denoiser_pass(ids, held, lengths, timestep, mask)


def reading(
    model: Any, held: Sequence[LayerContent], ids: torch.Tensor, lengths: torch.Tensor, counts: torch.Tensor | None
) -> torch.Tensor:
    """The context tower reads (B, S) and writes what it holds then, of each row's first `counts` (B,): (B, S, H)."""
    tower = model.context_tower
    return tower.reading_pass(tower.embeddings(ids), _slots(held, ids, lengths), lengths, counts, in_place=True)[0]


def verifying(
    model: Any, held: Sequence[LayerContent], ids: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, list[Any]]:
    """The same tentatively: (B, S, H), and by layer what takes its state through any number of the tokens."""
    tower = model.context_tower
    slots = _slots(held, ids, lengths)
    return tower.reading_pass(tower.embeddings(ids), slots, lengths, tentative=True)


def accepting(model: Any, tentative: tuple[Sequence[LayerContent], Sequence[Any]], counts: torch.Tensor) -> None:
    """Take states through each row's first `counts` (B,) tokens of those read tentatively, see `verifying`."""
    backend = model.context_tower.kernels["ssd_state"]
    for each, update in zip(*tentative, strict=True):
        if isinstance(each, MambaState):
            update.apply(each, counts, backend, in_place=True)


# By name, the part of the model whose weights a program reads.
TOWER_OF = {denoising.__name__: "denoiser"} | {each.__name__: "context" for each in (reading, verifying, accepting)}


def _slots(held: Sequence[LayerContent], ids: torch.Tensor, lengths: torch.Tensor) -> list[Any]:
    """Where keys and values go: behind what each row has, in all the columns there are."""
    slots: list[Any] = []
    for each in held:
        if isinstance(each, KeyValues):
            layer = KeyValueLayer()
            layer.buffers = each
            rows, tokens = ids.shape
            slots.append(KeyValueSlot(layer, slice(0, rows), rows, each.key.shape[2] - tokens, lengths))
        else:
            slots.append(each)
    return slots


# What a model keeps.

taking = Lock()


class Programs(Kept):
    """A model's programs, by what they were compiled for; and what recordings of passes need beside them."""

    def __init__(self) -> None:
        self.model_state: Any = None  # of the model they were compiled for, see [`programs_of`]
        self.scratch: dict[Any, list[LayerContent]] = {}  # where recordings find copies of rows, see `CompiledPasses`
        self.weights: dict[str, Weights] = {}  # by part of the model those that were recorded, and their state then
        self.weights_states: dict[str, Any] = {}
        self.seen: dict[str, Any] = {}  # the state that the next pass would find, see `look_ahead`
        self.prepared: dict[Any, Any] = {}  # by module what recordings find prepared of its weights
        self.pools: dict[torch.device, Any] = {}  # of memory
        self.mirrors: dict[int, Mirror] = {}  # by columns, of whichever cache they were last
        # By layer what a cache has left that nobody has any more: states, and by their columns keys and values.
        self.spare: Sequence[LayerContent] = ()
        self.rooms: dict[int, list[LayerContent]] = {}
        self.user: ref[CompiledPasses] | None = None  # whose passes these are now: they share memory

    def taken(self, user: "CompiledPasses") -> "Programs":
        """These for a user, or others while another one is at them."""
        with taking:  # engines may run in threads
            taken = self
            if self.has_user() and not self.has_user(user):
                taken = user.programs
                if not taken.has_user(user) or taken.model_state != self.model_state:
                    taken = Programs()
                    taken.model_state = self.model_state
            taken.user = ref(user)
        return taken

    def find_weights(self, model: Any) -> None:
        """Know the weights of a model by the part of it that a program runs."""
        # A module may be in both.
        modules: dict[str, list[Any]] = {"context": [model], "denoiser": [model]}
        for name, child in model._modules.items():
            modules["context" if name in CONTEXT_PARTS else "denoiser"] += child.modules()
        self.weights = {part: Weights(own) for part, own in modules.items()}
        self.seen = {}

    def forget_changed(self, model: Any, part: str) -> None:
        """Keep no recordings of a part of the model whose weights have changed, or lie elsewhere."""
        state = self.seen.pop(part, None) or self.weights[part].state()
        if state != self.weights_states.get(part):
            for key in [key for key in self if key[-1] == "recorded" and TOWER_OF[key[0]] == part]:
                del self[key]
            self.weights_states[part] = state
            self.prepare(model)

    def look_ahead(self, part: str) -> None:
        """Look at the weights for the next pass already, while the device computes this one and nobody waits."""
        self.seen[part] = self.weights[part].state()

    @torch.inference_mode(False)
    @torch.no_grad()
    def prepare(self, model: Any) -> None:
        """Bring what recordings find prepared of weights up to date, in its place: they may have changed traceless."""
        modules = list(model.modules())
        for gone in self.prepared.keys() - set(modules):
            del self.prepared[gone]
        for module in modules:
            now = vars(module).get("_prepared")
            kept = self.prepared.get(module)
            if kept is None and now is None:
                continue
            weights, found = now or (module.weights(), module.of_weights())
            # Other weights may lie where those before did, so that recordings go on.
            if kept is not None and [each.shape for each in kept[1]] == [each.shape for each in found]:
                for old, new in zip(kept[1], found, strict=True):
                    old.copy_(new)
                self.prepared[module] = weights, kept[1]
            else:
                # Some are weights themselves, which are not to be written to.
                self.prepared[module] = weights, tuple(each.clone() for each in found)

    def has_user(self, user: "CompiledPasses | None" = None) -> bool:
        """Whether anybody, or this one, uses them now."""
        now = None if self.user is None else self.user()
        return now is not None if user is None else now is user


def programs_of(model: Any) -> Programs:
    """
    The programs kept with a model, unless it has become another: by device, dtype, modules, hooks, kernels, ...

    torch compiles again by itself where most of that has changed, but keeps what is of no use any more, gives up after
    a few times, and does not look for new hooks. New values of weights, or new tensors, change nothing.
    """
    modules = [
        (type(each), each.training, *each._forward_pre_hooks, *each._forward_hooks, *_settings(each))
        for each in model.modules()
    ]
    weights = [(type(each), each.device, each.dtype, each.shape, each.requires_grad) for each in model.parameters()]
    config, device = model.config, model.context_tower.embeddings.weight.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    precision = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    implementations = config._attn_implementation, config._experts_implementation
    ways = (*implementations, autocast, *precision, *model.kernels.items())
    kept: Programs | None = vars(model).get("_kept_programs")
    if kept is None or kept.model_state != (modules, weights, ways):
        kept = vars(model)["_kept_programs"] = Programs()
        kept.model_state = (modules, weights, ways)
    return kept


def _settings(module: torch.nn.Module) -> list[tuple[str, str]]:
    """What an adapter goes by, such as whether it is switched off, as text; of modules that have no such, nothing."""
    if type(module).__module__.partition(".")[0] in PLAIN:
        return []
    plain = (bool, int, float, str, list, tuple, dict, set, type(None))
    own = vars(module).items()
    return [(name, repr(value)) for name, value in own if isinstance(value, plain) and name not in HOLDERS]


def check_can_compile(model: Any, config: CompileConfig | None = None) -> None:
    """Raise a ValueError for a model whose passes cannot be compiled, or not so, before any of them is run."""
    if model._is_synced(False):
        raise ValueError("compile=True is not supported while parameters are spread over ranks; leave compile out")
    towers: dict[bool, set[torch.device]] = {True: set(), False: set()}
    for name, parameter in model.named_parameters():
        towers[name.startswith(CONTEXT_PARTS)].add(parameter.device)
    devices = set.union(*towers.values())
    hooks = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
    # Of a tower on one card, hooks that leave weights there have nothing to move.
    fixed = max(map(len, towers.values())) == 1 and all(map(stays_in_place, hooks))
    recorded = all(records_passes(config, device) for device in devices)
    if not (fixed and recorded) and (len(devices) > 1 or hooks or next(iter(devices)).type == "meta"):
        raise ValueError(
            "compile=True needs all weights to stay on one device (where passes are recorded, each tower's on one), "
            f"and accelerate moves these, or what they are given ({', '.join(sorted(map(str, devices)))}); load the "
            'model without device_map and move it whole, with device_map="towers" on two GPUs, or leave compile out'
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        raise ValueError(
            f"compile=True is not supported by transformers' {type(quantizer).__name__}; quantise otherwise, or leave "
            "compile out"
        )


def records_passes(config: CompileConfig | None, device: torch.device) -> bool:
    """Whether passes are recorded as CUDA graphs: on a GPU by default, or by the name torch has for this."""
    if config is not None and config.backend != "cudagraphs":
        return False
    if config is not None and device.type != "cuda":
        raise ValueError(f'compile_config asks for backend="cudagraphs", and the model is on {device}; leave it out')
    return device.type == "cuda"


def compile_arguments(config: CompileConfig | None) -> dict[str, Any]:
    """
    What `torch.compile` is given: of transformers' config all it says, by default inductor, each program as one graph.

    `mode="reduce-overhead"`, the default in both cases, is CUDA graphs; elsewhere, and to other backends, it is none.
    """
    if config is None:
        config = CompileConfig(fullgraph=True)
    names = ("fullgraph", "dynamic", "backend", "mode", "options")
    arguments = {name: getattr(config, name) for name in names}
    arguments["dynamic"] = bool(config.dynamic)  # None would look for it
    if config.backend != "inductor" and config.mode == CompileConfig().mode:
        arguments["mode"] = None
    if config.options is not None:
        arguments["options"] = dict(config.options)  # of which torch takes some out
    return arguments


class NotCompiled(ValueError):
    """A program that torch could not make; nothing was run."""


# Running them.


class CompiledPasses:
    """
    Runs passes for an engine by a model's programs; each method is that of the model of this name, and `accept` the
    cache's.

    Args:
        model: [`TwoTowerForBlockDiffusion`].
        alone: whether nobody else's code, which might change weights, runs between passes.
    """

    def __init__(self, model: Any, alone: bool = False):
        self.model, self.device, self.alone = model, model.context_tower.embeddings.weight.device, alone
        denoiser = model.denoiser_tower if model.has_denoiser else model.context_tower
        self.devices = {"context": self.device, "denoiser": denoiser.embeddings.weight.device}
        self.config: CompileConfig | None = None
        self.compiled_by, self.programs = "", Programs()
        self.templates: list[LayerContent] = []  # by layer what the cache will hold, of no rows
        self.scratch: dict[Any, list[LayerContent]] = {}  # by sizes, for copies of rows that do not lie together
        self.own: dict[int, KeyValues] = {}  # by layer's id, those made here, which nobody can want back
        # By sizes, see `_fitted` and `_first_rows`.
        self.fitted: dict[Any, tuple[list[LayerContent], list[LayerContent]]] = {}
        self.first: dict[Any, tuple[list[LayerContent], list[LayerContent]]] = {}
        self.updates: tuple[int, list[Any]] = (0, [])  # of the chunk read tentatively: S, and by layer
        self.records = False
        self.bar: Any = None

    def begin(self, config: CompileConfig | None = None) -> None:
        """Rows begin that ask for programs: from now on these are compiled as `config` says, of the model as it is."""
        self.config, self.records = config, records_passes(config, self.device)
        self.compiled_by = "recorded" if self.records else repr(sorted(compile_arguments(config).items()))
        programs = programs_of(self.model)
        if self.programs is not (programs := programs.taken(self) if self.records else programs):
            self.programs, self.templates, self.scratch = programs, [], {}
            self.fitted, self.first = {}, {}
        if self.records:
            self.programs.find_weights(self.model)
            self.programs.prepare(self.model)

    def __call__(self, part: str, *args: Any) -> torch.Tensor:
        # Caches and programs hold ordinary tensors: of the inference mode that engines are in, they would be others.
        card = torch.cuda.device(self.device) if self.records else nullcontext()
        with torch.inference_mode(False), torch.no_grad(), card:
            return getattr(self, part)(*args)

    def context_lm_head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.model.context_lm_head(hidden_states)

    def denoise(
        self,
        ids: torch.Tensor,
        cache: TwoTowerCache,
        timestep: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(R, S), (R,) and (R, S) 1 on tokens -> (R, S, V); blocks are few sizes, so that these are not padded."""
        rows, tokens = padded_size(len(ids)), ids.shape[1]
        columns = self._columns(cache, tokens)
        masked = None if mask is None else self._padded(mask.bool(), rows, fill=True)
        times = None if timestep is None else self._padded(timestep, rows)
        mirrored = self.devices["denoiser"] != self.device
        held = self._mirrored(cache, rows, columns) if mirrored else self._held(cache, rows, columns, False)[0]
        inputs = (self._padded(ids, rows), self._lengths(cache, rows), times, masked)
        kind = ("untimed",) * (timestep is None) + ("masked",) * (mask is not None)
        return self._run(denoising, (rows, tokens, columns, *kind), held, *inputs)[: len(ids)]

    def predict_next(self, ids: torch.Tensor, cache: TwoTowerCache) -> torch.Tensor:
        return self.denoise(ids, cache)[:, -1]

    def context_tower(
        self, ids: torch.Tensor, cache: TwoTowerCache, counts: Sequence[int] | None = None, tentative: bool = False
    ) -> torch.Tensor:
        counts = [ids.shape[1]] * len(ids) if counts is None else list(counts)
        if tentative:
            return self._read(ids, cache, counts, tentative=True)
        self._reuse_buffers(cache, ids.shape[1])
        pieces, starts = [], range(0, ids.shape[1], MOST_TOKENS)
        # Of several pieces for all at once, so that one program reads them.
        columns = self._columns(cache, starts[-1] + padded_size(ids.shape[1] - starts[-1])) if starts[1:] else 0
        for start in starts:
            piece = ids[:, start : start + MOST_TOKENS]
            own = [min(max(count - start, 0), piece.shape[1]) for count in counts]
            pieces.append(self._read(piece, cache, own, columns))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def _read(
        self,
        ids: torch.Tensor,
        cache: TwoTowerCache,
        counts: list[int],
        least_columns: int = 0,
        tentative: bool = False,
    ) -> Any:
        """A chunk of one program: (R, T) -> (R, T, H)."""
        cache._check()
        cache.go_to(ids.device)
        # 1. A lone token of each row needs no counts; else what is padded must not count.
        (batch, width), lone = ids.shape, not tentative and min(counts) == ids.shape[1] == 1
        rows, tokens = padded_size(batch), 1 if lone else padded_size(width, 2)
        columns = max(least_columns, self._columns(cache, tokens))
        held, copied = self._held(cache, rows, columns, writes=True)
        inputs = [self._padded(ids, rows, tokens), self._lengths(cache, rows)]
        # 2. Read.
        if tentative:
            hidden_states, updates = self._run(verifying, (rows, tokens, columns), held, *inputs)
            self.updates = tokens, updates
        else:
            counted = None if lone else self._numbers(counts, rows)
            hidden_states = self._run(reading, (rows, tokens, columns), held, *inputs, counted)
        # 3. Keep it.
        if copied:
            self._write_back(cache, held, width, states=not tentative)
        self._write_ids(ids, cache)
        cache.sign(self.model.context_tower)
        cache.append(ids, [], counts, tentative)
        return hidden_states[:batch, :width]

    def accept(self, cache: TwoTowerCache, counts: list[int]) -> None:
        tokens, updates = self.updates
        rows = padded_size(len(counts))
        held, copied = self._held(cache, rows, None, writes=True)
        self._run(accepting, (rows, tokens), (held, updates), self._numbers(counts, rows))
        if copied:
            self._write_back(cache, held, 0)
        cache.accept(counts)
        self.updates = (0, [])

    # What programs are given.

    def _padded(self, tensor: torch.Tensor, rows: int, tokens: int | None = None, fill: Any = 0) -> torch.Tensor:
        """(R,) or (R, T) -> (B,) or (B, S) on the device."""
        size = (rows, *tensor.shape[1:]) if tokens is None else (rows, tokens)
        if self.records and size == tensor.shape and tensor.device == self.device:
            return tensor  # which is copied to the recording's
        padded = torch.full(size, fill, dtype=tensor.dtype, device=self.device)
        padded[tuple(map(slice, tensor.shape))] = tensor
        return padded

    def _lengths(self, cache: TwoTowerCache, rows: int) -> torch.Tensor:
        return self._numbers(cache.host_lengths or [], rows)

    def _numbers(self, numbers: Sequence[int], rows: int) -> torch.Tensor:
        """One of each row -> (B,) on the device, without waiting for it; a recording's are copied there in one."""
        padded = [*numbers, *[0] * (rows - len(numbers))]
        return torch.tensor(padded) if self.records else uploaded(padded, self.device)

    def _columns(self, cache: TwoTowerCache, tokens: int) -> int:
        """As many as the cache has, or more if these are too few for `tokens` more, or no power of two."""
        buffers = [layer.buffers for layer in cache.layers if isinstance(layer, KeyValueLayer)]
        held = [each.key.shape[2] for each in buffers if each is not None]
        return padded_size(max(cache.width + tokens, *held, 1), LEAST_COLUMNS) if buffers else 0

    def _held(
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
        """The cache's, padded to B, of what layers hold of all rows; see `_held`."""
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
            places = [device if isinstance(layer, KeyValueLayer | MambaLayer) else None for layer in whole.layers]
            mirror = self.programs.mirrors[columns] = Mirror(places)
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

    def _write_back(self, cache: TwoTowerCache, held: list[LayerContent], tokens: int, states: bool = True) -> None:
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

    def _write_ids(self, ids: torch.Tensor, cache: TwoTowerCache) -> None:
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

    def _run(self, program: Callable[..., Any], sizes: tuple[Any, ...], static: Any, *inputs: Any) -> Any:
        """`static` are caches and what lies beside them, which keep their places; `inputs` are every pass's own."""
        key = (program.__name__, *sizes, self.compiled_by)
        numbers = "x".join(str(size) for size in sizes if isinstance(size, int))
        name = " ".join([program.__name__, numbers, *(size for size in sizes if isinstance(size, str))])
        if self.records:
            # What is recorded, and where it runs, is the current card's, which may be the denoiser's.
            with torch.cuda.device(self.devices[TOWER_OF[program.__name__]]):
                return self._run_recorded(program, name, key, static, inputs)
        compiled = self.programs.get(key)
        if compiled is None:
            with self._shown(name):
                compiled = torch.compile(_own_code(program, name), **compile_arguments(self.config))
                outputs = compiled(self.model, static, *inputs)
            self.programs[key] = compiled
        else:
            outputs = compiled(self.model, static, *inputs)
        # What a CUDA graph returns, the next one overwrites.
        return with_own_memory(outputs) if self.device.type == "cuda" else outputs

    def _run_recorded(self, program: Callable[..., Any], name: str, key: Any, static: Any, inputs: Any) -> Any:
        programs, part = self.programs, TOWER_OF[program.__name__]
        device = self.devices[part]
        if program is not accepting:  # which reads none
            programs.forget_changed(self.model, part)
        # Of one key there may be two: of a cache's first rows, and of copies of others; first the one that ran last.
        recordings = programs.setdefault(key, [])
        recording = next((each for each in recordings if each.fits(static)), None)
        if recording is None:
            del recordings[1:]
            there = [held for each, held in programs.items() if each[-1] == "recorded" and self._runs_on(device, each)]
            if not any(there):
                programs.pools[device] = torch.cuda.graph_pool_handle()  # torch takes none whose graphs have all gone
            place = (device, programs.pools[device])
            with self._shown(name):
                recording = Recording(program, self.model, place, static, inputs, programs.prepared)
            recordings.insert(0, recording)
        elif recording is not recordings[0]:
            recordings.reverse()
        outputs = recording(inputs)
        if self.alone and program is not accepting:
            programs.look_ahead(part)
        # The next pass of the kind overwrites them; the states' updates are used up before.
        return (outputs[0].clone(), outputs[1]) if isinstance(outputs, tuple) else with_own_memory(outputs)

    def _runs_on(self, device: torch.device, key: Any) -> bool:
        return self.devices[TOWER_OF[key[0]]] == device

    @contextmanager
    def _shown(self, name: str) -> Iterator[None]:
        """A progress bar of what is compiled; what torch cannot compile is an error that says what can be done."""
        if self.bar is None:
            self.bar = tqdm(desc="Recording passes" if self.records else "Compiling passes", unit="pass")
        self.bar.set_postfix_str(name)
        try:
            yield
        except RuntimeError as error:
            from torch._dynamo.exc import TorchDynamoException  # not at import, as it takes a second

            if isinstance(error, torch.OutOfMemoryError) or not (
                self.records or isinstance(error, TorchDynamoException)
            ):
                raise
            reason = " ".join([line for line in str(error).splitlines() if line.strip()][:2])
            if self.records:
                raise NotCompiled(
                    f"the pass {name} could not be recorded as a CUDA graph: {reason}. Leave compile out, load the "
                    "model in bfloat16 (of other dtypes the host may wait for the experts' choice), or have the pass "
                    "compiled by compile_config=CompileConfig()"
                ) from error
            raise NotCompiled(
                f"the pass {name} could not be compiled: {reason}. Leave compile out, or choose how to compile by "
                "compile_config=CompileConfig(...), fullgraph=False where it cannot be one graph; on a CPU, inductor "
                "needs a C++ compiler (g++, or the one that the environment variable CXX names), which "
                'backend="aot_eager" does not'
            ) from error
        self.bar.update()

    def _reuse_buffers(self, cache: TwoTowerCache, tokens: int) -> None:
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

    def close(self, cache: TwoTowerCache) -> None:
        """
        Nothing is to be compiled, nor rows to be copied, soon. The cache leaves its buffers to the next one. If it is
        kept, it leaves those that were made here, which an error would not bring back, and has copies instead.
        """
        if not self.records:
            self.scratch = {}
            return self._close_bar()
        if not self.programs.has_user(self):
            return self._close_bar()  # rows have come and gone since that asked for no programs
        self.programs.user = None
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
        self._close_bar()

    def _leave(self, layer_idx: int, held: KeyValues, layers: int) -> None:
        """Nobody has these keys and values any more."""
        self.programs.rooms.setdefault(held.key.shape[2], [None] * layers)[layer_idx] = held

    def _close_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _own_code(function: Any, name: str) -> Callable[..., Any]:
    """A copy of a function: torch keeps what it compiled by the function's code, and but a few for each."""
    code = function.__code__.replace(co_name=name.replace(" ", "_"))
    return FunctionType(code, function.__globals__, code.co_name, function.__defaults__)


def _content(layer: Any) -> Any:
    return layer.buffers if isinstance(layer, KeyValueLayer) else getattr(layer, "state", None)


def _device(held: Sequence[LayerContent]) -> torch.device | None:
    return next((each[0].device for each in held if each is not None), None)


def _content_to_write(layer: Any) -> Any:
    """The same, but no states that are not to be written in place."""
    return None if isinstance(layer, MambaLayer) and layer.shared else _content(layer)


def _is_inference(held: LayerContent) -> bool:
    return held is not None and any(part.is_inference() for part in held)


__all__ = ["CompiledPasses", "NotCompiled", "check_can_compile", "compile_arguments", "padded_size", "programs_of"]
