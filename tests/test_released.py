"""The released code's method names: what each call of `generate` they stand for gives, and what a callback is told."""

import copy
import inspect
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier

import pytest
import torch
from accelerate import dispatch_model
from safetensors.torch import load_file
from tiny import random_ids, tiny_model

from twotower.decoding import released as released_twotower
from twotower.decoding.released import CONTEXT_PARTS, DENOISER_PARTS
from twotower.modeling_twotower import TwoTowerForBlockDiffusion

MASK = 3
PROMPT = random_ids(1, 6)
DIFFUSION = {"max_new_tokens": 10, "block_size": 4, "steps_per_block": 4, "confidence_threshold": 0.2}
KNOBS = {"mode": "mask_diffusion", "do_sample": False, "eos_token_id": None, **DIFFUSION}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def golden_model(goldens):
    return TwoTowerForBlockDiffusion.from_pretrained(goldens / "checkpoint")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "generate_mask_diffusion",
            "input_ids max_new_tokens=128 block_size=16 steps_per_block=16 mask_token_id=3 temperature=0.0 top_k=None "
            "confidence_threshold=0.9 eos_token_id=None step_callback=None",
        ),
        (
            "generate_mock_ar",
            "input_ids max_new_tokens=128 temperature=0.0 top_k=None top_p=None eos_token_id=None",
        ),
        ("generate_ar", "input_ids max_new_tokens=128 temperature=0.0 top_k=None top_p=None eos_token_id=None"),
        ("place_towers_on_devices", "ctx_device=cuda:0 den_device=cuda:1"),
    ],
)
def test_arguments_and_defaults(model, name, expected):
    parameters = inspect.signature(getattr(model, name)).parameters.values()
    seen = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters]
    assert " ".join(seen) == expected


class TestAliases:
    """Each gives what the call of `generate` gives that it stands for."""

    def test_mask_diffusion(self, model):
        expected = model.generate(PROMPT, **KNOBS)
        assert expected.shape == (1, 16)
        assert torch.equal(model.generate_mask_diffusion(PROMPT, **DIFFUSION), expected)
        assert torch.equal(model.generate_mask_diffusion(PROMPT, 10, 4, 4, MASK, None, None, 0.2), expected)

    @pytest.mark.parametrize("mode", ["mock_ar", "ar"])
    def test_one_token_at_a_time(self, model, mode):
        expected = model.generate(PROMPT, mode=mode, max_new_tokens=10, do_sample=False, eos_token_id=None)
        assert torch.equal(getattr(model, f"generate_{mode}")(PROMPT, max_new_tokens=10), expected)

    @pytest.mark.parametrize("top_k", [None, 3])
    def test_sampled_mask_diffusion(self, model, top_k):
        torch.manual_seed(0)
        expected = model.generate(PROMPT, **KNOBS | {"do_sample": True, "temperature": 1.7, "top_k": top_k or 0})
        torch.manual_seed(0)
        assert torch.equal(model.generate_mask_diffusion(PROMPT, temperature=1.7, top_k=top_k, **DIFFUSION), expected)

    @pytest.mark.parametrize("mode", ["mock_ar", "ar"])
    @pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (3, None), (None, 0.6)])
    def test_sampled_one_token_at_a_time(self, model, mode, top_k, top_p):
        sampling = {"do_sample": True, "temperature": 1.7, "top_k": top_k or 0, "top_p": top_p or 1.0}
        torch.manual_seed(0)
        expected = model.generate(PROMPT, mode=mode, max_new_tokens=10, eos_token_id=None, **sampling)
        torch.manual_seed(0)
        alias = getattr(model, f"generate_{mode}")
        assert torch.equal(alias(PROMPT, 10, temperature=1.7, top_k=top_k, top_p=top_p), expected)

    def test_a_row_ends_at_its_end_of_text(self, model):
        free = model.generate_mask_diffusion(PROMPT, **DIFFUSION)
        stop = int(free[0, 8])
        end = 7 + free[0, 6:].tolist().index(stop)
        assert torch.equal(model.generate_mask_diffusion(PROMPT, eos_token_id=stop, **DIFFUSION), free[:, :end])
        for alias in (model.generate_mock_ar, model.generate_ar):
            free = alias(PROMPT, 8)
            end = 7 + free[0, 6:].tolist().index(int(free[0, 9]))
            assert torch.equal(alias(PROMPT, 8, eos_token_id=int(free[0, 9])), free[:, :end])

    def test_every_prompt_token_counts(self, model, monkeypatch):
        """The released code knows no padding: the id of one is a token like any other."""
        monkeypatch.setattr(model.generation_config, "pad_token_id", None)
        prompt = torch.tensor([[0, 0, 7, 0, 9]])
        expected = model.generate(prompt, **KNOBS)
        monkeypatch.setattr(model.generation_config, "pad_token_id", 0)
        assert torch.equal(model.generate_mask_diffusion(prompt, **DIFFUSION), expected)

    def test_the_generation_config_has_no_say(self, model, monkeypatch):
        greedy = [model.generate_mask_diffusion(PROMPT, **DIFFUSION), model.generate_ar(PROMPT, 10)]
        for name, value in {
            "mode": "mock_ar",
            "do_sample": True,
            "temperature": 9.0,
            "top_k": 2,
            "eos_token_id": list(range(4, 48)),
            "unmasking_rule": "posterior",
            "return_dict_in_generate": True,
        }.items():
            monkeypatch.setattr(model.generation_config, name, value)
        again = [model.generate_mask_diffusion(PROMPT, **DIFFUSION), model.generate_ar(PROMPT, 10)]
        assert [ids.tolist() for ids in again] == [ids.tolist() for ids in greedy]

    def test_another_mask_id_is_refused(self, model):
        with pytest.raises(ValueError, match="mask_token_id is 5, but the model's is 3"):
            model.generate_mask_diffusion(PROMPT, mask_token_id=5)


