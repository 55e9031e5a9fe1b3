"""Towers on several cards, which here exist in name: the text is that of one device, and what crosses is counted."""

import copy
import pickle
from contextlib import contextmanager
from random import Random

import fake_graphs
import pytest
import torch
from accelerate import cpu_offload
from cards import Cards
from golden_cases import assert_golden_generations
from mixed_requests import differences, mixed_model, mixed_request
from tiny import random_block, random_ids, tiny_config, tiny_model, without_special_tokens

from twotower import Stateless, TwoTowerEngine, TwoTowerForBlockDiffusion
from twotower.cache_twotower import KeyValues, MambaState, TwoTowerCache
from twotower.checkpoints.placement import towers_device_map
from twotower.decoding import compiled
from twotower.generation_twotower import MODES
from twotower.mirror_twotower import views_on
from twotower.modeling_twotower import TwoTowerMamba, TwoTowerRouter

CARDS = [f"privateuseone:{number}" for number in range(4)]
FIRST, SECOND = (torch.device(card) for card in CARDS[:2])
PROMPTS, MASK = random_ids(4, 20), torch.ones(4, 20, dtype=torch.long)
MASK[1, :7] = MASK[3, :15] = 0
KNOBS = {"attention_mask": MASK, "max_new_tokens": 9, "draft_length": 4}
DRAFTS = ("mask_diffusion", "self_speculative")  # where rows take different numbers of tokens
OPTIONS = {
    "greedy": {},
    "drawn": {"do_sample": True, "seed": 7, "temperature": 1.2, "top_k": 20, "top_p": 0.9},
    "with a tensor of its own": {"do_sample": True, "seed": 7, "eta_cutoff": 0.0003},
    "text is read": {"repetition_penalty": 1.5},
    "all recorded": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
}


def model_on(cards: Cards, count: int, main: int = 0, **fields):
    model = without_special_tokens(tiny_model("each kind once", **fields))
    cards.place(model, towers_device_map(model, CARDS[:count]), CARDS[main])
    return model


def knobs(mode: str) -> dict:
    return (
        KNOBS if mode == "self_speculative" else {name: KNOBS[name] for name in ("attention_mask", "max_new_tokens")}
    )


def test_what_is_on_different_cards_cannot_be_mixed():
    with Cards() as cards:
        here, there = torch.ones(3, device=FIRST), torch.ones(3, device=SECOND)
        assert (here.device, there[1:].device, here.new_zeros(2).device) == (FIRST, SECOND, FIRST)
        for mix in (lambda: here + there, lambda: torch.cat([here, there]), lambda: here[there.long()]):
            with pytest.raises(RuntimeError, match="privateuseone"):
                mix()
        cards.crossings.clear()
        assert (here + there.to(FIRST)).tolist() == [2.0] * 3
        assert [(each.source, each.bytes) for each in cards.crossings] == [(str(SECOND), 12), (str(FIRST), 12)]


# The text.


@pytest.mark.parametrize("mode", MODES)
def test_one_card(mode):
    """Rows of different lengths, with no hooks that bring tensors together."""
    plain = without_special_tokens(tiny_model("each kind once"))
    expected = plain.generate(PROMPTS, mode=mode, **knobs(mode))
    with Cards() as cards:
        model = without_special_tokens(tiny_model("each kind once"))
        cards.put_model(model, FIRST)
        assert torch.equal(model.generate(PROMPTS, mode=mode, **knobs(mode)).cpu(), expected)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_goldens_token_for_token_with_their_passes(goldens, count):
    with Cards() as cards:
        model = TwoTowerForBlockDiffusion.from_pretrained(goldens / "checkpoint")
        cards.place(model, towers_device_map(model, CARDS[:count]), CARDS[0])
        assert_golden_generations(model, goldens)


@pytest.mark.parametrize("mode", MODES)
def test_processors_that_are_asked_find_a_prompt_of_the_hosts_on_the_card(mode):
    asked = Stateless(lambda ids, scores: scores.index_fill(1, ids[0, -1:], -3.0))  # position by position
    flags = {
        "encoder_repetition_penalty": 1.5,
        "eos_token_id": [7, 9],
        "min_new_tokens": 4,
        "logits_processor": [asked],
    }
    plain = without_special_tokens(tiny_model("each kind once"))
    expected = plain.generate(PROMPTS, mode=mode, pad_token_id=0, **flags, **knobs(mode))
    with Cards() as cards:
        model = without_special_tokens(tiny_model("each kind once"))
        cards.put_model(model, FIRST)
        found = model.generate(PROMPTS, mode=mode, pad_token_id=0, **flags, **knobs(mode))
        assert found.device == FIRST
        assert torch.equal(found.cpu(), expected)


