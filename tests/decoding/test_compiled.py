"""`generate(..., compile=True)`: the texts of eager passes, by programs whose inputs never change their shapes."""

import copy
import pickle

import pytest
import torch
from golden_cases import assert_golden_generations
from mixed_requests import MODES, differences
from programs import IDS, MASK, SAMPLED, assert_mixed_requests_get_what_they_get_alone, small_model, text_of
from tiny import random_block, random_ids, tiny_model, without_special_tokens
from tolerances import assert_close
from torch.utils._pytree import tree_map
from transformers import CompileConfig, GenerationConfig
from transformers.utils import logging

from twotower import TwoTowerEngine
from twotower.cache_twotower import KeyValues, TwoTowerCache
from twotower.decoding import buffers, compiled
from twotower.decoding.buffers import padded_size
from twotower.decoding.compiled import CompiledPasses, compile_arguments
from twotower.decoding.programs import programs_of
from twotower.modeling_twotower import TwoTowerForBlockDiffusion


class Shapes:
    """Stands in for `torch.compile`: runs programs as they are, but refuses what torch would compile them anew for."""

    def __init__(self):
        self.programs, self.calls = [], 0

    def __call__(self, function, **arguments):
        self.programs.append(function.__name__)
        first = []

        def run(model, *inputs):
            self.calls += 1
            found = tree_map(_description, inputs)
            first.append(found)
            assert found == first[0], f"{function.__name__} was given {found}, at first {first[0]}"
            assert not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
            return function(model, *inputs)

        return run


def _description(value):
    if not isinstance(value, torch.Tensor):
        return value
    return tuple(value.shape), value.stride(), value.dtype, value.requires_grad, value.is_inference()


@pytest.fixture
def shapes(monkeypatch):
    stand_in = Shapes()
    monkeypatch.setattr(torch, "compile", stand_in)
    return stand_in


class Graphs:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self):
        self.count = 0

        def backend(graph, inputs):
            self.count += 1
            return graph.forward

        self.flags = {"compile": True, "compile_config": CompileConfig(fullgraph=True, backend=backend)}


# Texts, by programs that are no more than checked for their shapes.


@pytest.mark.parametrize(
    "geometry, mode, sampling",
    [
        *(("each kind once", mode, sampling) for mode in MODES for sampling in ({}, SAMPLED)),
        *(("odd", mode, SAMPLED) for mode in MODES),
        *((each, "self_speculative", {}) for each in ("pure attention", "pure Mamba", "only E", "convolution of 1")),
    ],
)
def test_texts_passes_and_caches_are_those_of_eager_passes(geometry, mode, sampling, shapes):
    model = without_special_tokens(tiny_model(geometry))
    eager = text_of(model, mode, **sampling)
    assert not shapes.programs
    for _ in range(2):
        output = text_of(model, mode, compile=True, **sampling)
        assert not differences(output, eager)
        assert torch.equal(output.denoiser_forwards, eager.denoiser_forwards)
        assert torch.equal(output.context_forwards, eager.context_forwards)
        for held, expected in zip(output.cache.views(), eager.cache.views(), strict=True):
            for row, length in enumerate(eager.cache.host_lengths):
                for part, other in zip(held or (), expected or (), strict=True):
                    columns = slice(length) if part.shape[2] == eager.cache.width else slice(None)
                    assert_close(part[row][:, columns], other[row][:, columns], slack=10)
    assert len(shapes.programs) == len(set(shapes.programs)) == len(model._kept_programs) > 0


@pytest.mark.parametrize("mode", MODES)
def test_rows_that_end_leave_the_others_and_their_own_caches_alone(mode, shapes):
    model = without_special_tokens(tiny_model("each kind once"))
    ids, ends = random_ids(7, 9), list(range(20, 26))
    flags = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "eos_token_id": ends, "max_new_tokens": 20}
    eager = text_of(model, mode, **flags)
    output = text_of(model, mode, compile=True, **flags)
    assert not differences(output, eager)
    # A second turn finds what it would have found.
    for cache in (output.cache, eager.cache):
        assert cache.host_lengths == eager.cache.host_lengths
    block = random_block(7, 4)
    with torch.no_grad():
        assert_close(model.denoise(block, output.cache, 0.5), model.denoise(block, eager.cache, 0.5))


