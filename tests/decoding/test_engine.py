"""The engine: which rows share a pass, what is read back, and settings of drafts and rules that only it sees."""

import math
from random import Random

import pytest
import torch
from mixed_requests import MODES, mixed_model, surest_two
from tiny import random_ids
from torch.utils._python_dispatch import TorchDispatchMode

from twotower import TwoTowerEngine
from twotower.cache_twotower import TwoTowerCache
from twotower.decoding.state import DENOISE

SAMPLED = {"do_sample": True, "temperature": 1.3, "seed": 5}
SAMPLINGS = pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])


@pytest.fixture(scope="module")
def model():
    return mixed_model()


@pytest.fixture
def passes(model, monkeypatch):
    """Calls of each part of the model, in order."""
    calls = []
    for name in ("denoise", "predict_next"):
        spy_on(model, name, name, calls, monkeypatch)
    spy_on(model.context_tower, "forward", "context_tower", calls, monkeypatch)
    return calls


def spy_on(owner, method, name, calls, monkeypatch):
    original = getattr(owner, method)

    def spy(*args, **kwargs):
        calls.append(name)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, method, spy)


# Passes.


def test_an_iteration_runs_at_most_one_pass_of_each_tower(model, passes):
    engine, rng = TwoTowerEngine(model, slots=6), Random(0)
    for number in range(16):
        engine.add_request(random_ids(1, rng.randint(1, 40), seed=number), mode=MODES[number % 4], max_new_tokens=9)
    more = True
    while more:
        passes.clear()
        before = dict(engine._engine.passes)
        more = engine.step()
        context = passes.count("context_tower")
        denoiser = len(passes) - context
        assert context <= 1 and denoiser <= 1
        assert engine._engine.passes == {
            "denoiser": before["denoiser"] + denoiser,
            "context": before["context"] + context,
        }


def test_rows_at_different_steps_and_blocks_share_a_denoiser_pass(model, monkeypatch):
    engine, shared = TwoTowerEngine(model, slots=8), []
    original = model.denoise

    def spy(ids, *args):
        shared.append({(row.block, row.step) for row in engine._engine.rows if row.phase == DENOISE})
        assert len(ids) == sum(row.phase == DENOISE for row in engine._engine.rows)
        return original(ids, *args)

    monkeypatch.setattr(model, "denoise", spy)
    for number in range(8):
        engine.add_request(random_ids(1, 5, seed=number), max_new_tokens=20, confidence_threshold=0.1)
        engine.step()
    while engine.step():
        pass
    assert any(len({block for block, _ in places}) > 1 and len({step for _, step in places}) > 1 for places in shared)


def test_rows_of_two_modes_share_a_denoiser_pass(model, passes):
    engine = TwoTowerEngine(model, slots=2)
    handles = [
        engine.add_request(random_ids(1, 5), max_new_tokens=8, mode=mode, draft_length=4, return_dict_in_generate=True)
        for mode in ("mask_diffusion", "self_speculative")
    ]
    while engine.step():
        pass
    wanted = [int(handle.result(0).denoiser_forwards) for handle in handles]
    assert max(wanted) <= passes.count("denoise") < sum(wanted)


def logits_of_passes(model, monkeypatch):
    """How many positions the denoiser's passes give logits of."""
    counts, original = [], model.denoiser_pass

    def counted(*args):
        logits = original(*args)
        counts.append(logits.shape[:-1].numel())
        return logits

    monkeypatch.setattr(model, "denoiser_pass", counted)
    return counts