def test_one_card_whose_cache_compiled_passes_have_read_first(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **arguments: function)
    plain, again = without_special_tokens(tiny_model("each kind once")), torch.ones(4, 3, dtype=torch.long)

    def second_turn(model, **first):
        output = model.generate(PROMPTS, return_dict_in_generate=True, **first, **knobs("ar"))
        ids, mask = torch.cat([output.sequences.cpu(), again + 5], 1), torch.ones_like(output.sequences.cpu())
        mask[:, : MASK.shape[1]] = MASK
        mask = torch.cat([mask, again], 1)
        return model.generate(ids, attention_mask=mask, cache=output.cache, mode="ar", max_new_tokens=4).cpu()

    expected = second_turn(plain, mode="ar")
    with Cards() as cards:
        model = without_special_tokens(tiny_model("each kind once"))
        cards.put_model(model, FIRST)
        assert torch.equal(second_turn(model, mode="ar", compile=True), expected)


@pytest.fixture
def graphs(monkeypatch):
    return fake_graphs.put_in_place(monkeypatch)


def test_goldens_by_recorded_passes_of_towers_on_two_cards(goldens, graphs):
    with Cards() as cards:
        model = TwoTowerForBlockDiffusion.from_pretrained(goldens / "checkpoint")
        cards.place(model, towers_device_map(model, CARDS[:2]), CARDS[0])
        assert_golden_generations(model, goldens, compile=True)
    assert graphs.made > 10


@pytest.mark.parametrize("option", ["greedy", "drawn", "all recorded", "text is read"])
@pytest.mark.parametrize("mode", MODES)
def test_recorded_passes_of_towers_on_two_cards(mode, option, graphs):
    """Calls after the first record nothing, and the cache that each returns has no mirror, which is the next one's."""
    arguments = {"mode": mode, **knobs(mode), **OPTIONS[option], "return_dict_in_generate": True}
    plain, made = without_special_tokens(tiny_model("each kind once")), []
    expected = plain.generate(PROMPTS, **arguments)
    with Cards() as cards:
        model = model_on(cards, 2)
        for _ in range(3):
            output = model.generate(PROMPTS, compile=True, **arguments)
            made.append(graphs.made)
            assert torch.equal(output.sequences.cpu(), expected.sequences)
            assert output.denoiser_forwards.tolist() == expected.denoiser_forwards.tolist()
            assert output.cache.mirror is None
    assert 0 < made[0] == made[-1]


@pytest.mark.parametrize("mode", ["mask_diffusion", "mock_ar"])
def test_bytes_of_recorded_passes_do_not_grow_with_the_context(mode, graphs):
    per_pass = {"unmasking_rule": "fixed", "tokens_per_step": 2} if mode == "mask_diffusion" else {}
    crossed = []
    with Cards() as cards:
        model = model_on(cards, 2)
        for length in (300, 400):  # which look at as many columns
            for tokens in (8, 8, 16):
                cards.crossings.clear()
                model.generate(random_ids(1, length), mode=mode, max_new_tokens=tokens, compile=True, **per_pass)
                crossed.append(cards.between(*CARDS))
    assert 0 < crossed[2] - crossed[1] == crossed[5] - crossed[4]


def test_what_depends_on_weights_that_stay_is_prepared_once():
    with Cards() as cards:
        model = model_on(cards, 2)
        layers = [module for module in model.modules() if isinstance(module, TwoTowerMamba | TwoTowerRouter)]
        with model.prepared():
            assert len(layers) >= 4 and all(layer._prepared is not None for layer in layers)
        assert all(layer._prepared is None for layer in layers)


@pytest.mark.parametrize("count", [3, 4])
def test_a_tower_on_two_cards_is_not_recorded(count, graphs):
    with Cards() as cards, pytest.raises(ValueError, match="needs all weights to stay on one device"):
        model_on(cards, count).generate(PROMPTS, compile=True, **knobs("ar"))