def test_a_second_turn_may_be_compiled_and_the_first_eager_and_the_other_way_round(shapes):
    model = without_special_tokens(tiny_model("each kind once"))
    texts = []
    for turns in ((False, False), (True, True), (False, True), (True, False)):
        cache, ids = None, IDS
        for compile in turns:
            flags = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "compile": compile, "cache": cache}
            output = text_of(model, "self_speculative", **flags)
            cache, ids = output.cache, torch.cat([output.sequences, random_ids(3, 5, seed=1)], dim=1)
        texts.append(output.sequences)
    assert all(torch.equal(text, texts[0]) for text in texts)


def test_goldens_token_for_token_with_their_passes(goldens, shapes):
    model = TwoTowerForBlockDiffusion.from_pretrained(goldens / "checkpoint")
    assert_golden_generations(model, goldens, compile=True)
    assert shapes.calls > 100


def test_mixed_requests_that_join_and_leave_get_what_they_get_alone(shapes):
    assert_mixed_requests_get_what_they_get_alone(30, made=lambda: len(shapes.programs))
    assert len(shapes.programs) == len(set(shapes.programs)) and shapes.calls > 30


def test_code_of_the_users_is_asked_what_it_is_asked_beside_eager_passes(shapes):
    model = without_special_tokens(tiny_model("each kind once"))

    def run(compile):
        seen = []

        def processor(ids, scores):
            seen.append(ids.tolist())
            return scores

        def callback(step):
            seen.append((step.rows.tolist(), step.ids.tolist(), step.commit.tolist()))
            step.commit[:, -1] = False
            if step.step == step.steps - 1:
                step.commit[:] = True

        text = text_of(model, "mask_diffusion", compile=compile, step_callback=callback)
        with_processor = text_of(
            model, "self_speculative", compile=compile, logits_processor=[processor], repetition_penalty=1.5
        )
        return text.sequences.tolist(), with_processor.sequences.tolist(), seen

    assert run(True) == run(False) and shapes.calls > 10