def test_pass_counts_of_the_released_code(golden_model, goldens):
    tensors = load_file(goldens / "tensors.safetensors")
    cases = [case for case in json.loads((goldens / "generations.json").read_text()) if case["nfe"] is not None]
    knobs = ("max_new_tokens", "block_size", "steps_per_block", "confidence_threshold", "eos_token_id")
    for case in cases[1:-3:9] + cases[-3:]:
        prompt = tensors[f"p{case['prompt']}.ids"].long()[None]
        output = golden_model.generate_mask_diffusion(prompt, **{name: case[name] for name in knobs if name in case})
        assert (type(golden_model._last_nfe), golden_model._last_nfe) == (int, case["nfe"]), case
        new = output[0, prompt.shape[1] :].tolist()
        assert new == case["new_tokens"][: len(new)], case


class Recorder:
    def __init__(self):
        self.calls = []

    def __call__(self, step, steps, block_ids, t, logits, block_idx):
        self.calls.append((step, steps, block_ids.clone(), t, logits, block_idx))


class TestStepCallback:
    def test_what_it_is_told(self, model):
        recorder = Recorder()
        output = model.generate_mask_diffusion(PROMPT, step_callback=recorder, **DIFFUSION)
        assert torch.equal(output, model.generate_mask_diffusion(PROMPT, **DIFFUSION))
        starts = [call for call in recorder.calls if call[4] is None]
        assert [call[5] for call in starts] == [0, 1, 2]
        for step, steps, block_ids, t, _, _ in starts:
            assert (step, steps, t) == (0, 4, 1.0)
            assert block_ids.tolist() == [[MASK] * 4]
        passes = [call for call in recorder.calls if call[4] is not None]
        assert len(passes) == model._last_nfe
        for step, steps, block_ids, t, logits, block in passes:
            assert (type(t), t, steps) == (float, float((block_ids == MASK).float().mean()), 4)
            cache = model(output[:, : 6 + 4 * block]).past_key_values
            torch.testing.assert_close(logits, model.denoise(block_ids, cache, t))
            if step == 0:
                assert block_ids.tolist() == [[MASK] * 4]
            written = _block(output, block)
            kept = block_ids[:, : written.shape[1]]
            assert torch.equal(kept[kept != MASK], written[kept != MASK])

    def test_order(self, model):
        recorder = Recorder()
        model.generate_mask_diffusion(PROMPT, step_callback=recorder, **DIFFUSION | {"confidence_threshold": 1.0})
        order = [(block, step, logits is None) for step, _, _, _, logits, block in recorder.calls]
        one_block = [(0, True), (0, False), (1, False), (2, False), (3, False)]
        assert order[:10] == [(block, *call) for block in (0, 1) for call in one_block]

    def test_released_logits(self, golden_model, goldens):
        tensors = load_file(goldens / "tensors.safetensors")
        recorder = Recorder()
        golden_model.generate_mask_diffusion(tensors["p2.ids"].long()[None], 16, step_callback=recorder)
        first = recorder.calls[1]
        assert torch.equal(first[2][0], tensors["p2.den.L16.m16.block"].long())
        torch.testing.assert_close(first[4][0], tensors["p2.den.L16.m16.logits"], rtol=1e-4, atol=1e-4)

    def test_nothing_comes_of_its_changes(self, model):
        def scribble(step, steps, block_ids, t, logits, block_idx):
            block_ids.fill_(7)
            if logits is not None:
                logits.zero_()
            return "ignored"

        output = model.generate_mask_diffusion(PROMPT, step_callback=scribble, **DIFFUSION)
        assert torch.equal(output, model.generate_mask_diffusion(PROMPT, **DIFFUSION))

    def test_a_batch(self, model):
        recorder = Recorder()
        prompts = random_ids(3, 6, seed=4)
        output = model.generate_mask_diffusion(prompts, step_callback=recorder, **DIFFUSION)
        alone = [model.generate_mask_diffusion(prompt[None], **DIFFUSION) for prompt in prompts]
        assert torch.equal(output, torch.cat(alone))
        model.generate_mask_diffusion(prompts, **DIFFUSION)
        passes = [call for call in recorder.calls if call[4] is not None]
        assert len(passes) == model._last_nfe
        for _, _, block_ids, t, logits, _ in passes:
            assert block_ids.shape == (3, 4) and logits.shape == (3, 4, 48)
            assert t == pytest.approx(float((block_ids == MASK).float().mean()))

    def test_its_error_leaves_no_hook(self, model):
        def stop(*args, **kwargs):
            raise KeyError("enough")

        with pytest.raises(KeyError, match="enough"):
            model.generate_mask_diffusion(PROMPT, step_callback=stop, **DIFFUSION)
        assert not model.lm_head._forward_hooks