def test_nor_what_is_offloaded_or_partly_on_the_host(graphs, monkeypatch):
    refused = pytest.raises(ValueError, match="needs all weights to stay on one device")
    offloaded = cpu_offload(tiny_model("base"))
    with refused:
        offloaded.generate(PROMPTS, compile=True, **knobs("ar"))
    monkeypatch.setattr(compiled, "records_passes", lambda config, device: device.type != "cpu")
    with Cards() as cards, refused:
        model = tiny_model("base")
        cards.put_model(model.context_tower, FIRST)
        model.generate(PROMPTS, compile=True, **knobs("ar"))


@pytest.mark.parametrize(
    ("mode", "option", "count"),
    [(mode, option, count) for mode in MODES for option, count in (("greedy", 2), ("drawn", 3), ("all recorded", 2))]
    + [(mode, option, 2) for mode in DRAFTS for option in ("text is read", "with a tensor of its own")]
    + [("mask_diffusion", "greedy", 4), ("ar", "greedy", 4), ("self_speculative", "all recorded", 3)],
)
def test_the_text_is_that_of_one_device(mode, option, count):
    plain = without_special_tokens(tiny_model("each kind once"))
    arguments = {"mode": mode, **knobs(mode), **OPTIONS[option]}
    expected = plain.generate(PROMPTS, **arguments)
    with Cards() as cards:
        output = model_on(cards, count, main=1).generate(PROMPTS, **arguments)
        if not isinstance(expected, torch.Tensor):
            output.cache.__dict__["mirror"] = None
            assert differences(_on_host(output), expected) == []
        else:
            assert torch.equal(output.cpu(), expected)


def _on_host(output):
    """Its numbers, which the host can compare."""
    for name in ("scores", "logits"):
        setattr(output, name, tuple(each.cpu() for each in getattr(output, name)))
    for name in ("sequences", "confidences", "log_probs"):
        setattr(output, name, getattr(output, name).cpu())
    output.cache.__dict__["uploaded"] = None
    output.cache.__dict__["device"] = torch.device("cpu")
    return output


@pytest.mark.parametrize("mode", MODES)
def test_a_second_turn(mode):
    plain, more = without_special_tokens(tiny_model("each kind once")), random_ids(4, 6, seed=3)

    def two_turns(model):
        first = model.generate(PROMPTS, mode=mode, **knobs(mode), return_dict_in_generate=True, eos_token_id=[7, 30])
        text = torch.cat([first.sequences.cpu(), more], dim=1)
        mask = torch.cat([MASK, (~first.confidences.cpu().isnan()).long(), torch.ones_like(more)], dim=1)
        arguments = {**knobs(mode), "attention_mask": mask, "cache": first.cache}
        return text, model.generate(text, mode=mode, **arguments).cpu()

    plain.generation_config.pad_token_id = 0
    expected = two_turns(plain)
    with Cards() as cards:
        model = model_on(cards, 2)
        model.generation_config.pad_token_id = 0
        for theirs, ours in zip(expected, two_turns(model), strict=True):
            assert torch.equal(ours, theirs)


def test_a_callback_sees_its_tensors_beside_the_prompt():
    seen, plain = [], without_special_tokens(tiny_model("each kind once"))
    expected = plain.generate(PROMPTS, **knobs("ar"), step_callback=lambda step: None)
    with Cards() as cards:
        model = model_on(cards, 2)
        output = model.generate(PROMPTS, **knobs("ar"), step_callback=lambda step: seen.append(step.logits.device))
        assert set(seen) == {FIRST}
        assert torch.equal(output.cpu(), expected)


@pytest.mark.parametrize(("count", "seed", "recorded"), [(1, 0, 0), (2, 1, 0), (3, 2, 0), (2, 3, 1), (2, 4, 2 / 3)])
def test_rows_that_come_and_go(seed, count, recorded, request):
    """`recorded` is the share of requests that ask for recorded passes; others then share their cache."""
    graphs = request.getfixturevalue("graphs") if recorded else None
    rng, plain, wanted = Random(seed), mixed_model(), []
    with Cards() as cards:
        model = mixed_model()
        if count == 1:
            cards.put_model(model, FIRST)
        else:
            cards.place(model, towers_device_map(model, CARDS[:count]), CARDS[0])
        engine = TwoTowerEngine(model, slots=rng.choice([3, 5]))
        for _ in range(9):
            request = mixed_request(rng, most_new_tokens=7)
            records = recorded > 0 and rng.random() < recorded
            handle = engine.add_request(request.ids, **request.arguments(), compile=records)
            wanted.append((request, handle))
            for _ in range(rng.randint(0, 3)):
                engine.step()
        while engine.step():
            pass
        got = [handle.result(0) for _, handle in wanted]
        texts = [each.cpu() if isinstance(each, torch.Tensor) else each.sequences.cpu() for each in got]
    for (request, _), text in zip(wanted, texts, strict=True):
        expected = plain.generate(request.ids, **request.arguments())
        assert torch.equal(text, expected if isinstance(expected, torch.Tensor) else expected.sequences), request
    assert graphs is None or graphs.made > 3