def test_a_long_prompt_is_read_in_pieces_by_few_programs(shapes, monkeypatch):
    monkeypatch.setattr(compiled, "MOST_TOKENS", 8)
    model = without_special_tokens(tiny_model("each kind once"))
    for length in (5, 8, 9, 21, 40, 33):
        ids = random_ids(2, length)
        flags = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        flags["attention_mask"][0, : length // 3] = 0
        output, eager = text_of(model, "ar", compile=True, **flags), text_of(model, "ar", **flags)
        assert not differences(output, eager) and torch.equal(output.context_forwards, eager.context_forwards)
    assert set(shapes.programs) == {f"reading_2x{tokens}x256" for tokens in (1, 2, 8)}


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_chunks_of_prompts(chunk, shapes):
    model = without_special_tokens(tiny_model("each kind once"))
    eager = text_of(model, "mask_diffusion", prefill_chunk_size=chunk)
    assert not differences(text_of(model, "mask_diffusion", prefill_chunk_size=chunk, compile=True), eager)


def test_what_fails_in_a_call_leaves_the_callers_cache_as_it_was(shapes):
    model = without_special_tokens(tiny_model("each kind once"))
    output = text_of(model, "self_speculative")
    cache = output.cache
    before = [[part.clone() for part in held or ()] for held in cache.views()]
    lengths, turn, calls = list(cache.host_lengths), random_ids(3, 40, seed=2), []

    def fails(ids, scores):
        calls.append(1)
        if len(calls) == 9:
            raise InterruptedError
        return scores

    longer = torch.cat([output.sequences, turn], dim=1)
    mask = torch.cat([MASK, torch.ones_like(longer[:, MASK.shape[1] :])], dim=1)
    flags = {"input_ids": longer, "attention_mask": mask, "cache": cache}
    with pytest.raises(InterruptedError):
        text_of(model, "self_speculative", compile=True, logits_processor=[fails], **flags)
    assert cache.host_lengths == lengths and cache.tentative == 0
    for held, expected in zip(cache.views(), before, strict=True):
        assert all(torch.equal(part, other) for part, other in zip(held or (), expected, strict=True))
    assert torch.equal(
        text_of(model, "ar", compile=True, **flags).sequences,
        text_of(model, "ar", **{**flags, "cache": None}).sequences,
    )


def test_a_cache_that_programs_have_filled_can_be_used_with_gradients(shapes):
    model = without_special_tokens(tiny_model("each kind once"))
    cache = text_of(model, "ar", compile=True).cache
    with torch.enable_grad():
        model(random_ids(3, 4), cache=cache).logits.sum().backward()
    assert model.context_tower.embeddings.weight.grad.abs().sum() > 0


# Passes by themselves.


def held_by(model, lengths):
    cache = TwoTowerCache(model.config)
    cache.add_rows(len(lengths))
    with torch.no_grad():
        model.context_tower(random_ids(len(lengths), max(lengths)), cache, lengths)
    return cache


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [0, 1, 2], [2], [4, 1, 3], [3, 0]])
@torch.no_grad()
def test_passes_over_some_rows_are_exact_and_touch_no_others(rows, shapes):
    model = tiny_model("each kind once")
    cache, expected = held_by(model, [9, 3, 14, 1, 7]), held_by(model, [9, 3, 14, 1, 7])
    passes, others = CompiledPasses(model), [row for row in range(5) if row not in rows]
    passes.begin()
    for number in range(3):
        part = cache.part(slice(0, len(rows)) if rows == list(range(len(rows))) and len(rows) < 5 else rows)
        exact = expected.part(rows)
        before = [[piece.clone() for piece in held or ()] for held in cache.part(others).views()] if others else []
        ids, counts = random_ids(len(rows), 6, seed=number), [1 + (row + number) % 6 for row in rows]
        block, times, kept = random_block(len(rows), 4, seed=number), torch.rand(len(rows)), [row % 3 for row in rows]
        mask = torch.arange(4) < torch.tensor([1 + row % 4 for row in rows])[:, None]
        assert_close(passes("denoise", block, part, times), model.denoise(block, exact, times))
        masked = passes("denoise", block, part, times, mask.long())
        assert_close(masked[mask], model.denoise(block, exact, times, mask.long())[mask])
        newest = ids[:, :1]
        assert_close(passes("predict_next", newest, part), model.predict_next(newest, exact))
        assert_close(passes("context_tower", newest, part), model.context_tower(newest, exact))
        read, wanted = passes("context_tower", ids, part, counts), model.context_tower(ids, exact, counts)
        for row, count in enumerate(counts):
            assert_close(read[row, :count], wanted[row, :count])
        assert_close(passes("context_tower", ids, part, None, True), model.context_tower(ids, exact, tentative=True))
        passes("accept", part, kept)
        exact.accept(kept)
        assert cache.host_lengths == expected.host_lengths and torch.equal(cache.part(rows).ids[:, 0], exact.ids[:, 0])
        for row in range(5):
            assert torch.equal(*(each.ids[row, : each.host_lengths[row]] for each in (cache, expected)))
        assert_close(model.denoise(block, cache.part(rows), times), model.denoise(block, exact, times))
        after = cache.part(others).views() if others else []
        for held, kept_parts in zip(after, before, strict=True):
            for piece, other in zip(held or (), kept_parts, strict=True):
                width = other.shape[2] if other.ndim == 4 and piece.shape[3] == other.shape[3] else None
                assert torch.equal(piece[:, :, :width], other[:, :, :width])


def test_what_a_padded_row_leaves_does_no_harm_to_a_row_that_takes_its_place():
    model = tiny_model("pure attention")
    cache = held_by(model, [5, 5])
    for layer in cache.layers:
        for buffer in layer.buffers:
            buffer[1] = torch.nan
    cache.drop_rows(1)
    cache.add_rows(2)  # one more than there is room for
    with torch.no_grad():
        model.context_tower(random_ids(3, 2), cache, [2, 2, 2])
        assert model.denoise(random_block(3, 4), cache, 0.5).isfinite().all()


