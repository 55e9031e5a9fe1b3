"""`generate(..., compile=True)` on a GPU: the texts of eager passes, by passes recorded as CUDA graphs."""

from copy import deepcopy
from gc import collect
from itertools import pairwise
from weakref import ref

import fake_graphs
import pytest
import torch
from golden_cases import assert_golden_generations
from huggingface_hub import constants
from mixed_requests import MODES, differences
from programs import IDS, KNOBS, MASK, SAMPLED, assert_mixed_requests_get_what_they_get_alone, small_model, text_of
from tiny import random_ids, tiny_model, without_special_tokens
from transformers import CompileConfig, StoppingCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from twotower import TwoTowerEngine, TwoTowerForBlockDiffusion
from twotower.cache_twotower import MambaState
from twotower.decoding.compiled import CompiledPasses, records_passes
from twotower.decoding.pass_costs import PassCosts
from twotower.decoding.programs import programs_of
from twotower.decoding.recorded import Recording


@pytest.fixture
def graphs(monkeypatch):
    return fake_graphs.put_in_place(monkeypatch)


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("mode", MODES)
def test_texts_and_passes_are_those_of_eager_passes(mode, sampling, graphs):
    model = without_special_tokens(tiny_model("all kinds"))
    eager = text_of(model, mode, **sampling)
    assert graphs.made == 0
    for _ in range(2):
        output = text_of(model, mode, compile=True, **sampling)
        assert not differences(output, eager)
        assert torch.equal(output.denoiser_forwards, eager.denoiser_forwards)
        assert torch.equal(output.context_forwards, eager.context_forwards)


def test_goldens_token_for_token_with_their_passes(goldens, graphs):
    model = TwoTowerForBlockDiffusion.from_pretrained(goldens / "checkpoint")
    assert_golden_generations(model, goldens, compile=True)
    assert graphs.made > 10


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_second_call_of_the_same_sizes_records_nothing(mode, kept, graphs):
    model = small_model()
    texts, made = [], []
    for _ in range(4):
        texts.append(text_of(model, mode, compile=True, return_dict_in_generate=kept, max_new_tokens=40))
        made.append(graphs.made)
    texts = [text.sequences if kept else text for text in texts]
    assert all(torch.equal(text, texts[0]) for text in texts)
    assert made[0] > 0 and made[0] == made[-1]


def test_nor_does_one_whose_cache_grows(graphs):
    model, made = small_model(), []
    for _ in range(3):
        model.generate(random_ids(2, 250), mode="ar", max_new_tokens=20, compile=True)  # 256 and then 512 columns
        made.append(graphs.made)
    assert made[0] > 0 and made[0] == made[-1]


