"""transformers' logits processors that read the text, for all rows and positions of a pass at once.

A pass gives the scores of S positions that follow each row's text. Before a position stand the text and those of the
guessed (or drafted) tokens that are further left; a processor that is a function of the two answers about all
positions together. Every function here gives, bit for bit, what its processor answers about one row and position.

Nothing is read from the device during a pass: what a processor holds becomes numbers and tensors once, beforehand.

Shapes: R rows, S positions, V vocabulary, W columns of texts with their guess, K sequences, P tokens of a prefix.
"""

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch.distributions import Categorical
from torch.nn.functional import pad

from ..compat_twotower import logits_process
from .asking import keeps_no_state
from .sampling import ELEMENTWISE, elementwise

Kind = Literal["elementwise", "vectorised", "asked", "stateful"]


class Texts(NamedTuple):
    """
    What stands before each position of a pass.

    Args:
        ids: (R, W) int64, each row's text from the first column on, then its guess, and columns for S - 1 tokens of it
            after the longest text; what else they hold is not looked at.
        lengths: (R,) tokens before the first position.
    """

    ids: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def with_guess(cls, text: torch.Tensor, lengths: torch.Tensor, guess: torch.Tensor) -> "Texts":
        """From (R, L) texts of (R,) tokens and a guess (R, at least S - 1) of what comes to stand at the positions."""
        # A column more than none: there is something to look up for rows without a token, too.
        ids = pad(text, (0, max(guess.shape[1], 1)))
        columns = lengths[:, None] + torch.arange(guess.shape[1], device=ids.device)
        return cls(ids.scatter_(1, columns, guess), lengths)

    def before(self, scores: torch.Tensor) -> torch.Tensor:
        """(R, S) how many tokens stand before each position that has (R, S, V) scores."""
        return self.lengths[:, None] + torch.arange(scores.shape[1], device=self.lengths.device)

    def select(self, rows: torch.Tensor) -> "Texts":
        """Of some rows, an index."""
        return Texts(self.ids[rows], self.lengths[rows])


# What processors do, given all they know as numbers, the same for all rows, and tensors with an entry per row.


def penalise_repetition(scores: torch.Tensor, text: Texts, penalty: float, ignored: torch.Tensor) -> torch.Tensor:
    """Penalise tokens of the text, of which the first `ignored` (R,) do not count."""
    rows, width, vocab_size = *text.ids.shape, scores.shape[-1]
    places = torch.arange(width, device=scores.device).expand(rows, -1)
    places = places.where(places >= ignored[:, None], width)
    # Where a token stands first says before which positions it has been seen. The spare column takes ids of an
    # embedding larger than the scores.
    first = places.new_full((rows, vocab_size + 1), width)
    first = first.scatter_reduce_(1, text.ids.clamp(0, vocab_size), places, "amin")[:, :vocab_size]
    seen = first[:, None] < text.before(scores)[..., None]
    return _penalised(scores, penalty).where(seen, scores)


def penalise_tokens(scores: torch.Tensor, text: Texts, penalty: float, tokens: torch.Tensor) -> torch.Tensor:
    """Penalise (R, V) tokens, whatever the text."""
    return _penalised(scores, penalty).where(tokens[:, None], scores)


def forbid_repeated_ngrams(scores: torch.Tensor, text: Texts, size: int) -> torch.Tensor:
    """Forbid what would complete `size` tokens that follow each other in the text already."""
    width, positions, prefix = text.ids.shape[1], scores.shape[1], size - 1
    if width < size:
        return scores
    places = torch.arange(width, device=scores.device)
    repeats = (places >= prefix) & (places < text.before(scores)[..., None])  # (R, S, W): is the token here forbidden?
    if prefix > 0:
        # The last tokens before all positions overlap, so each is compared with the text once; before position j
        # stand those of columns j to j + prefix - 1.
        columns = text.lengths[:, None] + torch.arange(-prefix, positions - 1, device=scores.device)
        same = text.ids.gather(1, columns.clamp(min=0))[..., None] == text.ids[:, None]
        for skipped in range(prefix):
            repeats[..., prefix:] &= same[:, skipped : skipped + positions, skipped : width - prefix + skipped]
    return _forbid_any(scores, text.ids.clamp(0, scores.shape[-1]), repeats)