@pytest.mark.parametrize("count, size", [(1, 1), (2, 2), (3, 4), (16, 16), (17, 32), (64, 64), (65, 128)])
def test_sizes_are_powers_of_two(count, size):
    assert padded_size(count) == size and padded_size(count, 32) == max(size, 32)


# Compiled for good.


def test_one_graph_per_kind_and_sizes_over_200_blocks_of_ragged_rows():
    model, graphs = small_model("M*"), Graphs()
    flags = {"max_new_tokens": 400, "block_size": 2, "unmasking_rule": "fixed", "tokens_per_step": 2}
    output = text_of(model, "mask_diffusion", **graphs.flags, **flags)
    assert output.sequences.shape[1] == 411 and output.denoiser_forwards.tolist() == [200] * 3
    sizes = {key[:4] for key in model._kept_programs}
    of_blocks = {(kind, 4, 2, columns) for kind in ("reading", "denoising") for columns in (256, 512)}
    assert sizes == of_blocks | {("reading", 4, 16, 256)} and graphs.count == len(sizes)
    assert torch.equal(output.sequences, text_of(model, "mask_diffusion", **flags).sequences)
    # Another call needs no other.
    text_of(model, "mask_diffusion", **graphs.flags, **{**flags, "max_new_tokens": 100}, seed=1, do_sample=True)
    assert graphs.count == len(model._kept_programs) == len(sizes)


@pytest.mark.parametrize("mode", ["self_speculative", "mock_ar"])
def test_other_modes_are_one_graph_per_kind_and_sizes_too(mode):
    model, graphs = small_model("M" if mode == "mock_ar" else "ME"), Graphs()
    flags = {"input_ids": IDS[:1], "attention_mask": MASK[:1], "max_new_tokens": 30}
    output = text_of(model, mode, **graphs.flags, **flags)
    kinds = {"self_speculative": {"reading", "denoising", "verifying", "accepting"}}.get(
        mode, {"reading", "denoising"}
    )
    assert graphs.count == len(model._kept_programs) and {key[0] for key in model._kept_programs} == kinds
    assert torch.equal(output.sequences, text_of(model, mode, **flags).sequences)


def test_changed_weights_are_never_served_stale():
    model, graphs = small_model("ME"), Graphs()
    ids, seen = random_ids(1, 5), []

    def check():
        flags = {"mode": "mock_ar", "max_new_tokens": 12, "output_logits": True, "return_dict_in_generate": True}
        output, eager = (model.generate(ids, **flags, **chosen) for chosen in (graphs.flags, {}))
        assert not differences(output, eager)
        seen.append(torch.stack(output.logits))

    check()
    programs = graphs.count
    changed = [name for name, _ in model.named_parameters() if name.endswith(("A_log", "dt_bias", "gate.weight"))]
    for name in (*changed, "denoiser_tower.layers.0.mixer.in_proj.weight"):
        module, _, attribute = name.rpartition(".")
        module, weight = model.get_submodule(module), model.get_parameter(name)
        with torch.no_grad():
            weight += 0.7 * torch.randn_like(weight)
        if attribute == "A_log":
            setattr(module, attribute, torch.nn.Parameter(weight + 0.5))
        elif attribute == "dt_bias":
            weight.data = weight.data - 0.5
    check()
    other = small_model("ME", seed=1)
    model.load_state_dict(other.state_dict(), assign=True)
    check()
    assert graphs.count == programs
    assert not torch.allclose(seen[0], seen[1], atol=1e-3) and not torch.allclose(seen[1], seen[2], atol=1e-3)


def test_programs_of_a_model_that_has_become_another_are_dropped(shapes):
    model = small_model()

    def programs():
        model.generate(random_ids(1, 5), mode="ar", max_new_tokens=2, compile=True)
        return model._kept_programs

    first = programs()
    assert programs() is first is programs_of(model)
    for change in (
        lambda: model.set_trained_towers("denoiser"),
        lambda: model.to(torch.bfloat16),
        lambda: model.set_kernels("torch"),
        lambda: model.train(),
        lambda: model.set_attn_implementation("eager"),
        lambda: model.lm_head.register_forward_hook(lambda *_: None),
    ):
        change()
        now = programs()
        assert now is not first and len(now) > 0
        first = now


