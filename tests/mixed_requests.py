"""Random requests of all modes and settings, to be run alone and together; for tests and benchmarks/serving.py."""

from random import Random
from typing import Any, NamedTuple

import torch
from tiny import random_ids, tiny_model, without_special_tokens

from twotower.decoding.asking import PerRow, Stateless
from twotower.decoding.pass_costs import PassCosts

MODES = ("ar", "mock_ar", "mask_diffusion", "self_speculative")
RULES = ("confidence", "fixed", "entropy", "margin", "factor", "left_to_right", "posterior", "predict_and_noise")
# Made up, so that equal calls take equal passes.
LENGTHS, ROWS = (2, 3, 4, 5, 6), (1, 4, 16, 64, 256)
COSTS = PassCosts(
    {
        "step": {1: {rows: 1.0 + 0.01 * rows for rows in ROWS}},
        "denoise": {length: {rows: 0.5 + 0.01 * rows for rows in ROWS} for length in LENGTHS},
        "verify": {length: {rows: 1.1 + 0.02 * rows for rows in ROWS} for length in LENGTHS},
    }
)


class Request(NamedTuple):
    """A prompt (1, n), plain arguments of `generate`, and names of [`OF_CODE`], which makes the others."""

    ids: torch.Tensor
    plain: dict[str, Any]
    of_code: tuple[str, ...] = ()

    def arguments(self) -> dict[str, Any]:
        """With new processors and criteria, since they may keep state."""
        made: dict[str, Any] = dict(self.plain)
        for name in self.of_code:
            for argument, value in OF_CODE[name]().items():
                made[argument] = made[argument] + value if isinstance(made.get(argument), list) else value
        return made


class Alternating:
    """Counts its calls, and forbids even and odd tokens in turn."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        scores = scores.clone()
        scores[:, self.calls % 2 :: 2] = -torch.inf
        return scores


class After:
    """A criterion that counts its calls."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self, ids: torch.Tensor, scores: Any) -> bool:
        self.left -= 1
        return self.left <= 0


def away_from_newest(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    scores = scores.clone()
    scores[:, ids[:, -1]] -= 3.0
    return scores


def surest_two(prediction: Any, masked: torch.Tensor, step: torch.Tensor, steps: int) -> torch.Tensor:
    order = prediction.confidence.masked_fill(~masked, -1.0).argsort(-1, descending=True).argsort(-1)
    return masked & (order < 2)


OF_CODE: dict[str, Any] = {
    "function": lambda: {"logits_processor": [away_from_newest]},
    "stateless": lambda: {"logits_processor": [Stateless(away_from_newest)]},
    "per row": lambda: {"logits_processor": [PerRow(lambda row: Alternating())]},
    "criterion": lambda: {"stopping_criteria": [Stateless(lambda ids, scores: ids[:, -1] % 9 == 0)]},
    "counting criterion": lambda: {"stopping_criteria": [PerRow(lambda row: After(7))]},
    "rule": lambda: {"unmasking_rule": surest_two},
    "callback": lambda: {"step_callback": lambda step: None},
}


def mixed_model() -> Any:
    model = without_special_tokens(tiny_model("each kind once"))
    model.pass_costs = COSTS
    return model


def mixed_request(rng: Random, most_new_tokens: int = 20) -> Request:
    mode = rng.choice(MODES)
    plain: dict[str, Any] = {"mode": mode, "max_new_tokens": rng.randint(1, most_new_tokens)}
    if rng.random() < 0.5:
        plain["eos_token_id"] = rng.choice([[7, 9], [20], [4, 11, 30]])
    if rng.random() < 0.5:
        plain |= {"do_sample": True, "temperature": rng.choice([0.7, 1.5]), "top_k": rng.choice([0, 5])}
        plain |= {"top_p": rng.choice([1.0, 0.8]), "seed": rng.randrange(2**63)}
    if rng.random() < 0.15:
        plain |= rng.choice([{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 3}])
    if rng.random() < 0.2:
        plain["suppress_tokens"] = rng.sample(range(4, 48), 10)
    if rng.random() < 0.2:
        plain["prefill_chunk_size"] = rng.choice([1, 5])
    if rng.random() < 0.25:
        plain["return_dict_in_generate"] = True
        plain |= rng.choice([{}, {"output_scores": True, "output_logits": True}])
    if rng.random() < 0.1:
        plain["num_return_sequences"] = 2
        plain |= {"do_sample": True, "seed": rng.randrange(99)}
    plain |= {"mask_diffusion": _of_blocks, "self_speculative": _of_drafts}.get(mode, lambda _: {})(rng)
    if plain.get("unmasking_rule") == "posterior":
        plain.setdefault("seed", rng.randrange(99))
    length = rng.choice([rng.randint(1, 30), rng.randint(1, 30), rng.randint(60, 150)])
    return Request(random_ids(1, length, seed=rng.randrange(2**31)), plain, _of_code(rng, plain))


def _of_blocks(rng: Random) -> dict[str, Any]:
    knobs = {"block_size": rng.choice([2, 3, 4]), "unmasking_rule": rng.choice(RULES)}
    knobs |= {"steps_per_block": rng.choice([1, 2, 16]), "confidence_threshold": rng.choice([0.05, 0.1, 0.5])}
    return knobs | {"tokens_per_step": rng.choice([1, 2]), "noise_schedule": rng.choice(["linear", "cosine"])}


def _of_drafts(rng: Random) -> dict[str, Any]:
    size = rng.choice([3, 4])
    knobs = {"block_size": size, "draft_steps": rng.choice([1, 2]), "draft_length": rng.choice(["auto", 1, 2, size])}
    return knobs | {"acceptance_ratio": rng.choice([1.0, 1.0, 0.5, 0.1])}


def _of_code(rng: Random, plain: dict[str, Any]) -> tuple[str, ...]:
    if rng.random() < 0.7 or "num_return_sequences" in plain:
        return ()
    names = ["function", "stateless", "per row", "criterion", "counting criterion"]
    if plain["mode"] == "mask_diffusion":
        names.append("rule")
    chosen = rng.sample(names, rng.choice([1, 1, 2]))
    if plain["mode"] in ("mask_diffusion", "self_speculative") and "per row" not in chosen and rng.random() < 0.3:
        chosen.append("callback")
    return tuple(chosen)


def sequences_of(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.sequences


def differences(together: Any, alone: Any) -> list[str]:
    """Names of what differs between two results of `generate`, passes and numbers apart that others may round."""
    if isinstance(alone, torch.Tensor):
        return [] if torch.equal(together, alone) else ["sequences"]
    names = [name for name in ("sequences",) if not torch.equal(getattr(together, name), getattr(alone, name))]
    if not torch.equal(together.cache.lengths, alone.cache.lengths):
        names.append("lengths of the cache")
    for name in ("confidences", "log_probs"):
        if not torch.allclose(getattr(together, name), getattr(alone, name), atol=1e-4, rtol=1e-3, equal_nan=True):
            names.append(name)
    for name in ("scores", "logits"):
        held, expected = getattr(together, name), getattr(alone, name)
        if (held is None) != (expected is None) or not all(
            torch.allclose(one, other, atol=1e-3, rtol=1e-3)
            for one, other in zip(held or (), expected or (), strict=True)
        ):
            names.append(name)
    return names


__all__ = ["COSTS", "MODES", "OF_CODE", "Request", "differences", "mixed_model", "mixed_request", "sequences_of"]