def forbid_ngrams(scores: torch.Tensor, text: Texts, prefixes: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Forbid the tokens (R, K) whose prefixes (R, K, P) end the text; see [`_completed`]."""
    spare = scores.shape[-1]
    return _forbid_any(scores, tokens.where(tokens >= 0, spare), _completed(text, scores, prefixes))


def add_sequence_bias(
    scores: torch.Tensor,
    text: Texts,
    bias: torch.Tensor,
    prefixes: torch.Tensor,
    tokens: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Add a bias (R, V), and `weights` (R, K) to the tokens (R, K) whose prefixes (R, K, P) end the text."""
    completed = _completed(text, scores, prefixes)
    columns = tokens.clamp(min=0)[:, None].expand_as(completed)
    added = weights[:, None].where(completed, 0.0)
    return scores + bias[:, None].expand_as(scores).scatter_add(2, columns, added)


def forbid_before(scores: torch.Tensor, text: Texts, tokens: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Forbid (R, V) tokens while the text is shorter than `length` (R,)."""
    return _forbid(scores, tokens, text.before(scores) < length[:, None])


def forbid_at(scores: torch.Tensor, text: Texts, tokens: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Forbid (R, V) tokens after a text of `length` (R,)."""
    return _forbid(scores, tokens, text.before(scores) == length[:, None])


def force_at(scores: torch.Tensor, text: Texts, forced: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Answer with `forced` (R, V) scores after a text of `length` (R,)."""
    here = text.before(scores) == length[:, None]
    return forced[:, None].where(here[..., None], scores)


def favour_growingly(
    scores: torch.Tensor, text: Texts, tokens: torch.Tensor, length: torch.Tensor, growth: torch.Tensor
) -> torch.Tensor:
    """Raise (R, V) tokens by their score times `growth` (R, N) at as many tokens after a `length` (R,)."""
    distance = text.before(scores) - length[:, None]
    factor = growth.gather(1, distance.clamp(0, growth.shape[1] - 1))
    raised = (scores.abs() * factor[..., None]).masked_fill(~scores.isfinite() | ~tokens[:, None], 0.0)
    return (scores + raised).where(distance[..., None] > 0, scores)


# What does not read the text, but in transformers' own form waits for the device, to check scores for NaN.


def keep_top_h(scores: torch.Tensor, text: Texts, share: float, most: int, filler: float) -> torch.Tensor:
    """Keep the likeliest tokens, at most `most`, whose entropy adds up to a share of the whole."""
    logits, tokens = scores.topk(min(most, scores.shape[-1]))
    likeliest = Categorical(logits=logits, validate_args=False)
    entropies = -likeliest.probs * likeliest.probs.log()
    kept = entropies.cumsum(-1) <= (likeliest.entropy() * share)[..., None]
    kept[..., 0] = True
    return scores.masked_fill(~torch.zeros_like(scores, dtype=torch.bool).scatter(2, tokens, kept), filler)


def keep_above_eta(
    scores: torch.Tensor, text: Texts, least: int, filler: float, epsilon: torch.Tensor
) -> torch.Tensor:
    """Keep tokens at least as likely as the smaller of epsilon (R,) and what the entropy makes of it."""
    entropy, epsilon = Categorical(logits=scores, validate_args=False).entropy(), epsilon[:, None]
    eta = torch.min(epsilon, epsilon.sqrt() * torch.exp(-entropy))[..., None]
    unlikely = scores < scores.topk(min(least, scores.shape[-1]))[0][..., -1:]
    return scores.masked_fill((scores.softmax(-1) < eta) & unlikely, filler)


def _penalised(scores: torch.Tensor, penalty: float) -> torch.Tensor:
    return torch.where(scores < 0, scores * penalty, scores / penalty)


def _forbid(scores: torch.Tensor, tokens: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
    """Without (R, V) tokens at (R, S) positions."""
    return scores.masked_fill(tokens[:, None] & here[..., None], -torch.inf)


def _forbid_any(scores: torch.Tensor, tokens: torch.Tensor, forbidden: torch.Tensor) -> torch.Tensor:
    """Without those of (R, K) tokens, of which V means none, that are (R, S, K) forbidden."""
    (rows, positions, vocab_size), columns = scores.shape, tokens[:, None].expand_as(forbidden)
    # A token may stand at many places, of which one is enough.
    banned = torch.zeros(rows, positions, vocab_size + 1, dtype=torch.uint8, device=scores.device)
    banned.scatter_reduce_(2, columns, forbidden.view(torch.uint8), "amax")
    return scores.masked_fill(banned[..., :vocab_size].view(torch.bool), -torch.inf)


def _completed(text: Texts, scores: torch.Tensor, prefixes: torch.Tensor) -> torch.Tensor:
    """(R, S, K) whether prefixes (R, K, P), last token first, filled up with -1, end what stands before positions."""
    places = text.before(scores)[..., None] - 1 - torch.arange(prefixes.shape[2], device=scores.device)
    last = text.ids.gather(1, places.clamp(min=0).flatten(1)).view_as(places).masked_fill(places < 0, -2)
    completed = torch.ones(*places.shape[:2], prefixes.shape[1], dtype=torch.bool, device=scores.device)
    for token, expected in zip(last.unbind(2), prefixes.unbind(2), strict=True):
        completed &= (token[..., None] == expected[:, None]) | (expected[:, None] < 0)
    return completed


# What processors know: (processor, vocabulary, longest text) -> the arguments of the functions above, tensors without
# the dimension of rows; None where it cannot answer about one row, and so is asked and says so.


def _of_repetition_penalty(processor: Any, vocab_size: int, longest: int) -> dict[str, Any] | None:
    ignored = processor.prompt_ignore_length
    if isinstance(ignored, torch.Tensor):
        return {"penalty": processor.penalty, "ignored": ignored.cpu()[0]} if len(ignored) == 1 else None
    return {"penalty": processor.penalty, "ignored": torch.tensor(ignored or 0)}


def _of_encoder_repetition_penalty(processor: Any, vocab_size: int, longest: int) -> dict[str, Any] | None:
    if len(processor.encoder_input_ids) != 1:
        return None
    return {"penalty": processor.penalty, "tokens": _indexed(processor.encoder_input_ids[0], vocab_size)}


def _of_no_repeat_ngram(processor: Any, vocab_size: int, longest: int) -> dict[str, Any]:
    return {"size": processor.ngram_size}


def _of_encoder_no_repeat_ngram(processor: Any, vocab_size: int, longest: int) -> dict[str, Any] | None:
    if processor.batch_size != 1:
        return None
    # A token beyond the vocabulary is refused where its prefix is met.
    if any(token >= vocab_size for tokens in processor.generated_ngrams[0].values() for token in tokens):
        return None
    ngrams = [(*prefix, token) for prefix, tokens in processor.generated_ngrams[0].items() for token in tokens]
    prefixes, tokens = _table(list(dict.fromkeys(ngrams)))
    return {"prefixes": prefixes, "tokens": tokens}


def _of_sequence_bias(processor: Any, vocab_size: int, longest: int) -> dict[str, Any]:
    # About no text it answers with the bias of single tokens, or that a token is beyond the vocabulary. It would keep
    # what it prepares for that, on this device, so a copy is asked.
    alone = copy.copy(processor)(torch.empty(1, 0, dtype=torch.long), torch.zeros(1, vocab_size))[0]
    # Those of a length follow each other, as they are added.
    lengths = list(dict.fromkeys(len(sequence) for sequence in processor.sequence_bias if len(sequence) > 1))
    longer = [one for length in lengths for one in processor.sequence_bias if len(one) == length]
    prefixes, tokens = _table(longer)
    weights = torch.tensor([processor.sequence_bias[one] for one in longer], dtype=torch.float32)
    return {"bias": alone, "prefixes": prefixes, "tokens": tokens, "weights": weights}


def _of_min_length(processor: Any, vocab_size: int, longest: int) -> dict[str, Any]:
    return {"tokens": _among(processor.eos_token_id, vocab_size), "length": torch.tensor(processor.min_length)}


def _of_min_new_tokens(processor: Any, vocab_size: int, longest: int) -> dict[str, Any]:
    length = processor.prompt_length_to_skip + processor.min_new_tokens
    return {"tokens": _among(processor.eos_token_id, vocab_size), "length": torch.tensor(length)}


def _of_suppress_at_begin(processor: Any, vocab_size: int, longest: int) -> dict[str, Any]:
    tokens = _among(processor.begin_suppress_tokens, vocab_size)
    return {"tokens": tokens, "length": torch.tensor(processor.begin_index)}


def _of_forced_bos(processor: Any, vocab_size: int, longest: int) -> dict[str, Any]:
    return {"forced": _only(processor.bos_token_id, vocab_size), "length": torch.tensor(1)}


def _of_forced_eos(processor: Any, vocab_size: int, longest: int) -> dict[str, Any]:
    return {"forced": _only(processor.eos_token_id, vocab_size), "length": torch.tensor(processor.max_length - 1)}


def _of_exponential_decay(processor: Any, vocab_size: int, longest: int) -> dict[str, Any]:
    start, factor = processor.regulation_start, processor.regulation_factor
    # Powers of Python, which the processor takes, and not those of the device.
    growth = [_power(factor, distance) - 1 for distance in range(max(longest - start, 0) + 1)]
    tokens = _indexed(processor.eos_token_id, vocab_size)
    return {"tokens": tokens, "length": torch.tensor(start), "growth": torch.tensor(growth, dtype=torch.float32)}


def _of_top_h(processor: Any, vocab_size: int, longest: int) -> dict[str, Any]:
    return {"share": processor.top_h, "most": processor.top_n, "filler": processor.filter_value}


def _of_eta(processor: Any, vocab_size: int, longest: int) -> dict[str, Any]:
    least, epsilon = processor.min_tokens_to_keep, processor.epsilon.cpu()
    return {"least": least, "filler": processor.filter_value, "epsilon": epsilon}


def _power(base: float, exponent: int) -> float:
    try:
        return float(pow(base, exponent))
    except OverflowError:  # the processor would raise it at this length, which the text need not come to
        return torch.inf


def _among(tokens: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """(V,) bool; tokens beyond the vocabulary are passed over."""
    return torch.isin(torch.arange(vocab_size), tokens.cpu())


def _indexed(tokens: torch.Tensor | int, vocab_size: int) -> torch.Tensor:
    """(V,) bool; tokens beyond the vocabulary are an IndexError."""
    mask = torch.zeros(vocab_size, dtype=torch.bool)
    mask[tokens.cpu() if isinstance(tokens, torch.Tensor) else tokens] = True
    return mask


def _only(tokens: torch.Tensor | int, vocab_size: int) -> torch.Tensor:
    """(V,) scores that allow nothing else."""
    return torch.zeros(vocab_size, dtype=torch.float32).masked_fill(~_indexed(tokens, vocab_size), -torch.inf)


def _table(sequences: list[tuple[int, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences as prefixes (K, P), last token first and filled up with -1, and the tokens (K,) that complete them."""
    width = max((len(one) - 1 for one in sequences), default=0)
    prefixes = [[*one[-2::-1], *[-1] * (width - len(one) + 1)] for one in sequences]
    tokens = [one[-1] for one in sequences]
    return torch.tensor(prefixes, dtype=torch.long).view(len(sequences), width), torch.tensor(tokens, dtype=torch.long)


class Vectorised(NamedTuple):
    """How a class of processors answers about all positions: by `apply`, given the `parameters` of each row's."""

    apply: Callable[..., torch.Tensor]
    parameters: Callable[[Any, int, int], dict[str, Any] | None]


VECTORISED = {
    logits_process.RepetitionPenaltyLogitsProcessor: Vectorised(penalise_repetition, _of_repetition_penalty),
    logits_process.EncoderRepetitionPenaltyLogitsProcessor: Vectorised(
        penalise_tokens, _of_encoder_repetition_penalty
    ),
    logits_process.NoRepeatNGramLogitsProcessor: Vectorised(forbid_repeated_ngrams, _of_no_repeat_ngram),
    logits_process.EncoderNoRepeatNGramLogitsProcessor: Vectorised(forbid_ngrams, _of_encoder_no_repeat_ngram),
    logits_process.SequenceBiasLogitsProcessor: Vectorised(add_sequence_bias, _of_sequence_bias),
    logits_process.NoBadWordsLogitsProcessor: Vectorised(add_sequence_bias, _of_sequence_bias),
    logits_process.MinLengthLogitsProcessor: Vectorised(forbid_before, _of_min_length),
    logits_process.MinNewTokensLengthLogitsProcessor: Vectorised(forbid_before, _of_min_new_tokens),
    logits_process.SuppressTokensAtBeginLogitsProcessor: Vectorised(forbid_at, _of_suppress_at_begin),
    logits_process.ForcedBOSTokenLogitsProcessor: Vectorised(force_at, _of_forced_bos),
    logits_process.ForcedEOSTokenLogitsProcessor: Vectorised(force_at, _of_forced_eos),
    logits_process.ExponentialDecayLengthPenalty: Vectorised(favour_growingly, _of_exponential_decay),
    logits_process.TopHLogitsWarper: Vectorised(keep_top_h, _of_top_h),
    logits_process.EtaLogitsWarper: Vectorised(keep_above_eta, _of_eta),
}


# The processors of a batch.


class _Step(NamedTuple):
    """A processor of a row, or of the rows of a group: then with one object each, and tensors of all."""

    kind: Kind
    processors: list[Any]
    apply: Callable[..., torch.Tensor] | None = None
    numbers: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}

    def select(self, places: list[int]) -> "_Step":
        processors = [self.processors[place] for place in places]
        chosen = {
            name: values if len(values) == 1 else values[torch.tensor(places, device=values.device)]
            for name, values in self.tensors.items()
        }
        return self._replace(processors=processors, tensors=chosen)

    def likeness(self) -> Hashable:
        """Equal for steps that can be one for several rows."""
        if self.kind == "elementwise":
            settings = vars(self.processors[0]).items()
            values = [(name, value.tolist() if isinstance(value, torch.Tensor) else value) for name, value in settings]
            return type(self.processors[0]), repr(values)
        return self.kind, self.apply, tuple(self.numbers.items())


class PreparedProcessors:
    """
    The logits processors of one row.

    Args:
        processors: as `generate` makes them for the row alone.
        vocab_size: V.
        longest: how many tokens the row's text may have, its prompt included; answers after more mean nothing.
    """

    def __init__(self, processors: Sequence[Any], vocab_size: int, longest: int):
        self.steps = [_prepared(processor, vocab_size, longest) for processor in processors]
        self.likeness = tuple(step.likeness() for step in self.steps)


def _prepared(processor: Any, vocab_size: int, longest: int) -> _Step:
    how = VECTORISED.get(type(processor))
    if how is None and type(processor) in ELEMENTWISE:
        return _Step("elementwise", [processor])
    if not keeps_no_state(processor):
        return _Step("stateful", [processor])
    try:
        with torch.device("cpu"):  # whatever torch's default device
            parameters = how.parameters(processor, vocab_size, longest) if how else None
    except IndexError:  # a token beyond the vocabulary, which the processor refuses where it needs it
        parameters = None
    if how is None or parameters is None:
        return _Step("asked", [processor])
    tensors = {name: value for name, value in parameters.items() if isinstance(value, torch.Tensor)}
    numbers = {name: value for name, value in parameters.items() if name not in tensors}
    return _Step("vectorised", [processor], how.apply, numbers, tensors)


class _Group(NamedTuple):
    """Rows of a batch whose processors are alike: their places in it, `on_device` unless they are all of it."""

    places: list[int]
    on_device: torch.Tensor | None
    steps: list[_Step]


class TextProcessors:
    """
    The logits processors of a batch, asked about all rows and positions of a pass.

    Rows that have the same kinds of processors, with the same numbers where these are not lengths, tokens or prompts,
    are processed together.

    Args:
        rows: R rows' processors.
        device: of the scores.
    """

    def __init__(self, rows: Sequence[PreparedProcessors], device: torch.device | str):
        alike: dict[Hashable, list[int]] = {}
        for place, row in enumerate(rows):
            alike.setdefault(row.likeness, []).append(place)
        steps = [
            [_merged(list(of_rows), device) for of_rows in zip(*(rows[place].steps for place in places), strict=True)]
            for places in alike.values()
        ]
        self._set(len(rows), list(zip(alike.values(), steps, strict=True)), device)

    def _set(self, rows: int, groups: list[tuple[list[int], list[_Step]]], device: torch.device | str) -> None:
        self.rows, self.device = rows, device
        self.groups = [
            _Group(places, torch.tensor(places, device=device) if len(places) < rows else None, steps)
            for places, steps in groups
        ]
        self._selected: dict[tuple[int, ...], TextProcessors] = {}

    @property
    def kinds(self) -> set[Kind]:
        """Of "elementwise", "vectorised", "asked" and "stateful", those that there are."""
        return {step.kind for group in self.groups for step in group.steps}

    def select(self, rows: Sequence[int]) -> "TextProcessors":
        """Of some rows, in this order; kept, so that a later pass over the same rows prepares nothing."""
        chosen = tuple(rows)
        if chosen == tuple(range(self.rows)):
            return self
        if chosen not in self._selected:
            if len(self._selected) >= 16:
                self._selected.clear()
            selected = object.__new__(TextProcessors)
            selected._set(len(chosen), list(self._groups_of(chosen)), self.device)
            self._selected[chosen] = selected
        return self._selected[chosen]

    def _groups_of(self, rows: tuple[int, ...]) -> Iterator[tuple[list[int], list[_Step]]]:
        for group in self.groups:
            members = {row: member for member, row in enumerate(group.places)}
            places = [place for place, row in enumerate(rows) if row in members]
            if places:
                yield places, [step.select([members[rows[place]] for place in places]) for step in group.steps]

    def __call__(self, scores: torch.Tensor, text: Texts) -> torch.Tensor:
        """
        Process scores, each row's by its processors in their order; those that may keep state are left out.

        Args:
            scores: (R, S, V) float32.
            text: what stands before the positions.

        Returns:
            (R, S, V), the argument itself where there is nothing to do.
        """
        assert "asked" not in self.kinds, "a processor must be asked about one position at a time"
        whole = scores
        for places, on_device, steps in self.groups:
            part, seen = (scores, text) if on_device is None else (scores[on_device], text.select(on_device))
            for step in steps:
                if step.kind == "elementwise":
                    part = elementwise(step.processors[0], part)
                elif step.apply is not None:
                    tensors = {
                        name: value.expand(len(places), *value.shape[1:]) for name, value in step.tensors.items()
                    }
                    part = step.apply(part, seen, **step.numbers, **tensors)
            if on_device is None:
                whole = part
            elif steps:
                whole = whole.clone() if whole is scores else whole
                whole.index_copy_(0, on_device, part)
        return whole


def _merged(steps: list[_Step], device: torch.device | str) -> _Step:
    """One step of several rows."""
    tensors = {name: _stacked([step.tensors[name] for step in steps]).to(device) for name in steps[0].tensors}
    return steps[0]._replace(processors=[step.processors[0] for step in steps], tensors=tensors)


def _stacked(tensors: list[torch.Tensor]) -> torch.Tensor:
    """(R, ...) of tensors filled up at the end to the size of the largest, ids by -1; (1, ...) of equal ones."""
    first = tensors[0]
    if all(other is first or torch.equal(other, first) for other in tensors):
        return first[None]
    shape = torch.tensor([tensor.shape for tensor in tensors]).amax(0).tolist()
    stacked = first.new_full((len(tensors), *shape), -1 if first.dtype == torch.long else 0)
    for row, tensor in zip(stacked, tensors, strict=True):
        row[tuple(slice(size) for size in tensor.shape)] = tensor
    return stacked


__all__ = ["VECTORISED", "PreparedProcessors", "TextProcessors", "Texts"]