def test_a_hook_that_comes_later_is_called_as_is_torchs_compiler_after_a_reset():
    model, graphs = small_model("*"), Graphs()
    flags = {"max_new_tokens": 1, "output_logits": True}
    before = text_of(model, "ar", **graphs.flags, **flags)
    torch.compiler.reset()
    assert not differences(text_of(model, "ar", **graphs.flags, **flags), before)
    model.context_tower.layers[0].register_forward_hook(lambda module, inputs, output: (-2 * output[0], output[1]))
    output = text_of(model, "ar", **graphs.flags, **flags)
    assert not differences(output, text_of(model, "ar", **flags)) and differences(output, before)


def test_copies_and_files_of_a_model_have_no_programs(shapes, tmp_path):
    model = small_model()
    names = set(model.state_dict())
    model.generate(random_ids(1, 5), max_new_tokens=2, compile=True)
    assert len(model._kept_programs) > 0 and set(model.state_dict()) == names
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(copied._kept_programs) == 0
        copied.generate(random_ids(1, 5), max_new_tokens=2, compile=True)
        assert len(copied._kept_programs) > 0
    model.save_pretrained(tmp_path)
    assert "_kept_programs" not in vars(TwoTowerForBlockDiffusion.from_pretrained(tmp_path))


# What is shown, and what is refused.


def test_warm_up_is_shown_and_nothing_where_nothing_is_compiled(shapes, capfd):
    logging.enable_progress_bar()  # which our command line may have disabled in this process
    model = small_model()
    model.generate(random_ids(1, 5), mode="ar", max_new_tokens=3, compile=True)
    shown = capfd.readouterr().err
    assert "Compiling passes" in shown and "reading 1x8x256" in shown and "reading 1x1x256" in shown
    assert shown.rstrip(" ").endswith("\n")  # the bar is closed
    model.generate(random_ids(1, 5), mode="ar", max_new_tokens=3, compile=True)
    assert "Compiling" not in capfd.readouterr().err


def test_without_progress_bars_nothing_is_shown(shapes, capfd):
    logging.disable_progress_bar()
    try:
        small_model().generate(random_ids(1, 5), mode="ar", max_new_tokens=3, compile=True)
    finally:
        logging.enable_progress_bar()
    assert "Compiling" not in capfd.readouterr().err


def test_a_compile_config_is_what_torch_compile_is_given(monkeypatch):
    given = []
    monkeypatch.setattr(torch, "compile", lambda function, **arguments: given.append(arguments) or function)
    model = small_model()
    config = CompileConfig(backend="aot_eager", dynamic=True, mode=None, options={"a": 1})
    model.generate(random_ids(1, 5), mode="ar", max_new_tokens=1, compile=True, compile_config=config)
    in_config = GenerationConfig(compile_config=CompileConfig(mode="max-autotune"), max_new_tokens=1)
    model.generate(random_ids(1, 5), mode="ar", generation_config=in_config, compile=True)
    model.generate(random_ids(1, 5), mode="ar", max_new_tokens=1, compile=True)
    own, inductor = (
        {"backend": "aot_eager", "mode": None, "options": {"a": 1}},
        {"backend": "inductor", "options": None},
    )
    assert given == [
        {"fullgraph": False, "dynamic": True, **own},
        {"fullgraph": False, "dynamic": False, "mode": "max-autotune", **inductor},
        {"fullgraph": True, "dynamic": False, "mode": "reduce-overhead", **inductor},
    ]
    assert compile_arguments(CompileConfig(backend="eager"))["mode"] is None


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"compile": "yes"}, "compile is 'yes'; give True or False"),
        ({"compile_config": CompileConfig()}, "has no effect without compile=True"),
        ({"compile": False, "compile_config": CompileConfig()}, "has no effect without compile=True"),
        ({"compile": True, "compile_config": CompileConfig(options={"a": 1})}, "give mode=None"),
        ({"compile": True, "compile_config": {"backend": "eager"}}, "compile_config"),
        ({"cache_implementation": "static"}, "leave it unset; compile=True runs compiled passes"),
    ],
)
def test_arguments_without_an_effect_are_refused(flags, said):
    with pytest.raises(ValueError, match=said):
        small_model().generate(random_ids(1, 5), max_new_tokens=2, **flags)


