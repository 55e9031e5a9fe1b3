"""A call that fails leaves the caller's cache as it was: the same call and a longer turn go on as without it."""

from typing import Any

import pytest
import test_continuation
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_continuation import text_mask
from test_generation import padded
from tiny import random_ids, tiny_model, without_special_tokens
from transformers.generation.streamers import BaseStreamer

from twotower.cache_twotower import KeyValues, TwoTowerCache
from twotower.generation_twotower import MODES

ENDS = list(range(28, 34))


@pytest.fixture(scope="module")
def model():
    return without_special_tokens(tiny_model("each kind once"))


class Failure:
    """Called at its place during generate; raises at the call of number `at`."""

    def __init__(self, at: int | None, error: type[BaseException] = InterruptedError):
        self.at, self.error, self.calls = at, error, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise self.error

    @staticmethod
    def always(*args: Any) -> None:
        raise InterruptedError


def generate(model, text, **flags):
    if flags.get("mode") == "self_speculative":  # "auto" might draft nothing, and call nothing that drafts
        flags.setdefault("draft_length", flags.get("block_size", model.config.block_size))
    return test_continuation.generate(model, text, **flags)


class Streamer(BaseStreamer):
    def __init__(self, place: str, failure: Failure):
        self.put = self.put_draft = self.end = lambda *_: None
        setattr(self, place, failure)

    put = end = None


PLACES = {
    "streamer.put": lambda failure: {"streamer": Streamer("put", failure)},
    "streamer.put_draft": lambda failure: {"streamer": Streamer("put_draft", failure)},
    "streamer.end": lambda failure: {"streamer": Streamer("end", failure)},
    "step_callback": lambda failure: {"step_callback": failure},
    "logits_processor": lambda failure: {"logits_processor": [lambda ids, scores: failure() or scores]},
    "stopping_criteria": lambda failure: {"stopping_criteria": [lambda ids, scores: bool(failure())]},
    "prefix_allowed_tokens_fn": lambda failure: {
        "prefix_allowed_tokens_fn": lambda row, ids: failure() or list(range(4, 48))
    },
}
MODULES = ("context_tower.layers.2", "context_tower.norm_f", "context_lm_head", "denoiser_tower.layers.1", "lm_head")


def call(model, place: str, failure: Failure, text, **flags):
    """Generate with a failure at its place: an argument of the call, or a module of the model."""
    if place not in MODULES:
        return generate(model, text, **flags, **PLACES[place](failure))
    hook = model.get_submodule(place).register_forward_hook(failure)
    try:
        return generate(model, text, **flags)
    finally:
        hook.remove()


def contents(cache: TwoTowerCache) -> list[Any]:
    """Copies of all that a cache holds that counts."""
    if cache.lengths is None:
        return [None, cache.width, cache.computed_in, *(cache.view(layer) for layer in range(len(cache.layers)))]
    tensors = [cache.lengths]
    for row, length in enumerate(cache.lengths.tolist()):
        tensors.append(cache.ids[row, :length])
        for held in (cache.view(layer) for layer in range(len(cache.layers))):
            tensors += [part[row, :, :length] if isinstance(held, KeyValues) else part[row] for part in held or ()]
    facts = [cache.width, cache.ragged, cache.tentative, cache.computed_in]
    return [*facts, *(tensor.clone() for tensor in tensors)]


def assert_unchanged(cache: TwoTowerCache, before: list[Any]) -> None:
    for now, then in zip(contents(cache), before, strict=True):
        assert torch.equal(now, then) if isinstance(now, torch.Tensor) else now == then


def begun_batch(model, mode: str, lengths: tuple[int, ...] = (7, 3, 5)):
    """The text of a ragged batch with a new turn, its mask, and the cache of the turn before."""
    ids, mask = padded([random_ids(length, seed=length) for length in lengths], "left")
    begun = generate(model, ids, attention_mask=mask, mode=mode, max_new_tokens=2)
    text = torch.cat([begun.sequences, random_ids(len(ids), 1, seed=5)], dim=1)
    return text, torch.cat([text_mask(begun, mask), torch.ones_like(text[:, :1])], dim=1), begun.past_key_values


