"""Generations of NVIDIA's code: calls that are to give its tokens, in as many denoiser passes."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from twotower.modeling_twotower import TwoTowerForBlockDiffusion

# Beside which `max_new_tokens` may be fewer, where the interpreter of kernels is slow.
QUICKEST = pytest.mark.parametrize(
    ("mode", "tokens"), [("ar", 4), ("mock_ar", 3), ("mask_diffusion", 64), ("self_speculative", 6)]
)
KNOBS = ("mode", "max_new_tokens", "block_size", "steps_per_block", "confidence_threshold", "eos_token_id")


def assert_golden_generations(model, folder: Path, every: int = 6, **flags) -> None:
    """
    Args:
        model: of the goldens' checkpoint.
        folder: the goldens'.
        every: so many-th case, of which the sixth ones are of all modes that there are goldens of.
        flags: of each call of `generate`, beside the case's.
    """
    tensors, cases = load_file(folder / "tensors.safetensors"), json.loads((folder / "generations.json").read_text())
    model.generation_config.eos_token_id = None
    for case in cases[::every]:
        options = {name: case[name] for name in KNOBS if name in case} | {"pad_token_id": 0, **flags}
        prompt = tensors[f"p{case['prompt']}.ids"].long()[None]
        output = model.generate(prompt, **options, return_dict_in_generate=True)
        expected = case["new_tokens"]
        if case.get("eos_token_id") in expected:
            expected = expected[: expected.index(case["eos_token_id"]) + 1]
        assert output.sequences[0, prompt.shape[1] :].tolist() == expected, case
        assert case["nfe"] in (None, *output.denoiser_forwards.tolist()), case


def assert_quickest_golden(kernels: str, folder: Path, mode: str, tokens: int) -> None:
    """The case of a mode that takes the fewest passes, as far as so many tokens; drafts give what "ar" does."""
    of = "ar" if mode == "self_speculative" else mode
    cases = [case for case in json.loads((folder / "generations.json").read_text()) if case["mode"] == of]
    case = min(cases, key=lambda case: case["nfe"] or 0)
    model = TwoTowerForBlockDiffusion.from_pretrained(folder / "checkpoint", kernels=kernels)
    prompt = load_file(folder / "tensors.safetensors")[f"p{case['prompt']}.ids"].long()[None]
    options = {"eos_token_id": None} | {name: case[name] for name in KNOBS if name in case}
    options |= {"mode": mode, "max_new_tokens": tokens}
    if mode == "self_speculative":
        options["draft_length"] = 4
    text = model.generate(prompt, **options)[0, prompt.shape[1] :].tolist()
    assert len(text) > 2
    assert text == case["new_tokens"][: len(text)]