def test_a_model_that_accelerate_moves_is_refused():
    model = small_model()
    model.lm_head._hf_hook = object()
    for ask in (model.generate, TwoTowerEngine(model).add_request):
        with pytest.raises(
            ValueError, match=r"needs all weights to stay on one device.*load the model without device_map"
        ):
            ask(random_ids(1, 5), max_new_tokens=2, compile=True)
    del model.lm_head._hf_hook
    model.denoiser_tower.to("meta")
    with pytest.raises(ValueError, match=r"all weights to stay on one device.*\(cpu, meta\)"):
        model.generate(random_ids(1, 5), max_new_tokens=2, compile=True)


def test_ranks_and_quantisers_that_do_not_compile_are_refused(monkeypatch):
    model = small_model()
    model.hf_quantizer = type("SomeQuantizer", (), {"is_compileable": False})()
    with pytest.raises(ValueError, match="not supported by transformers' SomeQuantizer; quantise otherwise"):
        model.generate(random_ids(1, 5), max_new_tokens=2, compile=True)
    monkeypatch.setattr(type(model), "_is_synced", lambda *_: True)
    with pytest.raises(ValueError, match="while parameters are spread over ranks"):
        compiled.check_can_compile(model)


def test_what_torch_cannot_compile_is_an_error_that_says_what_to_do():
    model = small_model("M")

    def backend(graph, inputs):
        raise RuntimeError("no compiler here")

    config = CompileConfig(backend=backend)
    with pytest.raises(ValueError, match=r"reading 1x8x0 could not be compiled: .*no compiler here.*g\+\+"):
        model.generate(random_ids(1, 5), mode="ar", max_new_tokens=2, compile=True, compile_config=config)
    assert len(model._kept_programs) == 0


def test_by_torchs_own_compiler_the_text_is_that_of_eager_passes():
    model = small_model("M")
    output = text_of(model, "ar", compile=True)
    assert not differences(output, text_of(model, "ar")) and len(model._kept_programs) == 2


def test_a_missing_compiler_is_named(monkeypatch):
    model = small_model("M")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(ValueError, match=r"could not be compiled: .*no-such-compiler"):
        model.generate(random_ids(1, 5), mode="ar", max_new_tokens=2, compile=True)


def test_what_cannot_be_compiled_ends_who_asked_for_it_and_nobody_else():
    model, ids = small_model("M*"), random_ids(1, 9)
    expected = model.generate(ids, max_new_tokens=8, return_dict_in_generate=True)
    engine = TwoTowerEngine(model, slots=4)
    eager = engine.add_request(ids, max_new_tokens=8, return_dict_in_generate=True)
    engine.step()
    asked = engine.add_request(ids, max_new_tokens=8, compile=True, compile_config=CompileConfig(backend="none such"))
    while engine.step():
        pass
    with pytest.raises(ValueError, match="could not be compiled"):
        asked.result(0)
    assert torch.equal(eager.result(0).sequences, expected.sequences)
    assert torch.equal(eager.result(0).context_forwards, expected.context_forwards)


def test_pieces_of_a_long_prompt_are_read_by_one_program(monkeypatch):
    shapes = Shapes()
    monkeypatch.setattr(torch, "compile", shapes)
    monkeypatch.setattr(compiled, "MOST_TOKENS", 128)
    monkeypatch.setattr(buffers, "LEAST_COLUMNS", 16)
    model = small_model("M*")
    model.generate(random_ids(1, 512), mode="ar", max_new_tokens=1, compile=True)
    assert len(shapes.programs) == 1


def test_engines_copy_rows_to_places_of_their_own(shapes):
    model, found = tiny_model("all kinds"), []
    held = [KeyValues(torch.zeros(3, 1, 256, 2), torch.zeros(3, 1, 256, 2))]
    for passes in (CompiledPasses(model), CompiledPasses(model)):
        passes.begin()
        found.append(passes.buffers._copied(held, [0], 256)[0].key)
    assert found[0].data_ptr() != found[1].data_ptr()