@pytest.mark.parametrize(("count", "main"), [(2, 0), (2, 1), (3, 1)])
def test_forward_and_denoise(count, main):
    """Also where the card that inputs are brought to is not that of the context tower."""
    plain, block = without_special_tokens(tiny_model("each kind once")), random_block(4, 4)
    block_mask = torch.ones_like(block)
    block_mask[0, 3] = 0

    def results(model):
        with torch.no_grad():
            read = model(PROMPTS, MASK, labels=PROMPTS.masked_fill(MASK == 0, -100)).loss, model(PROMPTS, MASK)
        denoised = [
            model.denoise(block, read[1].cache),
            model.denoise(block, read[1].cache, attention_mask=block_mask),
            model.predict_next(block[:, :1], read[1].cache),
        ]
        with torch.no_grad():
            denoised.append(model.denoise(block, read[1].cache))
        return [read[0].cpu(), read[1].logits.cpu(), *(each.detach().cpu() for each in denoised)]

    expected = results(plain)
    with Cards() as cards:
        for theirs, ours in zip(expected, results(model_on(cards, count, main)), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)


# The bytes.


@pytest.fixture(scope="module")
def read_caches():
    """A model, and per length of the context what it has read; on the CPU, where long prompts cost less."""
    model = without_special_tokens(tiny_model("base", hybrid_override_pattern="M*E", chunk_size=64, **FEW_HEADS))
    caches = {}
    for length in LENGTHS:
        with torch.no_grad():
            caches[length] = model(random_ids(1, length), logits_to_keep=1).cache
    return model, caches


FEW_HEADS = {"num_attention_heads": 1, "num_key_value_heads": 1}
LENGTHS = (1024, 8192, 32768)
KEY_VALUE, CONV, SSM = 2 * 8 * 4, 3 * (32 + 2 * 2 * 8) * 4, 4 * 8 * 8 * 4  # bytes per token, and of a row's states


def test_bytes_between_the_towers_do_not_grow_with_the_context(read_caches):
    """Filled once; then, per block, its keys and values and the states after it, and per pass some numbers."""
    model, caches = read_caches
    block, passes, crossed = random_block(1, 4), 3, []
    with Cards() as cards, torch.no_grad():
        placed = copy.deepcopy(model)
        cards.place(placed, towers_device_map(placed, CARDS[:2]), CARDS[0])
        for length, cache in caches.items():
            cache = cards.adopt(copy.deepcopy(cache), FIRST)
            cards.crossings.clear()
            placed.denoise(block, cache)
            filling = cards.between(*CARDS[:2])
            assert filling == length * KEY_VALUE + CONV + SSM
            for _ in range(2):
                placed.context_tower(random_ids(1, 4), cache)
                cards.crossings.clear()
                for _ in range(passes):
                    placed.denoise(block, cache)
                crossed.append(cards.between(*CARDS[:2]))
    assert len(set(crossed)) == 1
    news = 4 * KEY_VALUE + CONV + SSM
    assert news <= crossed[0] <= news + passes * 100
    assert 100 * crossed[0] < 32768 * KEY_VALUE


@pytest.mark.parametrize("mode", ["mask_diffusion", "self_speculative", "mock_ar"])
def test_bytes_of_generate_do_not_grow_with_the_context(read_caches, mode):
    """Two more blocks cost the same at every length, all passes of the engine and what the host hears counted."""
    model, caches = read_caches
    per_pass = {"unmasking_rule": "fixed", "tokens_per_step": 2} if mode == "mask_diffusion" else {"draft_length": 4}
    crossed = {}
    with Cards() as cards:
        placed = copy.deepcopy(model)
        cards.place(placed, towers_device_map(placed, CARDS[:2]), CARDS[0])
        for length, cache in caches.items():
            text = torch.cat([random_ids(1, length), random_ids(1, 1, seed=1)], dim=1)
            bytes_after = []
            for new_tokens in (8, 16):
                held = cards.adopt(copy.deepcopy(cache), FIRST)
                cards.crossings.clear()
                output = placed.generate(
                    text, mode=mode, cache=held, max_new_tokens=new_tokens, return_dict_in_generate=True, **per_pass
                )
                passes = int(output.denoiser_forwards), int(output.context_forwards)
                bytes_after.append((cards.between(*CARDS[:2], "cpu"), *passes))
            crossed[length] = [more - less for less, more in zip(*bytes_after, strict=True)]
    for length in LENGTHS:
        more, denoised, read = crossed[length]
        assert more <= read * (CONV + SSM + 5 * KEY_VALUE) + (denoised + read) * 700, (length, crossed)
    assert mode == "self_speculative" or crossed[LENGTHS[0]] == crossed[LENGTHS[-1]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [2, 3])
