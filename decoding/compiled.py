"""
Passes as compiled programs, for `generate(..., compile=True)`.

A program serves passes of one kind over so many tokens, rows and columns of the cache. These are powers of two, to
which a pass is padded, so that a few programs serve all texts, and what of it counts is told by tensors of one shape.
Heads, what is chosen from logits, and code of the user's run between passes. On a GPU passes are recorded rather than
compiled ([`Recording`]), unless a config asks for a compiler; then the towers may be on two cards, too.

Shapes: R rows and T tokens of a pass, B and S of its program, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FunctionType
from typing import Any

import torch
from transformers import CompileConfig

from ..cache_twotower import TwoTowerCache, uploaded
from ..checkpoints.placement import CONTEXT_PARTS, stays_in_place
from ..compat_twotower import tqdm
from .buffers import ProgramBuffers, padded_size
from .programs import TOWER_OF, Programs, accepting, denoising, programs_of, reading, verifying
from .recorded import Recording, with_own_memory

# Longer chunks are read in pieces of so many tokens: the program of a scan grows with its length.
MOST_TOKENS = 512


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
        self.compiled_by, self.programs, self.buffers = "", Programs(), ProgramBuffers(model, self.devices)
        self.updates: tuple[int, list[Any]] = (0, [])  # of the chunk read tentatively: S, and by layer
        self.records = False
        self.bar: Any = None

    def begin(self, config: CompileConfig | None = None) -> None:
        """Rows begin that ask for programs: from now on these are compiled as `config` says, of the model as it is."""
        self.config, self.records = config, records_passes(config, self.device)
        self.compiled_by = "recorded" if self.records else repr(sorted(compile_arguments(config).items()))
        programs = programs_of(self.model)
        self.programs = programs.taken(self) if self.records else programs
        self.buffers.begin(self.programs, self.records)
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
        columns = self.buffers.columns(cache, tokens)
        masked = None if mask is None else self._padded(mask.bool(), rows, fill=True)
        times = None if timestep is None else self._padded(timestep, rows)
        held = self.buffers.denoised(cache, rows, columns)
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
        self.buffers.reuse(cache, ids.shape[1])
        pieces, starts = [], range(0, ids.shape[1], MOST_TOKENS)
        # Of several pieces for all at once, so that one program reads them.
        columns = self.buffers.columns(cache, starts[-1] + padded_size(ids.shape[1] - starts[-1])) if starts[1:] else 0
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
        columns = max(least_columns, self.buffers.columns(cache, tokens))
        held, copied = self.buffers.held(cache, rows, columns, writes=True)
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
            self.buffers.write_back(cache, held, width, states=not tentative)
        self.buffers.write_ids(ids, cache)
        cache.sign(self.model.context_tower)
        cache.append(ids, [], counts, tentative)
        return hidden_states[:batch, :width]

    def accept(self, cache: TwoTowerCache, counts: list[int]) -> None:
        tokens, updates = self.updates
        rows = padded_size(len(counts))
        held, copied = self.buffers.held(cache, rows, None, writes=True)
        self._run(accepting, (rows, tokens), (held, updates), self._numbers(counts, rows))
        if copied:
            self.buffers.write_back(cache, held, 0)
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
        return torch.tensor(padded, device="cpu") if self.records else uploaded(padded, self.device)

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

    def close(self, cache: TwoTowerCache) -> None:
        """Nothing is to be compiled, nor rows copied, soon; what recordings look at is left to the next cache."""
        if not self.records:
            self.buffers.scratch = {}
        elif self.programs.has_user(self):  # else rows have come and gone since that asked for no programs
            self.programs.user = None
            self.buffers.leave(cache)
        self._close_bar()

    def _close_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _own_code(function: Any, name: str) -> Callable[..., Any]:
    """A copy of a function: torch keeps what it compiled by the function's code, and but a few for each."""
    code = function.__code__.replace(co_name=name.replace(" ", "_"))
    return FunctionType(code, function.__globals__, code.co_name, function.__defaults__)


__all__ = ["CompiledPasses", "NotCompiled", "check_can_compile", "compile_arguments"]
