"""What decoding holds on the host: requests, their rows, and the canvas of tokens to come of each row.

A row is one text. Lengths, stops and phases are decided here, from what one read per pass brings back from the device;
the device holds the cache and, where something reads it, the text.

Shapes: B rows of a request, R rows of a pass, P prompt columns, S block, N new tokens of the longest row,
V vocabulary.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig

from ..cache_twotower import TwoTowerCache
from ..compat_twotower import BaseStreamer, CacheOutput

# What can be recorded of each token, and how its padding is filled; the last two are (B, N, V).
RECORDS = {"commit_steps": -1, "confidences": torch.nan, "log_probs": torch.nan, "scores": 0.0, "logits": 0.0}
WIDE_RECORDS = ("scores", "logits")

# What a row waits for: a context pass over `unread`, a new canvas, a denoiser pass, a context pass over its draft.
READ, OPEN, DENOISE, VERIFY, ENDED = "read", "open", "denoise", "verify", "ended"


@dataclass
class TwoTowerGenerateOutput(CacheOutput):
    """
    Result of `generate(..., return_dict_in_generate=True)`.

    Args:
        sequences: (B, P + N) the prompts as given, then the new tokens, padded after a row's end.
        denoiser_forwards: (B,) denoiser passes of each row.
        context_forwards: (B,) context tower passes of each row: the prompt's, then one per chunk read.
        tokens_per_forward: (B,) float32, new tokens (end-of-text included) per pass of either tower.
        tokens_per_denoiser_forward: (B,) float32, new tokens per denoiser pass; NaN for a row that took none (its
            text ended before), None in mode "ar".
        commit_steps: (B, N) the denoiser pass of its block, from 0, that proposed each token; -1 for what the context
            tower chose, what a starting block held, and padding.
        confidences: (B, N) float32, each token's probability, untempered and before logits processors, under the
            tower that decided it when it was committed; NaN on padding and what a starting block held.
        log_probs: (B, N) float32, its log-probability then under the distribution it was taken from: after all
            logits processors, temperature included; NaN likewise.
        accepted_lengths: (B,) float32, in mode "self_speculative": mean number of tokens a cycle added to the text;
            NaN for a row that ended before its first cycle.
        acceptance: (B, S - 1) float32, likewise: share of a row's cycles that added the draft at each position.
        scores, logits: N tensors (B, V) float32, with `output_scores` and `output_logits`: what the token was chosen
            from, after and before logits processors; zero on padding and what a starting block held.
        cache: also `past_key_values`; the cache after the last chunk read, for a next call.
    """

    sequences: torch.Tensor
    denoiser_forwards: torch.Tensor | None = None
    context_forwards: torch.Tensor | None = None
    tokens_per_forward: torch.Tensor | None = None
    tokens_per_denoiser_forward: torch.Tensor | None = None
    commit_steps: torch.Tensor | None = None
    confidences: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    accepted_lengths: torch.Tensor | None = None
    acceptance: torch.Tensor | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    cache: TwoTowerCache | None = None


@dataclass
class BlockStep:
    """
    What `step_callback` sees after a denoiser pass and before its commits.

    All tensors are copies. It may change `commit` (veto: False; commit more: True) and `tokens` (replace), in place or
    by assignment of tensors of their shape, kind and device; nothing comes of what it does to the others. What the
    last step leaves open is committed by no later one, so a veto there is an error; replace the token instead. In mode
    "self_speculative" the block is a draft that begins with the text's newest token: what changes is how much of it is
    kept, never the text. The rows of a call with a callback take their passes together.

    Args:
        rows: (R,) of the batch, those still generating.
        block: number of the block, or of the draft, from 0.
        step: number of the pass within the block, from 0.
        steps: most passes of the block.
        ids: (R, S) the block before this step's commits, the mask id where open.
        committed: (R, S) bool, likewise.
        timestep: (R,) float32 given to the denoiser.
        logits: (R, S, V) float32, the mask id at -inf.
        tokens: (R, S) predictions.
        confidence: (R, S) their untempered probabilities.
        commit: (R, S) bool, open positions the unmasking rule commits now.
        mask_logits: (R, S) float32, the logits of the mask id.
    """

    rows: torch.Tensor
    block: int
    step: int
    steps: int
    ids: torch.Tensor
    committed: torch.Tensor
    timestep: torch.Tensor
    logits: torch.Tensor
    tokens: torch.Tensor
    confidence: torch.Tensor
    commit: torch.Tensor
    mask_logits: torch.Tensor


@dataclass
class Canvas:
    """
    The tokens to come of one row, S of them: a block in progress, a draft, or what the context tower chose.

    Args:
        ids: the mask id where open.
        open: which are not committed yet.
        problems: why a position can hold no token, 0 where it can.
        records: what is kept of each token, by name of [`RECORDS`].
    """

    ids: list[int]
    open: list[bool]
    problems: list[int]
    records: dict[str, list[Any]]
    checked: int = 0  # how many committed tokens criteria were asked about


@dataclass(eq=False)
class Row:
    """
    One text.

    Args:
        request: what it belongs to.
        number: of the request's rows.
        prompt: its tokens.
        unread: the tokens at its end that the context tower has not read.
        most_new_tokens: where it ends at the latest.
        seed: of what it draws, 64 bits.
    """

    request: "Request"
    number: int
    prompt: list[int]
    unread: list[int]
    most_new_tokens: int
    seed: int
    tokens: list[int] = field(default_factory=list)
    records: dict[str, list[Any]] = field(default_factory=dict)
    phase: str = READ
    canvas: Canvas = field(default_factory=lambda: Canvas([], [], [], {}))
    step: int = 0  # of the block, from 0
    block: int = -1  # number of the block or draft, from 0
    newest: int = -1  # the token at the text's end that the context tower has not read, where a mode needs it
    starting_block: list[int] | None = None  # what the first block holds already
    waited: bool = False  # to be read with others
    watched: bool = False  # how sure the context tower is of what it chooses next is wanted
    problem: int = 0  # why its last token is none
    denoiser_forwards: int = 0
    context_forwards: int = 0
    cycles: int = 0
    drafts_kept: list[int] = field(default_factory=list)  # cycles that kept the draft at each position
    slot: int = -1  # where it is in the engine's cache
    cache: TwoTowerCache | None = None  # what it left behind, where that is wanted
    scores_shown: list[torch.Tensor] = field(default_factory=list)  # (1, V) each, to criteria, of its tokens
    _text: torch.Tensor | None = None
    _held: int = 0

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)

    def text(self, device: torch.device) -> torch.Tensor:
        """(length,) on the device; what is there already is not sent again."""
        if self._text is None or self._text.shape[0] < self.length:
            grown = torch.empty(2 * self.length + 64, dtype=torch.long, device=device)
            if self._text is not None:
                grown[: self._held] = self._text[: self._held]
            self._text = grown
        self._held = min(self._held, self.length)
        if self._held < self.length:
            new = (self.prompt + self.tokens)[self._held :]
            self._text[self._held : self.length] = torch.tensor(new, device=device)
            self._held = self.length
        return self._text[: self.length]

    def open_canvas(self, known: list[int], size: int) -> None:
        """A block or draft of `size` positions that begins with known tokens; the mask id is one like any other."""
        request, wanted = self.request, size - len(known)
        self.canvas = Canvas(
            known + [request.mask_token_id] * wanted,
            [False] * len(known) + [True] * wanted,
            [0] * size,
            {name: [RECORDS[name]] * size for name in request.recorded},
        )
        self.step, self.block = 0, self.block + 1

    def write(self, canvas: Canvas, kept: int) -> None:
        """Add the first `kept` tokens to the text; of less than 0, take back as many."""
        if kept < 0:
            self.tokens = self.tokens[:kept]
            self.records = {name: values[:kept] for name, values in self.records.items()}
            self._held = min(self._held, self.length)
            return
        self.tokens += canvas.ids[:kept]
        for name, values in canvas.records.items():
            # A view would keep what its pass computed of all rows and positions.
            own = [value.clone() if isinstance(value, torch.Tensor) else value for value in values[:kept]]
            self.records.setdefault(name, []).extend(own)


@dataclass(eq=False)
class Request:
    """
    What one call of `generate`, or one request to the engine, asks for; the same for all of its rows.

    Args:
        config: all knobs set.
        prompts: (B, P) as transformers shows them, padded on the left.
        recorded: names of what is kept of each token, of [`RECORDS`].
        in_step: whether its rows take their passes together.
    """

    config: GenerationConfig
    strategy: Any
    processors: Any
    rule: Any
    stopping: Any
    prompts: torch.Tensor
    eos: frozenset[int]
    pad_token_id: int
    mask_token_id: int
    vocab_size: int
    recorded: tuple[str, ...]
    keep_cache: bool
    device: torch.device
    steps: int = 1  # most denoiser passes per block or draft
    in_step: bool = False
    runs_users_code: bool = False  # a processor, criterion, callback or rule, which is given tensors
    works_anywhere: bool = False  # on whichever device its logits are, of which no more than tokens is wanted
    step_callback: Callable[[BlockStep], None] | None = None
    streamer: BaseStreamer | None = None
    rows: list[Row] = field(default_factory=list)
    on_tokens: Callable[[Row, list[int]], None] | None = None  # called with what is new of a row
    on_end: Callable[["Request"], None] | None = None
    on_error: Callable[["Request", Exception], None] | None = None  # default: errors go on to the caller
    streamed: int = 0  # columns of new tokens
    text_processors: Any = None  # [`TextProcessors`] of its rows, once wanted
    key: Any = None  # of what may share a pass's operations

    def going_on(self) -> list[Row]:
        return [row for row in self.rows if row.phase != ENDED]

    def settled(self) -> int:
        """How many columns of new tokens will not change: all rows that go on have them."""
        lengths = [len(row.tokens) for row in self.going_on()]
        return min(lengths) if lengths else max(len(row.tokens) for row in self.rows)

    def new_columns(self, start: int, stop: int) -> torch.Tensor:
        """(B, stop - start) new tokens, padded after a row's end."""
        return torch.tensor([padded(row.tokens[start:stop], stop - start, self.pad_token_id) for row in self.rows])

    def padded(self, more: Iterable[tuple[Row, list[int]]] = ()) -> torch.Tensor:
        """(B, P + n) all rows as transformers would show them, some going on with more tokens."""
        width = max(len(row.tokens) for row in self.rows)
        behind: dict[Row, list[int]] = dict(more)
        extra = max(map(len, behind.values()), default=0)
        if width + extra == 0:
            return self.prompts
        new = []
        for row in self.rows:
            own = padded(row.tokens, width, self.pad_token_id) + behind.get(row, [])
            new.append(padded(own, width + extra, self.pad_token_id))
        return torch.cat([self.prompts, torch.tensor(new, device=self.device)], dim=1)

    def stream(self) -> None:
        """Hand out the columns of new tokens that by now every row has, or will never have."""
        assert self.streamer is not None
        if self.streamed < (settled := self.settled()):
            with torch.inference_mode(False), torch.no_grad():
                self.streamer.put(self.new_columns(self.streamed, settled))
            self.streamed = settled

    def sequences(self, prompts: torch.Tensor) -> torch.Tensor:
        """(B, P + N) the new tokens after (B, P) prompts as they were given."""
        width = max(len(row.tokens) for row in self.rows)
        return torch.cat([prompts, self.new_columns(0, width).to(prompts)], dim=1)

    def output(self, prompts: torch.Tensor, cache: TwoTowerCache | None) -> TwoTowerGenerateOutput:
        """The result after (B, P) prompts as they were given."""
        device, rows = self.device, self.rows
        width = max(len(row.tokens) for row in rows)
        new = torch.tensor([len(row.tokens) for row in rows], device=device)
        denoiser = torch.tensor([row.denoiser_forwards for row in rows], device=device)
        context = torch.tensor([row.context_forwards for row in rows], device=device)
        output = TwoTowerGenerateOutput(
            sequences=self.sequences(prompts),
            denoiser_forwards=denoiser,
            context_forwards=context,
            tokens_per_forward=per_pass(new, denoiser + context),
            cache=cache,
            **{name: self._record(name, width) for name in self.recorded},
        )
        if self.strategy.needs_denoiser:
            output.tokens_per_denoiser_forward = per_pass(new, denoiser)
        if self.strategy.verifies:
            cycles = torch.tensor([row.cycles for row in rows], device=device)
            kept = [padded(row.drafts_kept, self.config.block_size - 1, 0) for row in rows]
            output.acceptance = per_pass(torch.tensor(kept, device=device), cycles[:, None])
            # The first token is the context tower's, before all cycles.
            output.accepted_lengths = per_pass(new - 1, cycles)
        return output

    def _record(self, name: str, width: int) -> Any:
        fill = RECORDS[name]
        if name not in WIDE_RECORDS:
            dtype = torch.long if name == "commit_steps" else torch.float32
            values = [padded(row.records.get(name, []), width, fill) for row in self.rows]
            return torch.tensor(values, dtype=dtype, device=self.device)
        nothing = torch.zeros(self.vocab_size, dtype=torch.float32, device=self.device)
        columns = []
        for column in range(width):
            held = [_at(row.records.get(name, []), column) for row in self.rows]
            columns.append(torch.stack([value if isinstance(value, torch.Tensor) else nothing for value in held]))
        return tuple(columns)


def padded(values: list[Any], width: int, fill: Any) -> list[Any]:
    """A list filled up to a width."""
    return values + [fill] * (width - len(values))


def _at(values: list[Any], idx: int) -> Any:
    return values[idx] if idx < len(values) else None


def per_pass(counts: torch.Tensor, passes: torch.Tensor) -> torch.Tensor:
    """Float32 ratio; NaN where there was no pass."""
    return counts.float() / passes.float().masked_fill(passes == 0, torch.nan)


__all__ = [
    "DENOISE",
    "ENDED",
    "OPEN",
    "READ",
    "RECORDS",
    "VERIFY",
    "WIDE_RECORDS",
    "BlockStep",
    "Canvas",
    "Request",
    "Row",
    "TwoTowerGenerateOutput",
    "padded",
]