def assert_goes_on_as_fresh(model, text, cache, **flags) -> None:
    """The call, and after it a longer turn."""
    expected = generate(model, text, past_key_values=TwoTowerCache(model.config), **flags)
    output = generate(model, text, past_key_values=cache, **flags)
    assert torch.equal(output.sequences, expected.sequences)
    assert output.past_key_values is cache
    mask = text_mask(expected, flags["attention_mask"])
    longer = torch.cat([expected.sequences, random_ids(len(text), 2, seed=6)], dim=1)
    flags |= {"attention_mask": torch.cat([mask, torch.ones_like(longer[:, :2])], dim=1), "max_new_tokens": 4}
    sequences = [
        generate(model, longer, past_key_values=held, **flags).sequences
        for held in (cache, TwoTowerCache(model.config))  # a fresh one, since only then a mask may have holes
    ]
    assert torch.equal(*sequences)


def occurs(place: str, mode: str) -> bool:
    if place in ("step_callback", "streamer.put_draft"):
        return mode in ("mask_diffusion", "self_speculative")
    if mode == "ar":
        return not place.startswith(("denoiser", "lm_head"))
    return place != "context_lm_head" or mode == "self_speculative"


@pytest.mark.parametrize(
    ("place", "mode"), [(place, mode) for place in (*PLACES, *MODULES) for mode in MODES if occurs(place, mode)]
)
def test_a_failed_call_leaves_the_cache_as_it_was(model, place, mode):
    """At the first and at the last call, when rows have left the batch."""
    text, mask, cache = begun_batch(model, mode)
    flags = {"attention_mask": mask, "mode": mode, "max_new_tokens": 9, "eos_token_id": ENDS, "steps_per_block": 2}
    before, counter = contents(cache), Failure(None)
    call(model, place, counter, text, **flags)
    assert counter.calls > 0
    for at in {1, counter.calls}:
        with pytest.raises(InterruptedError):
            call(model, place, Failure(at), text, past_key_values=cache, **flags)
        assert_unchanged(cache, before)
    assert_goes_on_as_fresh(model, text, cache, **flags)


@settings(max_examples=12)
@given(data=st.data())
def test_failures_at_any_moment(model, data):
    mode = data.draw(st.sampled_from(MODES))
    place = data.draw(st.sampled_from([place for place in (*PLACES, *MODULES) if occurs(place, mode)]))
    error = data.draw(st.sampled_from([InterruptedError, KeyboardInterrupt, MemoryError]))
    lengths = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    text, mask, cache = begun_batch(model, mode, lengths)
    flags = {"attention_mask": mask, "mode": mode, "max_new_tokens": data.draw(st.integers(1, 12))}
    flags |= {"eos_token_id": ENDS, "block_size": data.draw(st.integers(2, 5))}
    before = contents(cache)
    failures = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=2))
    for failure in (Failure(at, error) for at in failures):
        try:
            call(model, place, failure, text, past_key_values=cache, **flags)
        except error:
            assert_unchanged(cache, before)
        else:
            # Over before it could fail: the cache has read on, as it should.
            return
    assert_goes_on_as_fresh(model, text, cache, **flags)


@pytest.mark.parametrize("mode", MODES)
def test_copies_of_a_row_that_fail_leave_the_cache_as_it_was(model, mode):
    text, mask, cache = begun_batch(model, mode, (6, 4))
    flags = {"attention_mask": mask, "mode": mode, "eos_token_id": ENDS, "do_sample": True, "seed": 3}
    flags |= {"num_return_sequences": 2, "temperature": 2.0}
    own = cache.copy_rows(torch.tensor([0, 0, 1, 1]))  # one for every copy, which is extended in place
    for held in (cache, own):
        before = contents(held)
        with pytest.raises(InterruptedError):
            call(model, "streamer.put", Failure(3), text, past_key_values=held, **flags)
        assert_unchanged(held, before)
        output = generate(model, text, past_key_values=held, **flags)
        assert torch.equal(output.sequences, generate(model, text, **flags).sequences)


@pytest.mark.parametrize("mode", MODES)
def test_a_fresh_cache_is_empty_after_a_failure_and_takes_other_rows(model, mode):
    cache = TwoTowerCache(model.config)
    with pytest.raises(InterruptedError):
        call(model, "streamer.end", Failure(1), random_ids(2, 6), mode=mode, past_key_values=cache)
    assert contents(cache) == contents(TwoTowerCache(model.config))
    text = random_ids(3, 4, seed=2)
    output = generate(model, text, mode=mode, past_key_values=cache)
    assert torch.equal(output.sequences, generate(model, text, mode=mode).sequences)