@pytest.mark.parametrize("rule", ["confidence", "margin", "entropy", "left_to_right", "posterior"])
@pytest.mark.parametrize("mode", ["mask_diffusion", "self_speculative"])
def test_the_head_computes_open_positions_alone_unless_they_are_recorded(model, mode, rule, monkeypatch):
    ids, positions = random_ids(3, 11), logits_of_passes(model, monkeypatch)
    knobs = {"mode": mode, "block_size": 8, "unmasking_rule": rule, "seed": 3, "max_new_tokens": 24}
    if mode == "self_speculative":
        knobs |= {"draft_length": 8, "draft_steps": 3}
    text = model.generate(ids, **knobs)
    some, positions[:] = list(positions), []
    recorded = model.generate(ids, **knobs, return_dict_in_generate=True)
    assert torch.equal(text, recorded.sequences)
    assert len(some) == len(positions) and sum(some) < sum(positions)
    assert all(size % 8 == 0 for size in positions)
    callback = model.generate(ids, **knobs, return_dict_in_generate=True, step_callback=lambda state: None)
    assert torch.equal(callback.confidences, recorded.confidences)


@pytest.mark.parametrize("watched", ["hook", "subclass", "class"])
def test_who_watches_or_replaces_the_head_or_the_pass_sees_all_positions(model, watched, monkeypatch):
    seen, positions = [], logits_of_passes(model, monkeypatch)
    own = type(model)
    original = own.denoise
    if watched == "hook":
        handle = model.lm_head.register_forward_hook(lambda module, inputs, logits: seen.append(logits.shape[:-1]))
    else:

        def denoise(self, block_ids, cache, timestep=None, attention_mask=None):
            seen.append(block_ids.shape)
            return original(self, block_ids, cache, timestep, attention_mask)

        if watched == "class":
            monkeypatch.setattr(own, "denoise", denoise)
        else:
            monkeypatch.setattr(model, "__class__", type("Other", (own,), {"denoise": denoise}))
    model.generate(random_ids(2, 9), mode="mask_diffusion", block_size=8, max_new_tokens=16)
    if watched == "hook":
        handle.remove()
    assert seen and positions == [rows * size for rows, size in seen] and {size for _, size in seen} == {8}


def test_positions_of_a_pass_are_asked_for_one_by_one_or_all(model):
    cache = model(random_ids(2, 9), use_cache=True).cache
    block, positions = random_ids(2, 6, seed=4), torch.tensor([11, 0, 7])
    some = model.denoise(block, cache, 0.5, positions=positions)
    torch.testing.assert_close(some, model.denoise(block, cache, 0.5).flatten(0, 1)[positions], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="attention_mask and positions were both given"):
        model.denoise(block, cache, 0.5, attention_mask=torch.ones_like(block), positions=positions)
    with pytest.raises(ValueError, match=r"positions are torch.float32 of shape \(3,\); give int64 of one dimension"):
        model.denoise(block, cache, 0.5, positions=positions.float())


def test_a_long_prompt_is_not_read_with_short_ones_and_waits_a_pass_at_most(model, monkeypatch):
    widths = []
    original = model.context_tower.forward
    monkeypatch.setattr(
        model.context_tower, "forward", lambda ids, *args, **kw: widths.append(ids.shape) or original(ids, *args, **kw)
    )
    for lengths in ([5, 300, 6, 7], [300, 5, 6, 7]):
        widths.clear()
        engine = TwoTowerEngine(model, slots=4)
        for number, length in enumerate(lengths):
            engine.add_request(random_ids(1, length, seed=number), mode="ar", max_new_tokens=1)
        while engine.step():
            pass
        assert sorted(map(tuple, widths)) == [(1, 300), (3, 7)]


def test_what_was_learnt_of_rows_leaves_with_them(model):
    engine = TwoTowerEngine(model, slots=2)
    first = int(model.generate(random_ids(1, 5), mode="ar", max_new_tokens=1)[0, -1])
    engine.add_request(random_ids(1, 5), mode="self_speculative", max_new_tokens=5, eos_token_id=first)
    gone = engine.add_request(random_ids(1, 6), mode="self_speculative", max_new_tokens=50)
    for _ in range(3):
        engine.step()
    gone.cancel()
    while engine.step():
        pass
    (controller,) = engine._engine.drafting.values()
    assert controller.by_row == {} and engine._engine.rows == []


# What is read back.