def _block(output, number):
    return output[:, 6 + 4 * number :][:, :4]


class TestPlacement:
    def test_both_on_one_device(self, model):
        expected = model.generate_mask_diffusion(PROMPT, **DIFFUSION)
        assert model.place_towers_on_devices("cpu", "cpu") is model
        assert torch.equal(model.generate_mask_diffusion(PROMPT, **DIFFUSION), expected)

    def test_hooks_with_everything_in_memory(self, monkeypatch):
        """As on two accelerators, where no weight is offloaded, but every part has its device."""
        model = tiny_model()
        expected = _all_modes(model)
        monkeypatch.setattr(released_twotower, "dispatch_model", partial(dispatch_model, force_hooks=True))
        model.place_towers_on_devices("cpu", "cpu")
        assert all(hasattr(model.get_submodule(part), "_hf_hook") for part in CONTEXT_PARTS + DENOISER_PARTS)
        assert _all_modes(model) == expected

    # Of these two names of the one CPU, accelerate takes "cpu" for a place to keep weights, the other for a device.
    @pytest.mark.parametrize(
        ("ctx_device", "den_device", "offloaded"),
        [("cpu", torch.device("cpu"), CONTEXT_PARTS), (torch.device("cpu"), "cpu", DENOISER_PARTS)],
    )
    def test_one_on_each(self, ctx_device, den_device, offloaded):
        model = tiny_model(hybrid_override_pattern="M-*E*-M")
        expected = _all_modes(model)
        assert model.place_towers_on_devices(ctx_device, den_device) is model
        assert {name.split(".")[0] for name, p in model.named_parameters() if p.is_meta} == set(offloaded)
        places = dict.fromkeys(CONTEXT_PARTS, ctx_device) | dict.fromkeys(DENOISER_PARTS, den_device)
        assert model.hf_device_map == places
        assert _all_modes(model) == expected
        # Placed again, every weight comes back.
        model.place_towers_on_devices("cpu", "cpu")
        assert not any(parameter.is_meta for parameter in model.parameters())
        assert not any(hasattr(module, "_hf_hook") for module in model.modules())
        assert _all_modes(model) == expected

    def test_all_parts_are_placed(self, model):
        assert {name for name, _ in model.named_children()} == {*CONTEXT_PARTS, *DENOISER_PARTS}


def _all_modes(model):
    outputs = [model.generate_mask_diffusion(PROMPT, **DIFFUSION), model.generate_mock_ar(PROMPT, 6)]
    return [output.tolist() for output in (*outputs, model.generate_ar(PROMPT, 6))]


class TestPassCount:
    def test_threads_do_not_mix_their_counts(self):
        """Two calls at the same time, one pass of each after one of the other."""
        model = tiny_model()
        prompts = [random_ids(1, 6, seed=seed) for seed in (0, 1)]
        options = [DIFFUSION | {"confidence_threshold": 1.0}, DIFFUSION | {"max_new_tokens": 4, "steps_per_block": 1}]
        alone = []
        for prompt, option in zip(prompts, options, strict=True):
            model.generate_mask_diffusion(prompt, **option)
            alone.append(model._last_nfe)
        assert alone == [12, 1]
        both, started = Barrier(2, timeout=60), [False, False]

        def call(idx):
            def meet(step, steps, block_ids, t, logits, block_idx):
                if not started[idx]:
                    started[idx] = True
                    both.wait()

            model.generate_mask_diffusion(prompts[idx], step_callback=meet, **options[idx])
            both.wait()  # the other has set its count, too
            return model._last_nfe

        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(call, range(2))) == alone

    def test_another_thread_finds_the_last_count(self):
        """As with a plain attribute, of a call that was handed to a worker."""
        model = tiny_model()
        with pytest.raises(AttributeError, match="_last_nfe"):
            model._last_nfe  # noqa: B018
        with ThreadPoolExecutor(1) as pool:
            pool.submit(model.generate_mask_diffusion, PROMPT, **DIFFUSION | {"max_new_tokens": 1}).result()
        count = model._last_nfe
        assert 1 <= count <= 4
        assert copy.deepcopy(model)._last_nfe == count

    def test_one_per_pass_of_the_whole_batch(self, model):
        seen = []
        hook = model.lm_head.register_forward_hook(lambda *_: seen.append(1))
        model.generate_mask_diffusion(random_ids(3, 6, seed=4), eos_token_id=list(range(4, 12)), **DIFFUSION)
        hook.remove()
        assert model._last_nfe == len(seen)