def test_a_refused_call_on_a_cache_read_tentatively_accepts_nothing(model):
    text = random_ids(2, 9, seed=1)
    cache = model(text[:, :4]).past_key_values
    model.context_tower(text[:, 4:7], cache, tentative=True)
    with pytest.raises(ValueError, match="holds 3 tokens read tentatively"):
        generate(model, text, mode="ar", past_key_values=cache)
    assert cache.tentative == 3
    cache.accept(torch.tensor([3, 1]))
    assert cache.lengths.tolist() == [7, 5]


# The model and its context tower, called directly.


@pytest.mark.parametrize("place", MODULES[:3])
@pytest.mark.parametrize("lengths", [(4, 4), (4, 2)])
def test_a_direct_call_that_fails_leaves_the_cache_as_it_was(model, place, lengths):
    text = random_ids(2, 9, seed=1)
    mask = (torch.arange(4) < torch.tensor(lengths)[:, None]).long()
    cache = model(text[:, :4], attention_mask=mask).past_key_values
    before, new = contents(cache), text[:, 4:]
    calls = [lambda: model(new, past_key_values=cache), lambda: model(new, torch.eye(2, 5), past_key_values=cache)]
    if place != "context_lm_head":
        calls += [lambda: model.context_tower(new, cache), lambda: model.context_tower(new, cache, tentative=True)]
    hook = model.get_submodule(place).register_forward_hook(Failure.always)
    for fails in calls:
        with pytest.raises(InterruptedError):
            fails()
        assert_unchanged(cache, before)
    hook.remove()
    expected = model(new, past_key_values=model(text[:, :4], attention_mask=mask).past_key_values).logits
    assert torch.equal(model(new, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("place", MODULES[:3])
def test_a_first_read_that_fails_leaves_no_rows_behind(model, place):
    cache = TwoTowerCache(model.config)
    hook = model.get_submodule(place).register_forward_hook(Failure.always)
    with pytest.raises(InterruptedError):
        model(random_ids(1, 5), past_key_values=cache)
    hook.remove()
    chosen = cache.copy_rows(torch.arange(3))
    ids = random_ids(3, 4, seed=2)
    for held in (chosen, cache):
        assert torch.equal(model(ids, past_key_values=held).logits, model(ids).logits)


@pytest.mark.parametrize("mode", MODES)
def test_a_text_after_a_failed_call_may_be_another_one(model, mode):
    """What the failed call wrote is nothing that the next one has to begin with."""
    text, mask, cache = begun_batch(model, mode)
    flags = {"attention_mask": mask, "mode": mode, "max_new_tokens": 12}
    with pytest.raises(InterruptedError):
        call(model, "stopping_criteria", Failure(9), text, past_key_values=cache, **flags)
    other = text.clone()
    other[:, -1] = (text[:, -1] - 3) % 40 + 4
    assert_goes_on_as_fresh(model, other, cache, **flags)


@pytest.mark.parametrize("mode", MODES)
def test_a_call_that_keeps_no_cache_copies_nothing_of_rows_that_leave(model, mode, monkeypatch):
    """After an error nobody could want it back."""
    dropped, noted = TwoTowerCache.drop_rows, []

    def drop_rows(cache, count):
        dropped(cache, count)
        noted.append(len(cache.undoing or ()))

    monkeypatch.setattr(TwoTowerCache, "drop_rows", drop_rows)
    flags = {"eos_token_id": list(range(4, 16)), "pad_token_id": 0}
    model.generate(random_ids(6, 9), mode=mode, max_new_tokens=30, **flags)
    assert noted == [0] * 6


def test_a_cache_in_use_is_refused_and_the_call_that_uses_it_goes_on(model):
    ids = random_ids(2, 5)
    first = model.generate(ids, max_new_tokens=6, return_dict_in_generate=True)
    text = torch.cat([first.sequences, ids], dim=1)
    said = []

    def again(step):
        if not said:
            with pytest.raises(ValueError, match=r"past_key_values is in use by a call .* copy.deepcopy") as refused:
                model.generate(torch.cat([text, text], dim=1), cache=first.cache, mode="ar", max_new_tokens=2)
            said.append(refused)

    expected = model.generate(text, max_new_tokens=9)
    assert torch.equal(model.generate(text, cache=first.cache, max_new_tokens=9, step_callback=again), expected)
    assert said
