"""int8 through `from_pretrained(quantization_config=...)`: torchao, bitsandbytes, quanto on the embedded checkpoint.

What these say about accuracy is little; benchmarks/quantized.py has figures on 400 problems.
"""

import copy
import logging
from functools import cache

import pytest
import torch
from tiny import random_ids, tiny_model
from torch import nn
from torchao.quantization import FqnToConfig, Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    NemotronHForCausalLM,
    QuantoConfig,
    TorchAoConfig,
)

import twotower
from twotower.checkpoints.conversion import convert_backbone
from twotower.demo.evaluation import MAX_NEW_TOKENS
from twotower.demo.marking import Marks
from twotower.demo.tasks import held_out_tasks
from twotower.evaluation.answers import cut_after_end, end_ids, tokenized
from twotower.evaluation.baseline import context_tower_in_transformers
from twotower.generation_twotower import MODES
from twotower.modeling_twotower import TwoTowerForBlockDiffusion

CONFIGS = {
    "torchao": TorchAoConfig(Int8WeightOnlyConfig()),
    "torchao, activations too": TorchAoConfig(Int8DynamicActivationInt8WeightConfig()),
    "bitsandbytes": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
    "quanto": QuantoConfig(weights="int8"),
}
ONLY_WEIGHTS = ("torchao", "quanto")
EVERY_EXPERT = {r"re:.*mixer\.experts\.(up|down)_proj": Int8WeightOnlyConfig()}
KEPT = ("context_lm_head", "lm_head", "t_embedder.mlp.0", "t_embedder.mlp.2", "t_block.1")
PROBLEMS = 8


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """bitsandbytes says at every product that it rounds its activations to float16."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


@pytest.fixture(scope="module")
def load():
    """One model per kind of quantisation, or None for float32."""

    @cache
    def load(kind):
        config = {} if kind is None else {"quantization_config": CONFIGS[kind]}
        return AutoModelForCausalLM.from_pretrained(twotower.demo_checkpoint(), **config).eval()

    return load


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """
    A tiny checkpoint with every kind of layer, of sizes that all of the libraries take: torch's product of bfloat16 by
    int8, which is quanto's, ends the process on a CPU with AVX-512 where inputs are no multiple of 16.
    """
    path = tmp_path_factory.mktemp("tiny")
    tiny_model("all kinds", intermediate_size=32, moe_shared_expert_intermediate_size=32).save_pretrained(path)
    return path


def quantized_layers(model):
    """Names of modules whose weight is no longer a plain tensor."""
    return {name for name, module in model.named_modules() if is_quantized(getattr(module, "weight", None))}


def is_quantized(weight):
    if weight is None:
        return False
    return weight.dtype == torch.int8 or type(weight.data) is not torch.Tensor


def test_the_context_tower_alone(folder):
    arguments = {"quantization_config": CONFIGS["torchao"], "device_map": "towers"}
    whole = TwoTowerForBlockDiffusion.from_pretrained(folder, **arguments)
    alone = TwoTowerForBlockDiffusion.from_pretrained(folder, towers="context", **arguments)
    assert quantized_layers(alone) == {name for name in quantized_layers(whole) if name.startswith("context_tower.")}
    assert torch.equal(alone(random_ids(2, 6)).logits, whole(random_ids(2, 6)).logits)


@pytest.fixture(scope="module")
def answers(load):
    """What a kind answers in a mode, and how many of the answers are right; each asked once."""
    tokenizer = AutoTokenizer.from_pretrained(twotower.demo_checkpoint())
    tasks = held_out_tasks("words", PROBLEMS, seed=1)

    @cache
    def answers(kind, mode):
        model = load(kind)
        (batch,) = tokenized([task.prompt for task in tasks], PROBLEMS, tokenizer, model)
        sequences = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, mode=mode)
        found = [cut_after_end(row, end_ids(model)) for row in sequences[:, batch.input_ids.shape[1] :].tolist()]
        return found, sum(Marks.of(found, tasks, tokenizer).right)

    return answers


@pytest.mark.parametrize("kind", CONFIGS)
class TestInt8:
    @pytest.mark.parametrize("mode", ["ar", "mask_diffusion"])
    def test_answers_nearly_as_float32_does(self, answers, kind, mode):
        (_, correct), (_, expected) = answers(kind, mode), answers(None, mode)
        assert expected >= PROBLEMS - 3
        # A problem is 12 points of accuracy here: this tells a model that works from one that does not.
        assert correct >= expected - 2

    def test_self_speculative_is_ar(self, answers, kind):
        equal = sum(map(list.__eq__, answers(kind, "self_speculative")[0], answers(kind, "ar")[0]))
        # Rounding activations to int8 can put what differs by a float's rounding on either side.
        assert equal == PROBLEMS if kind in ONLY_WEIGHTS else equal >= PROBLEMS - 1

    def test_every_mode_writes(self, load, kind):
        ids = random_ids(1, 6, vocab_size=500)
        texts = {
            mode: load(kind).generate(ids, mode=mode, max_new_tokens=8, eos_token_id=None)[0].tolist()
            for mode in MODES
        }
        assert all(len(text) == 14 for text in texts.values())

    def test_the_layers_of_the_towers_are_int8_and_nothing_else(self, load, kind):
        model, plain = load(kind), load(None)
        linear = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
        assert quantized_layers(model) == linear - set(KEPT)
        for name, parameter in plain.named_parameters():
            if name.rpartition(".")[0] not in linear - set(KEPT):
                assert torch.equal(model.get_parameter(name), parameter), name

    def test_what_the_user_names_is_spared_as_well(self, folder, kind):
        config = copy.deepcopy(CONFIGS[kind])
        field = "llm_int8_skip_modules" if kind == "bitsandbytes" else "modules_to_not_convert"
        setattr(config, field, ["denoiser_tower"])
        model = TwoTowerForBlockDiffusion.from_pretrained(folder, quantization_config=config)
        assert {name.split(".")[0] for name in quantized_layers(model)} == {"context_tower"}
        assert getattr(config, field) == ["denoiser_tower"], "the user's own config is not changed"


@pytest.mark.parametrize("kind", ONLY_WEIGHTS)
def test_a_row_is_what_it_is_alone(load, kind):
    ids = random_ids(3, 12, vocab_size=500)
    together = load(kind).generate(ids, mode="ar", max_new_tokens=12)
    for row, alone in zip(together, ids, strict=True):
        expected = load(kind).generate(alone[None], mode="ar", max_new_tokens=12)[0]
        assert torch.equal(row[: len(expected)], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_in_half_precision(folder, kind, dtype):
    model = TwoTowerForBlockDiffusion.from_pretrained(folder, dtype=dtype, quantization_config=CONFIGS[kind]).eval()
    plain = TwoTowerForBlockDiffusion.from_pretrained(folder).eval()
    kept = {model.get_submodule(name).weight.dtype for name in KEPT}
    assert kept == {dtype}
    logits, expected = model(random_ids(2, 8)).logits, plain(random_ids(2, 8)).logits
    assert torch.corrcoef(torch.stack([logits.flatten(), expected.flatten()]))[0, 1] > 0.95
    assert model.generate(random_ids(1, 4), mode="self_speculative", max_new_tokens=6).shape[0] == 1


def test_a_config_as_a_dict(folder):
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    model = TwoTowerForBlockDiffusion.from_pretrained(folder, quantization_config=config)
    assert quantized_layers(model) and not quantized_layers(model) & set(KEPT)


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("kind", ["torchao", "bitsandbytes"])
def test_saved_in_either_layout_it_loads_again(folder, tmp_path, kind, original):
    model = TwoTowerForBlockDiffusion.from_pretrained(folder, quantization_config=CONFIGS[kind]).eval()
    model.save_pretrained(tmp_path, save_original_format=original)
    again = TwoTowerForBlockDiffusion.from_pretrained(tmp_path).eval()
    assert quantized_layers(again) == quantized_layers(model)
    assert torch.allclose(again(random_ids(2, 8)).logits, model(random_ids(2, 8)).logits, atol=1e-4)


def test_quanto_cannot_be_saved(folder, tmp_path):
    model = TwoTowerForBlockDiffusion.from_pretrained(folder, quantization_config=CONFIGS["quanto"])
    with pytest.raises(ValueError, match="quanto and is not serializable"):
        model.save_pretrained(tmp_path)


def test_bitsandbytes_gives_back_plain_weights(folder, tmp_path):
    model = TwoTowerForBlockDiffusion.from_pretrained(folder, quantization_config=CONFIGS["bitsandbytes"]).eval()
    plain = model.dequantize()
    plain.save_pretrained(tmp_path)
    again = TwoTowerForBlockDiffusion.from_pretrained(tmp_path).eval()
    assert not quantized_layers(again)
    assert torch.equal(again(random_ids(2, 8)).logits, plain(random_ids(2, 8)).logits)


class TestRoutedExperts:
    """They are no linear layers: torchao reaches them by name, the others leave them as they are."""

    config = TorchAoConfig(FqnToConfig(EVERY_EXPERT))

    def experts(self, model):
        return model.context_tower.layers[model.config.layers_block_type.index("moe")].mixer.experts

    @pytest.mark.parametrize("original", [True, False])
    def test_by_name_they_are_int8_also_when_saved(self, folder, tmp_path, original):
        plain = TwoTowerForBlockDiffusion.from_pretrained(folder).eval()
        model = TwoTowerForBlockDiffusion.from_pretrained(folder, quantization_config=self.config).eval()
        assert is_quantized(self.experts(model).up_proj) and not quantized_layers(model)
        expected, logits = plain(random_ids(2, 8)).logits, model(random_ids(2, 8)).logits
        assert 0 < (logits - expected).abs().max() < 0.05 * expected.abs().max()
        model.save_pretrained(tmp_path, save_original_format=original)
        again = TwoTowerForBlockDiffusion.from_pretrained(tmp_path).eval()
        assert is_quantized(self.experts(again).up_proj)
        assert torch.allclose(again(random_ids(2, 8)).logits, logits, atol=1e-4)

    def test_self_speculative_is_ar(self, folder):
        model = TwoTowerForBlockDiffusion.from_pretrained(folder, quantization_config=self.config).eval()
        ids, knobs = random_ids(2, 6), {"max_new_tokens": 20, "eos_token_id": None}
        assert torch.equal(
            model.generate(ids, mode="self_speculative", **knobs), model.generate(ids, mode="ar", **knobs)
        )

    def test_an_implementation_that_cannot_is_refused(self, folder):
        with pytest.raises(ValueError, match="'grouped_mm', which cannot multiply by quantised experts"):
            TwoTowerForBlockDiffusion.from_pretrained(
                folder, quantization_config=self.config, experts_implementation="grouped_mm"
            )


def test_a_quantized_backbone_is_refused(tmp_path):
    context_tower_in_transformers(tiny_model()).save_pretrained(tmp_path)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"the backbone is quantised, .* without quantization_config"):
        TwoTowerForBlockDiffusion.from_backbone(tmp_path, quantization_config=config)
    with pytest.raises(ValueError, match="the backbone is quantised"):
        TwoTowerForBlockDiffusion.from_backbone(
            NemotronHForCausalLM.from_pretrained(tmp_path, quantization_config=config)
        )
    NemotronHForCausalLM.from_pretrained(tmp_path, quantization_config=config).save_pretrained(tmp_path / "quantised")
    with pytest.raises(ValueError, match="quantised is quantised, which no denoiser is trained from"):
        convert_backbone(tmp_path / "quantised", tmp_path / "both")
    assert not (tmp_path / "both").exists()