def test_logits_stay_where_they_are(mode, count):
    """Unless they are wanted, nothing crosses that is as large as the logits of one token."""
    for wanted in (False, True):
        with Cards() as cards:
            model = model_on(cards, count, vocab_size=4800)
            model.generate(PROMPTS, mode=mode, **knobs(mode), return_dict_in_generate=True, output_logits=wanted)
            assert (max(each.bytes for each in cards.crossings) >= 4800 * 4) == (
                # On two cards, the context tower's logits are beside the prompt anyway.
                wanted and (count, mode) != (2, "ar")
            )


# The mirror itself.


def read(cache: TwoTowerCache, tokens: int, rng: Random) -> None:
    """A chunk of random keys, values and states, of which rows may have fewer tokens, or none."""
    rows, counts = cache.batch_size, [rng.randint(0, tokens) for _ in range(cache.batch_size)]
    slots, presents = cache.slots(torch.zeros(rows, tokens, dtype=torch.long, device=FIRST)), []
    generator = torch.Generator().manual_seed(rng.randrange(2**31))

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(FIRST)

    for kind, slot in zip(KINDS, slots, strict=True):
        if kind == "full_attention":
            slot.update(KeyValues(drawn(rows, 2, tokens, 3), drawn(rows, 2, tokens, 3)))
            presents.append(None)
        else:
            new = MambaState(drawn(rows, 3, 5), drawn(rows, 2, 3, 4))
            for row in (row for row, count in enumerate(counts) if count == 0):
                for part, before in zip(new, slot or new, strict=True):
                    part[row] = before[row] if slot else 0
            presents.append(new)
    cache.append(torch.zeros(rows, tokens), presents, counts)


CONFIG = tiny_config("base", hybrid_override_pattern="*M*")
KINDS = CONFIG.layers_block_type


def assert_mirrored(cache: TwoTowerCache) -> None:
    """What counts is the same on the other card; at layer 2, which computes at home, there is no other."""
    theirs = cache.views()
    ours = views_on(cache, [SECOND, SECOND, FIRST])
    if cache.width == 0:
        return
    assert [each[0].device for each in ours] == [SECOND, SECOND, FIRST]
    assert ours[2].key.data_ptr() == theirs[2].key.data_ptr() or not isinstance(cache.rows, slice)
    for one, other in zip(ours, theirs, strict=True):
        for ours_part, theirs_part in zip(one, other, strict=True):
            assert ours_part.shape == theirs_part.shape
            for row, length in enumerate(cache.host_lengths):
                counted = (row,) if isinstance(one, MambaState) else (row, slice(None), slice(0, length))
                assert torch.equal(ours_part[counted].cpu(), theirs_part[counted].cpu())
            assert ours_part.cpu().isfinite().all()


@contextmanager
def without_gradients():
    with Cards() as cards, torch.no_grad():
        yield cards


def filled_cache(rng: Random, rows: int = 3, tokens: int = 70) -> TwoTowerCache:
    cache = TwoTowerCache(CONFIG)
    cache.add_rows(rows)
    read(cache, tokens, rng)
    return cache


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_done_to_rows(seed):
    rng = Random(seed)
    with without_gradients():
        cache = filled_cache(rng)

        def fail():
            with pytest.raises(KeyError), cache.undone_on_error():
                for _ in range(rng.randint(1, 3)):
                    rng.choice(deeds)()
                    if rng.random() < 0.5:
                        assert_mirrored(cache)
                raise KeyError

        def part():
            rows = rng.sample(range(cache.batch_size), rng.randint(1, cache.batch_size))
            room = rng.choice([None, 5, 200])
            some = cache.part(slice(0, len(rows)) if rng.random() < 0.3 else rows, room)
            assert_mirrored(some)
            read(some, rng.randint(1, 4), rng)
            assert_mirrored(some)

        def swap():
            if cache.batch_size > 1:
                cache.swap_rows(*rng.sample(range(cache.batch_size), 2))

        def drop():
            cache.drop_rows(rng.randint(0, cache.batch_size - 1))

        def select():
            cache.select_rows([rng.randrange(cache.batch_size) for _ in range(rng.randint(1, 4))])

        def replace():
            cache.replace_rows([cache.copy_rows([0]), cache.copy_rows(range(cache.batch_size))])

        deeds = [
            lambda: read(cache, rng.choice([1, 4, 4, 90]), rng),
            lambda: cache.add_rows(rng.randint(1, 2)),
            *(part, swap, drop, select, replace),
        ]
        for _ in range(25):
            rng.choice([*deeds, fail])()
            if rng.random() < 0.6:
                assert_mirrored(cache)