def test_a_cache_that_is_kept_is_not_written_by_a_later_call(graphs):
    model = small_model()
    first = text_of(model, "ar", compile=True)
    held = [[part.clone() for part in each or ()] for each in first.cache.views()]
    text_of(model, "ar", compile=True, input_ids=random_ids(3, 11, seed=4))
    for each, before in zip(first.cache.views(), held, strict=True):
        assert all(torch.equal(part, other) for part, other in zip(each or (), before, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_a_cache_that_an_error_gives_back_is_not_written_by_a_later_call(mode, graphs):
    class FailsAtTheEnd:
        def put(self, value):
            pass

        def end(self):
            raise ValueError("the pipe is closed")

    model = small_model()
    turn = {"return_dict_in_generate": True, "max_new_tokens": 8, "compile": True, "mode": mode}
    first = model.generate(random_ids(1, 300), **turn)
    cache, text = first.past_key_values, torch.cat([first.sequences, random_ids(1, 3)], dim=1)
    held = [[part.clone() for part in each or ()] for each in cache.views()]
    with pytest.raises(ValueError, match="the pipe is closed"):
        model.generate(text, past_key_values=cache, streamer=FailsAtTheEnd(), **turn)
    model.generate(random_ids(1, 300, seed=5), **turn)
    for each, before in zip(cache.views(), held, strict=True):
        assert all(torch.equal(part, other) for part, other in zip(each or (), before, strict=True))
    again = model.generate(text, past_key_values=cache, **turn).sequences
    assert torch.equal(again, model.generate(text, **turn | {"compile": False}).sequences)


def test_shorter_fewer_and_longer_texts_after_each_other(graphs):
    model = small_model()
    for rows, length, new in ((3, 11, 14), (1, 5, 3), (3, 300, 30), (2, 7, 9), (4, 11, 14)):
        ids = random_ids(rows, length)
        flags = {"max_new_tokens": new, "mode": "self_speculative", "draft_length": 4}
        expected = model.generate(ids, **flags)
        for _ in range(2):
            assert torch.equal(model.generate(ids, compile=True, **flags), expected)


def test_mixed_requests_that_join_and_leave_get_what_they_get_alone(graphs):
    assert_mixed_requests_get_what_they_get_alone(20, made=lambda: graphs.made)
    assert graphs.made > 5


def test_changed_weights_are_never_served_stale(graphs):
    model, texts = small_model("ME*"), []

    def check():
        flags = {"output_logits": True, "max_new_tokens": 6}
        output, eager = text_of(model, "mock_ar", compile=True, **flags), text_of(model, "mock_ar", **flags)
        assert not differences(output, eager)
        texts.append(torch.stack(output.logits))

    check()
    for name in [name for name, _ in model.named_parameters() if name.endswith(("A_log", "up_proj", "q_proj.weight"))]:
        with torch.no_grad():
            model.get_parameter(name).mul_(1.5)
    check()
    weight = model.denoiser_tower.layers[0].mixer.in_proj.weight
    weight.data = weight.data * 1.5
    check()
    for name in ("A_log", "k_proj.weight"):  # of which something is prepared; an edit that leaves no trace
        for parameter in (each for own, each in model.named_parameters() if own.endswith(name)):
            parameter.data *= 1.5
    check()
    model.context_tower.layers[0].mixer.dt_bias = torch.nn.Parameter(
        weight.new_full((4,), 0.5)[: len(model.context_tower.layers[0].mixer.dt_bias)]
    )
    check()
    model.load_state_dict(small_model("ME*", seed=1).state_dict(), assign=True)
    check()
    assert all(not torch.allclose(one, two, atol=1e-3) for one, two in pairwise(texts))


def test_traceless_changes_are_seen_in_other_parameters_of_the_same_memory(graphs):
    model, texts = small_model("MM*"), []
    flags = {"max_new_tokens": 40, "return_dict_in_generate": False}
    for factor in (1.0, -1.5):
        model.load_state_dict(model.state_dict(), assign=True)
        for name, parameter in model.named_parameters():
            if name.endswith(("A_log", "k_proj.weight")):  # of which something is prepared
                parameter.data *= factor
        texts += [text_of(model, "mock_ar", compile=compile, **flags) for compile in (True, False)]
    assert torch.equal(*texts[:2]) and torch.equal(*texts[2:]) and not torch.equal(texts[0], texts[2])


def test_a_module_that_another_replaces_is_not_kept(graphs):
    model, gone = small_model("M"), []
    layer = model.context_tower.layers[0]
    for _ in range(2):
        text_of(model, "ar", compile=True)
        gone.append(ref(layer.mixer))
        layer.mixer = deepcopy(layer.mixer)
    text_of(model, "ar", compile=True)
    collect()
    assert [each() for each in gone] == [None, None]


def test_changes_to_one_tower_cost_no_recordings_of_the_other(graphs):
    model, made = small_model(), []
    embeddings = model.denoiser_tower.embeddings = model.context_tower.embeddings  # which is of both
    for changed in (None, model.lm_head.weight, embeddings.weight, None):
        if changed is not None:
            with torch.no_grad():
                changed.mul_(1.5)
        texts = [
            text_of(model, "mock_ar", compile=compile, return_dict_in_generate=False) for compile in (True, False)
        ]
        assert torch.equal(*texts)
        made.append(graphs.made)
    first, of_one, of_both, nothing = made[0], *(after - before for before, after in pairwise(made))
    assert 0 < of_one < first == of_both and nothing == 0


def test_what_waits_for_the_device_cannot_be_recorded(graphs, monkeypatch):
    model = small_model("M")
    forward = type(model.context_tower.layers[0].mixer).forward
    monkeypatch.setattr(
        type(model.context_tower.layers[0].mixer),
        "forward",
        lambda self, hidden, *rest: forward(self, hidden * float(hidden.sum().isfinite()), *rest),
    )
    with pytest.raises(AssertionError, match="_local_scalar_dense cannot be captured"):
        text_of(model, "ar", compile=True)
    assert torch.cuda.current_stream() is fake_graphs.DEFAULT_STREAM
    monkeypatch.undo()
    fake_graphs.put_in_place(monkeypatch)
    assert torch.equal(text_of(model, "ar", compile=True).sequences, text_of(model, "ar").sequences)


def test_what_cannot_be_recorded_is_an_error_that_says_what_to_do(graphs, monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", fails)
    with pytest.raises(ValueError, match=r"reading 4x16x256 could not be recorded .*not permitted.*bfloat16"):
        text_of(small_model("M*"), "ar", compile=True)


def test_a_first_pass_that_fails_leaves_states_as_they_were(graphs):
    def program(model, states):
        states[0].ssm.add_(1)
        raise ZeroDivisionError

    state = MambaState(torch.ones(1, 2), torch.ones(1, 3))
    with pytest.raises(ZeroDivisionError):
        Recording(program, small_model("M"), (torch.device("cpu"), None), [state], [], {})
    assert torch.equal(state.ssm, torch.ones(1, 3))


def test_warm_up_is_shown(graphs, capfd):
    logging.enable_progress_bar()
    small_model().generate(IDS, attention_mask=MASK, mode="ar", max_new_tokens=3, compile=True)
    assert "Recording passes" in capfd.readouterr().err


def test_recording_is_for_gpus_and_asked_for_by_torchs_name():
    on_gpu, on_cpu = torch.device("cuda"), torch.device("cpu")
    named, inductor = CompileConfig(backend="cudagraphs"), CompileConfig()
    assert records_passes(None, on_gpu) and records_passes(named, on_gpu) and not records_passes(inductor, on_gpu)
    assert not records_passes(None, on_cpu)
    with pytest.raises(ValueError, match='backend="cudagraphs", and the model is on cpu; leave it out'):
        small_model("M").generate(IDS, max_new_tokens=2, compile=True, compile_config=named)
    with pytest.raises(ValueError, match="leave it out"):  # before it is among others
        TwoTowerEngine(small_model("M")).add_request(random_ids(1, 5), compile=True, compile_config=named)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_on_a_gpu(mode):
    # In bfloat16 a pass of padded rows rounds otherwise, as an H200 has shown.
    model = without_special_tokens(tiny_model("all kinds")).to("cuda")
    on_gpu = {"input_ids": IDS.cuda(), "attention_mask": MASK.cuda()}
    for sampling in ({}, SAMPLED):
        eager = text_of(model, mode, **on_gpu, **sampling)
        for _ in range(2):
            assert torch.equal(text_of(model, mode, compile=True, **on_gpu, **sampling).sequences, eager.sequences)


def test_two_engines_of_one_model_do_not_share_memory(graphs):
    model = small_model()
    flags = {"mode": "ar", "max_new_tokens": 12, "compile": True}
    expected = [model.generate(random_ids(1, 5, seed=seed), **flags) for seed in range(2)]
    engines = [TwoTowerEngine(model, slots=2) for _ in range(2)]
    handles = [engine.add_request(random_ids(1, 5, seed=seed), **flags) for seed, engine in enumerate(engines)]
    for _ in range(20):  # in turn
        for engine in engines:
            engine.step()
    for handle, text in zip(handles, expected, strict=True):
        assert torch.equal(handle.result(0), text)


class OnHost(torch.Tensor):
    """What a GPU's operations do not take, but copies do."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        assert function in (torch.Tensor.to, torch.Tensor.copy_), f"{function.__name__} of numbers on the host"
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


def test_numbers_stay_on_the_host_until_a_recording_has_them(graphs, monkeypatch):
    numbers = CompiledPasses._numbers
    monkeypatch.setattr(CompiledPasses, "_numbers", lambda *args: numbers(*args).as_subclass(OnHost))
    model = small_model()
    engine = TwoTowerEngine(model, slots=2)
    modes = ("mask_diffusion", "ar")
    handles = [engine.add_request(IDS[0], mode=mode, max_new_tokens=9, compile=True, **KNOBS[mode]) for mode in modes]
    assert all(handle.result() is not None for handle in handles)
    assert engine._engine.compiled.programs.scratch  # also where copies of rows are written back


def test_states_that_eager_passes_leave_behind_are_not_written_to(graphs):
    model = small_model()
    engine, texts = TwoTowerEngine(model, slots=2), []
    for _ in range(2):
        # The third takes the first one's place and ends with the second: the last passes are eager ones over all rows.
        for compile, length in ((True, 4), (False, 12), (False, 8)):
            handle = engine.add_request(random_ids(1, 5), mode="ar", max_new_tokens=length, compile=compile)
        while engine.step():
            pass
        texts.append(handle.result(0))
    assert torch.equal(*texts)


def test_a_plain_request_in_between_costs_no_recording(graphs):
    engine, made = TwoTowerEngine(small_model(), slots=2), []
    for compile in (True, False, True, False, True):
        handle = engine.add_request(random_ids(1, 5), mode="ar", max_new_tokens=5, compile=compile)
        while engine.step():
            pass
        handle.result(0)
        made.append(graphs.made)
    assert made[0] > 0 and made[0] == made[-1]


def test_an_engine_that_goes_on_does_not_share_what_another_has_taken(graphs):
    model = small_model()
    engines = [TwoTowerEngine(model, slots=2) for _ in range(2)]

    def begin(engine):
        handle = engine.add_request(random_ids(1, 5), mode="ar", max_new_tokens=6, compile=True)
        engine.step()
        return handle

    begin(engines[0])
    while engines[0].step():
        pass
    begin(engines[1])
    begin(engines[0])
    first, second = (engine._engine.compiled.programs for engine in engines)
    assert first is not second
    begin(engines[0])
    assert engines[0]._engine.compiled.programs is first


class Failing(StoppingCriteria):
    def __call__(self, *_, **__):
        raise RuntimeError("mine")


def test_an_error_that_somebody_keeps_keeps_no_recordings_from_later_calls(graphs):
    model, made = small_model(), []
    flags = {"mode": "ar", "max_new_tokens": 5, "compile": True}
    with pytest.raises(RuntimeError, match="mine") as kept:
        model.generate(IDS, stopping_criteria=[Failing()], **flags)
    for _ in range(2):
        model.generate(IDS, **flags)
        made.append(graphs.made)
    assert kept.traceback and made[0] == made[1]


def test_weights_replaced_while_a_row_goes_on_are_seen(graphs):
    texts = []
    for compile in (True, False):
        model = small_model()
        engine = TwoTowerEngine(model, slots=1)
        handle = engine.add_request(random_ids(1, 5), mode="ar", max_new_tokens=20, compile=compile)
        for _ in range(6):
            engine.step()
        model.load_state_dict(small_model(seed=1).state_dict(), assign=True)
        while engine.step():
            pass
        texts.append(handle.result(0))
    assert torch.equal(*texts)


class Replacing(BaseStreamer):
    """Replaces a weight once some tokens have come, the one that stood there being freed."""

    def __init__(self, model):
        self.mixer, self.left = model.context_tower.layers[0].mixer, 4

    def put(self, value):
        self.left -= 1
        if self.left == 0:
            weight = self.mixer.in_proj.weight
            self.mixer.in_proj.weight = torch.nn.Parameter(weight.detach().flip(0))
            weight.data.fill_(torch.nan)

    def end(self):
        pass


def test_weights_replaced_by_a_streamer_are_seen_by_the_next_pass(graphs):
    texts = []
    for compile in (True, False):
        model = small_model()
        flags = {"mode": "ar", "max_new_tokens": 12, "compile": compile}
        texts += [model.generate(random_ids(1, 5), **flags, streamer=each) for each in (None, Replacing(model))]
    assert torch.equal(texts[1], texts[3]) and not torch.equal(texts[0], texts[1])


def test_passes_recorded_under_autocast_are_not_those_without(graphs):
    model = small_model()
    flags = {"mode": "ar", "max_new_tokens": 5}
    expected = model.generate(IDS, **flags)
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(IDS, compile=True, **flags)
        made = graphs.made
    assert torch.equal(model.generate(IDS, compile=True, **flags), expected)
    assert graphs.made > made


def test_drafts_go_by_what_recorded_passes_cost(graphs, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    model, asked = small_model(), []

    def measured(cls, model, lengths, rows, recorded):
        asked.append(recorded)
        return measure(cls, model, lengths, rows, recorded)

    measure = PassCosts.measure.__func__
    monkeypatch.setattr(PassCosts, "measure", classmethod(measured))
    flags = {"mode": "self_speculative", "draft_length": "auto", "max_new_tokens": 30}
    expected = text_of(model, **flags).sequences
    texts = [text_of(model, compile=True, **flags).sequences for _ in range(2)]
    assert asked == [False, True]
    assert all(torch.equal(text, expected) for text in texts)


@pytest.mark.parametrize("rows", [1, 3])
def test_recorded_passes_are_measured_with_recordings_of_their_own(rows, graphs):
    model = small_model()
    model.generate(random_ids(rows, 5), mode="ar", max_new_tokens=4, compile=True)
    known, made = dict(programs_of(model)), graphs.made
    with torch.inference_mode():
        costs = PassCosts.measure(model, [2, 4], [rows], recorded=True)
    assert [entry[:3] for entry in costs.entries()] == [
        *[(kind, tokens, rows) for kind in ("denoise", "verify") for tokens in (2, 4)],
        ("step", 1, rows),
    ]
    assert graphs.made > made
    assert all(programs_of(model)[key] == recordings for key, recordings in known.items())
    expected = model.generate(random_ids(rows, 5), mode="ar", max_new_tokens=4)
    assert torch.equal(model.generate(random_ids(rows, 5), mode="ar", max_new_tokens=4, compile=True), expected)