SYNCHRONISING = {
    "_local_scalar_dense",
    "nonzero",
    "is_nonzero",
    "item",
    "equal",
    "masked_select",
    "unique2",
    "_unique2",
}


class CountReads(TorchDispatchMode):
    """Operations that wait for the device, and calls of methods that read from it without one."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.reads = 0
        for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy"):
            self.count_method(name, getattr(torch.Tensor, name), monkeypatch)

    def count_method(self, name, original, monkeypatch):
        def counted(tensor, *args, **kwargs):
            before = self.reads
            answer = original(tensor, *args, **kwargs)
            self.reads = before + 1  # with what it dispatched
            return answer

        monkeypatch.setattr(torch.Tensor, name, counted)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1] or []
        )
        self.reads += name in SYNCHRONISING or by_mask
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [*MODES, "all"])
def test_the_host_reads_once_per_pass_and_never_within_one(model, mode, monkeypatch):
    engine, rng, within = TwoTowerEngine(model, slots=4), Random(1), []
    for number in range(9):
        own = MODES[number % 4] if mode == "all" else mode
        sampling = {**SAMPLED, "top_k": 5, "top_p": 0.9} if number % 2 else {}
        engine.add_request(random_ids(1, rng.randint(1, 30), seed=number), mode=own, max_new_tokens=9, **sampling)
    count = CountReads(monkeypatch)

    def watch(owner, method):
        original = getattr(owner, method)

        def watched(*args, **kwargs):
            before = count.reads
            answer = original(*args, **kwargs)
            within.append(count.reads - before)
            return answer

        monkeypatch.setattr(owner, method, watched)

    for owner, method in ((model, "denoise"), (model, "predict_next"), (model.context_tower, "forward")):
        watch(owner, method)
    with count:
        more = True
        while more:
            reads, passes = count.reads, sum(engine._engine.passes.values())
            more = engine.step()
            assert count.reads - reads <= sum(engine._engine.passes.values()) - passes
    assert count.reads > 0 and set(within) == {0}


# Rules that are functions.


def test_a_function_that_is_a_rule_gives_its_texts(model):
    ids = random_ids(3, 6)
    by_name = model.generate(ids, max_new_tokens=12, unmasking_rule="fixed", tokens_per_step=2, block_size=4)
    assert torch.equal(model.generate(ids, max_new_tokens=12, unmasking_rule=surest_two, block_size=4), by_name)


def test_a_rule_that_commits_nothing_is_overruled_by_the_last_step(model):
    output = model.generate(
        random_ids(1, 6),
        max_new_tokens=8,
        unmasking_rule=lambda prediction, masked, step, steps: masked & False,
        block_size=4,
        steps_per_block=3,
        return_dict_in_generate=True,
    )
    assert output.denoiser_forwards.tolist() == [6] and output.commit_steps.tolist() == [[2] * 8]


def test_a_rule_commits_nothing_but_what_is_masked(model):
    seen = []

    def all_of_it(prediction, masked, step, steps):
        seen.append((masked.clone(), step.tolist(), steps))
        return torch.ones_like(masked)

    starting = torch.tensor([[5, 3, 7, 3]])
    out = model.generate(random_ids(1, 6), max_new_tokens=4, unmasking_rule=all_of_it, starting_block=starting)
    assert [(masked.tolist(), step, steps) for masked, step, steps in seen] == [([[False, True] * 2], [0], 16)]
    assert out[0, [6, 8]].tolist() == [5, 7]


@pytest.mark.parametrize(
    "answer, said",
    [
        (lambda masked: None, "returned None"),
        (lambda masked: masked.float(), r"returned torch.float32 of shape \(1, 4\)"),
        (lambda masked: masked[:, 1:], r"returned torch.bool of shape \(1, 3\)"),
    ],
)
def test_a_wrong_answer_of_a_rule_is_an_error_of_its_request_alone(model, answer, said):
    engine = TwoTowerEngine(model, slots=2)
    wrong = engine.add_request(random_ids(1, 6), unmasking_rule=lambda p, masked, i, n: answer(masked), block_size=4)
    right = engine.add_request(random_ids(1, 6), max_new_tokens=6)
    while engine.step():
        pass
    with pytest.raises(ValueError, match=f"unmasking_rule {said}.*return torch.bool of shape"):
        wrong.result(0)
    assert torch.equal(right.result(0), model.generate(random_ids(1, 6), max_new_tokens=6))


# Drafts.


@SAMPLINGS
@pytest.mark.parametrize("length", [1, 2, 3, 4, "auto"])
def test_drafts_of_any_length_give_the_text_of_ar(model, length, sampling):
    ids = random_ids(3, 7)
    alone = model.generate(ids, mode="ar", max_new_tokens=15, **sampling)
    drafted = model.generate(ids, mode="self_speculative", draft_length=length, max_new_tokens=15, **sampling)
    assert torch.equal(drafted, alone)


def test_with_costs_given_two_calls_take_the_same_passes(model):
    def passes():
        output = model.generate(
            random_ids(3, 7), mode="self_speculative", max_new_tokens=40, return_dict_in_generate=True
        )
        return output.denoiser_forwards.tolist(), output.context_forwards.tolist()

    assert passes() == passes()


def relaxed(model, ids, new_tokens, ratio, size):
    """`acceptance_ratio` in mode "self_speculative", greedy, one draft step, as plainly as can be."""
    mask, prompt = model.config.mask_token_id, ids[0].tolist()
    tokens = [int(model(ids).logits[0, -1].argmax())]
    while len(tokens) < new_tokens:
        cache = TwoTowerCache(model.config)
        model.context_tower(torch.tensor([prompt + tokens[:-1]]), cache)
        canvas = torch.tensor([[tokens[-1]] + [mask] * (size - 1)])
        guess = model.denoise(canvas, cache, (size - 1) / size)
        guess[..., mask] = -torch.inf
        draft = guess[0, 1:].argmax(-1).tolist()
        scores = model(torch.tensor([prompt + tokens + draft])).logits[0, -size:].log_softmax(-1)
        for column in range(size):
            own = int(scores[column].argmax())
            if column == size - 1 or scores[column, draft[column]] < scores[column, own] + math.log(ratio):
                tokens.append(own)
                break
            tokens.append(draft[column])
    return prompt + tokens[:new_tokens]


@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.1, 0.01])
@torch.no_grad()
def test_relaxed_acceptance_is_what_a_plain_loop_does(model, ratio):
    kept = []
    for seed in range(2):
        ids = random_ids(1, 6, seed=seed)
        expected = relaxed(model, ids, 14, ratio, size=4)
        text = model.generate(ids, mode="self_speculative", acceptance_ratio=ratio, max_new_tokens=14, block_size=4)
        assert text[0].tolist() == expected
        kept.append(expected == model.generate(ids, mode="ar", max_new_tokens=14)[0].tolist())
    assert all(kept) if ratio == 1 else ratio > 0.05 or not all(kept)


@SAMPLINGS
def test_full_acceptance_is_exact(model, sampling):
    ids = random_ids(2, 9)
    exact = model.generate(ids, mode="self_speculative", acceptance_ratio=1.0, max_new_tokens=12, **sampling)
    assert torch.equal(exact, model.generate(ids, mode="ar", max_new_tokens=12, **sampling))


@pytest.mark.parametrize("processor", [{}, {"repetition_penalty": 1.3}])
def test_what_a_callback_leaves_open_of_a_draft_is_nothing_to_accept(model, processor):
    def veto(state):
        state.commit[:] = False

    ids, knobs = random_ids(3, 5), {"max_new_tokens": 12, **processor}
    text = model.generate(ids, mode="self_speculative", acceptance_ratio=1e-6, step_callback=veto, **knobs)
    assert torch.equal(text, model.generate(ids, mode="ar", **knobs))