def test_each_token_crosses_once():
    rng = Random(0)
    with without_gradients() as cards:
        cache = filled_cache(rng)
        assert_mirrored(cache)

        def crossed() -> int:
            cards.crossings.clear()
            views_on(cache, [SECOND, SECOND, FIRST])
            return cards.between(*CARDS[:2])

        assert crossed() == 0
        cache.swap_rows(0, 2)
        cache.select_rows([2, 1, 0])
        assert crossed() == 0
        before = sum(cache.host_lengths)
        read(cache, 4, rng)
        tokens, rows = sum(cache.host_lengths) - before, 3  # whose states are new
        assert crossed() == tokens * 2 * 2 * 3 * 4 + rows * (3 * 5 + 2 * 3 * 4) * 4
        cache.drop_rows(1)
        cache.add_rows(1)
        assert crossed() == (3 * 5 + 2 * 3 * 4) * 4, "a new row has no tokens"


def test_what_a_row_left_behind_does_not_touch_the_next():
    with without_gradients():
        cache = filled_cache(Random(0))
        for layer in cache.layers:
            for part in getattr(layer, "buffers", None) or layer.state:
                part[2] = torch.nan
        views_on(cache, [SECOND, SECOND, FIRST])
        cache.drop_rows(1)
        cache.add_rows(1)
        assert_mirrored(cache)


@pytest.mark.parametrize("tokens", [70, 90])
def test_a_row_in_the_place_of_another_is_fetched_whole(tokens):
    """Also where nobody has looked at it before it is as long as the other was, or longer."""
    with without_gradients():
        cache = filled_cache(Random(0), rows=1)
        (length,) = cache.host_lengths
        assert_mirrored(cache)
        cache.drop_rows(1)
        cache.add_rows(1)
        rng = Random(1)
        while cache.host_lengths[0] < length + tokens - 70:
            read(cache, 1, rng)
        assert_mirrored(cache)


def test_a_row_that_goes_where_there_is_no_room_yet():
    """To the place of a row that was added since anybody looked."""
    with without_gradients():
        cache = filled_cache(Random(0))
        assert_mirrored(cache)
        cache.add_rows(1)
        cache.swap_rows(0, 3)
        assert_mirrored(cache)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies_have_no_mirror(copied):
    cache = filled_cache_with_mirror()
    assert copied(cache).mirror is None
    assert cache.mirror is not None


def filled_cache_with_mirror() -> TwoTowerCache:
    with without_gradients():
        cache = filled_cache(Random(0))
        views_on(cache, [SECOND] * 3)
        return cache


def test_gradients_pass_through_what_is_moved():
    with Cards():
        cache = filled_cache(Random(0))
        assert [each[0].device for each in views_on(cache, [SECOND] * 3)] == [FIRST] * 3
        assert cache.mirror is None


def test_rows_that_have_changed_are_refused():
    with without_gradients():
        cache = filled_cache(Random(0))
        part = cache.part([1])
        cache.swap_rows(0, 1)
        with pytest.raises(ValueError, match="take a new part"):
            views_on(part, [SECOND] * 3)


def test_a_denoiser_that_moves_is_followed():
    with without_gradients():
        cache = filled_cache(Random(0))
        assert_mirrored(cache)
        third = torch.device(CARDS[2])
        assert [each[0].device for each in views_on(cache, [third] * 3)] == [third] * 3
        assert_mirrored(cache)


def test_one_device_has_no_mirror():
    model = without_special_tokens(tiny_model("each kind once"))
    cache = model.generate(PROMPTS, return_dict_in_generate=True, **knobs("ar")).cache
    assert cache.mirror is None
