"""A compiled pass of each kind serves all widths of a bucket, ragged or not, and gives what an exact one does."""

import pytest
import torch
from tiny import random_block, random_ids, tiny_model
from tolerances import assert_close
from torch._dynamo.testing import CompileCounter

from twotower.cache_twotower import MambaState, TwoTowerCache
from twotower.modeling_twotower import ChunkLayout

ROWS, TOKENS, COLUMNS = 2, 4, 128
WIDTHS = [(8, 8), (8, 3), (40, 40), (57, 31), (64, 64), (88, 2), (100, 100), (113, 112), (124, 124)]


class Passes:
    """The kinds of passes as functions of tensors, and how often each was compiled."""

    def __init__(self, model):
        tower = model.context_tower

        def denoise(ids, lengths, pasts, timestep):
            return model.denoiser_pass(ids, pasts, lengths, timestep)

        def read(ids, lengths, slots):
            layout = ChunkLayout(context_lengths=lengths, causal=True, keep="update")
            hidden_states, updates = tower.run_layers(tower.embeddings(ids), slots, layout)
            return model.context_lm_head(hidden_states), updates

        def step(ids, lengths, slots):
            layout = ChunkLayout(context_lengths=lengths, causal=True)
            hidden_states, states = tower.run_layers(tower.embeddings(ids), slots, layout)
            write(slots, states)
            return model.context_lm_head(hidden_states)

        def accept(states, updates, counts):
            write(states, [each and each.apply(state, counts) for state, each in zip(states, updates, strict=True)])

        def write(states, new):
            for old, each in zip(states, new, strict=True):
                if isinstance(each, MambaState):
                    old.conv.copy_(each.conv)
                    old.ssm.copy_(each.ssm)

        self.counters = {}
        for function in (denoise, read, accept, step):
            counter = self.counters[function.__name__] = CompileCounter()
            setattr(self, function.__name__, torch.compile(function, backend=counter, fullgraph=True, dynamic=False))


def read_text(model, lengths) -> TwoTowerCache:
    """A cache of rows of such lengths beside one that is in no pass."""
    cache = TwoTowerCache(model.config)
    cache.add_rows(ROWS + 1)
    ids = random_ids(ROWS + 1, max(lengths))
    model.context_tower(ids, cache, [*lengths, 5])
    return cache


@pytest.mark.parametrize("geometry", ["all kinds", "pure attention", "odd"])
def test_one_graph_for_all_widths(geometry):
    torch._dynamo.reset()
    model = tiny_model(geometry)
    passes = Passes(model)
    block, ids, timestep = random_block(ROWS, TOKENS), random_ids(ROWS, TOKENS, seed=1), torch.tensor([0.3, 0.8])
    newest, counts = random_ids(ROWS, 1, seed=2), [1, 3]
    with torch.no_grad():
        for lengths in WIDTHS:
            cache, exact = read_text(model, lengths), read_text(model, lengths).part([0, 1])

            def part(cache=cache):
                return cache.part(slice(0, ROWS), room=COLUMNS - cache.width)

            fixed = part()
            assert fixed.columns == COLUMNS
            assert_close(
                passes.denoise(block, fixed.lengths, fixed.views(), timestep), model.denoise(block, exact, timestep)
            )
            # A chunk read tentatively, of which rows keep different counts.
            logits, updates = passes.read(ids, fixed.lengths, fixed.slots(ids))
            assert_close(logits, model.context_lm_head(model.context_tower(ids, exact, tentative=True)))
            passes.accept(fixed.views(), updates, torch.tensor(counts))
            fixed.append(ids, [], counts)
            exact.accept(counts)
            if fixed.width < COLUMNS:
                logits = passes.step(newest, fixed.lengths, fixed.slots(newest))
                fixed.append(newest, [])
                assert_close(logits, model.context_lm_head(model.context_tower(newest, exact)))
            # What eager passes make of the same parts.
            assert fixed.host_lengths == exact.host_lengths == cache.host_lengths[:ROWS]
            assert_close(model.denoise(block, fixed), model.denoise(block, exact))
            assert_close(model.denoise(block, cache.part([0, 1])), model.denoise(block, exact))
            assert cache.host_lengths[ROWS] == 5
    kinds = (
        ("denoise", "read", "accept", "step") if "M" in model.config.hybrid_override_pattern else ("denoise", "read")
    )
    assert {kind: passes.counters[kind].frame_count for kind in kinds} == dict.fromkeys(kinds, 1)


def test_states_of_a_part_with_room_stay_where_they_are():
    model = tiny_model("all kinds")
    cache = read_text(model, (9, 4))
    part = cache.part(slice(0, ROWS), room=20)
    places = [part.data_ptr() for held in cache.views() for part in held or ()]
    with torch.inference_mode():
        for _ in range(3):
            model.context_tower(random_ids(ROWS, 4), part, tentative=True)
            part.accept([2, 0])
            model.context_tower(random_ids(ROWS, 1), part)
    assert [part.data_ptr() for held in cache.views() for part in held or ()] == places
    assert part.host_lengths == [18, 7]


def test_what_a_part_has_no_room_for_is_refused():
    model = tiny_model("all kinds")
    cache = TwoTowerCache(model.config)
    cache.add_rows(2)
    with pytest.raises(ValueError, match="a part with room was asked for of a cache that has read nothing yet"):
        cache.part([0], room=4)
    model.context_tower(random_ids(2, 60), cache)
    part = cache.part([0], room=4)
    assert part.columns == 64
    for tentative in (False, True):
        with pytest.raises(ValueError, match="5 tokens behind 60 do not fit in the 64 columns of this part"):
            model.context_tower(random_ids(1, 5), part, tentative=tentative)
    model.context_tower(random_ids(1, 4), part)
    assert cache.part([0], room=4).columns == 128
