"""The internals of transformers we lean on, and the two names of the cache; see compat_twotower.py."""

import ast
import inspect
import tomllib
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import torch
import transformers
from tiny import random_block, random_ids, tiny_config, tiny_model

from twotower import compat_twotower
from twotower.cache_twotower import TwoTowerCache
from twotower.compat_twotower import FIRST_UNKNOWN_RELEASE, OLDEST_RELEASE, check_release
from twotower.decoding.text_processors import VECTORISED
from twotower.generation_twotower import MODES, TwoTowerGenerateOutput
from twotower.modeling_twotower import TwoTowerOutput

ROOT = Path(__file__).resolve().parents[1]

# What we call, subclass or override, and its parameters.
SIGNATURES = {
    "conversion_mapping.get_checkpoint_conversion_mapping": "model_type",
    "conversion_mapping.register_checkpoint_conversion_mapping": "model_type_or_class_name mapping overwrite",
    "core_model_loading.WeightConverter": "source_patterns target_patterns operations force_cpu",
    "dynamic_module_utils.get_relative_imports": "module_file",
    "integrations.accelerate.force_accelerate_hooks": "child_module_names",
    "integrations.moe._grouped_mm": "input weight offs",
    "integrations.moe.batched_mm_experts_forward": "self hidden_states top_k_index top_k_weights",
    "integrations.moe.grouped_mm_experts_forward": "self hidden_states top_k_index top_k_weights",
    "integrations.moe.ExpertsInterface.register": "key value",
    "modeling_layers.GradientCheckpointingLayer.__call__": "self args kwargs",
    "modeling_utils._add_variant": "weights_name variant",
    "modeling_utils.slice_logits_to_keep": "hidden_states logits_to_keep",
    "modeling_utils.PreTrainedModel._get_resized_embeddings": "self old_embeddings new_num_tokens pad_to_multiple_of "
    "mean_resizing",
    "modeling_utils.PreTrainedModel._get_resized_lm_head": "self old_lm_head new_num_tokens transposed mean_resizing",
    "modeling_utils.PreTrainedModel._resize_token_embeddings": "self new_num_tokens pad_to_multiple_of mean_resizing",
    "modeling_utils.PreTrainedModel.get_correct_attn_implementation": "self requested_attention is_init_check",
    "utils.can_return_tuple": "func",
    "utils.is_accelerate_available": "min_version",
    "utils.requires_backends": "obj backends",
    "generation.streamers.BaseStreamer.put": "self value",
    "generation.streamers.BaseStreamer.end": "self",
    "generation.stopping_criteria.EosTokenCriteria": "eos_token_id",
    "generation.stopping_criteria.MaxTimeCriteria": "max_time initial_timestamp",
    "generation.logits_process.PrefixConstrainedLogitsProcessor": "prefix_allowed_tokens_fn num_beams",
    "generation.logits_process.RepetitionPenaltyLogitsProcessor": "penalty prompt_ignore_length",
    "generation.logits_process.EncoderRepetitionPenaltyLogitsProcessor": "penalty encoder_input_ids",
    "generation.logits_process.NoRepeatNGramLogitsProcessor": "ngram_size",
    "generation.logits_process.EncoderNoRepeatNGramLogitsProcessor": "encoder_ngram_size encoder_input_ids",
    "generation.logits_process.SequenceBiasLogitsProcessor": "sequence_bias",
    "generation.logits_process.NoBadWordsLogitsProcessor": "bad_words_ids eos_token_id",
    "generation.logits_process.MinLengthLogitsProcessor": "min_length eos_token_id device",
    "generation.logits_process.MinNewTokensLengthLogitsProcessor": "prompt_length_to_skip min_new_tokens eos_token_id "
    "device",
    "generation.logits_process.SuppressTokensAtBeginLogitsProcessor": "begin_suppress_tokens begin_index device",
    "generation.logits_process.ForcedBOSTokenLogitsProcessor": "bos_token_id",
    "generation.logits_process.ForcedEOSTokenLogitsProcessor": "max_length eos_token_id device",
    "generation.logits_process.ExponentialDecayLengthPenalty": "exponential_decay_length_penalty eos_token_id "
    "input_ids_seq_length",
    "generation.logits_process.TopHLogitsWarper": "top_h filter_value",
    "generation.logits_process.EtaLogitsWarper": "epsilon filter_value min_tokens_to_keep device",
    "Cache": "layers layer_class_to_replicate offloading offload_only_non_sliding",
    "GenerationConfig.from_model_config": "model_config",
    "GenerationConfig.validate": "self strict user_set_attributes",
    "GenerationMixin.generate": "self inputs generation_config logits_processor stopping_criteria "
    "prefix_allowed_tokens_fn synced_gpus assistant_model streamer negative_prompt_ids "
    "negative_prompt_attention_mask custom_generate kwargs",
    "GenerationMixin._sample": "self input_ids logits_processor stopping_criteria generation_config synced_gpus "
    "streamer model_kwargs",
    "GenerationMixin._prepare_generation_config": "self generation_config kwargs",
    "GenerationMixin._validate_model_kwargs": "self model_kwargs",
    "GenerationMixin._prepare_cache_for_generation": "self generation_config model_kwargs generation_mode batch_size "
    "max_cache_length",
    "GenerationMixin._prepare_generated_length": "self generation_config has_default_max_length "
    "has_default_min_length model_input_name input_ids_length inputs_tensor",
    "GenerationMixin._get_stopping_criteria": "self generation_config stopping_criteria tokenizer",
    "GenerationMixin.init_continuous_batching": "self generation_config continuous_batching_config workload_hints",
    "GenerationMixin._get_logits_processor": "self generation_config input_ids_seq_length encoder_input_ids "
    "prefix_allowed_tokens_fn logits_processor device model_kwargs negative_prompt_ids "
    "negative_prompt_attention_mask",
    "PreTrainedModel._can_set_experts_implementation": "",
    "PreTrainedModel._grouped_mm_can_dispatch": "self",
    "PreTrainedModel._init_weights": "self module",
    "PreTrainedModel.get_correct_experts_implementation": "self requested_experts",
    "PreTrainedModel.set_experts_implementation": "self experts_implementation",
    "PreTrainedModel.to": "self args kwargs",
    "quantizers.auto.AutoQuantizationConfig.from_dict": "quantization_config_dict",
    "NemotronHConfig._pattern_to_list": "pattern",
    "NemotronHConfig.get_config_dict": "pretrained_model_name_or_path kwargs",
    "models.nemotron_h.modeling_nemotron_h.NemotronHAttention": "config layer_idx",
    "models.nemotron_h.modeling_nemotron_h.NemotronHExperts.forward": "self hidden_states top_k_index top_k_weights",
    "models.nemotron_h.modeling_nemotron_h.NemotronHMLP": "config intermediate_size kwargs",
    "models.nemotron_h.modeling_nemotron_h.NemotronHMamba2Mixer": "config layer_idx initialize_mixer_weights",
    "models.nemotron_h.modeling_nemotron_h.NemotronHMoE": "config layer_idx",
    "models.nemotron_h.modeling_nemotron_h.NemotronHMoE.forward": "self hidden_states",
    "models.nemotron_h.modeling_nemotron_h.NemotronHRMSNorm": "hidden_size eps",
    "models.nemotron_h.modeling_nemotron_h.NemotronHTopkRouter": "config",
}
# What our subclasses find in the modules they inherit from.
ATTRIBUTES = {
    "NemotronHAttention": "head_dim scaling q_proj k_proj v_proj o_proj",
    "NemotronHMLP": "up_proj down_proj",
    "NemotronHMamba2Mixer": "A_log D activation chunk_size conv1d conv_dim conv_kernel_size dt_bias head_dim in_proj "
    "intermediate_size n_groups norm num_heads out_proj ssm_state_size time_step_limit",
    "NemotronHMoE": "experts gate",
    "NemotronHTopkRouter": "e_score_correction_bias hidden_dim norm_topk_prob num_experts num_group "
    "routed_scaling_factor top_k topk_group weight",
    "NemotronHExperts": "act_fn down_proj up_proj",
    "NemotronHRMSNorm": "variance_epsilon weight",
}
# A processor of each class that decoding/text_processors.py answers for, and what it reads of it.
PROCESSORS = {
    "RepetitionPenaltyLogitsProcessor": ((1.2,), "penalty prompt_ignore_length"),
    "EncoderRepetitionPenaltyLogitsProcessor": ((1.2, torch.tensor([[1]])), "penalty encoder_input_ids"),
    "NoRepeatNGramLogitsProcessor": ((2,), "ngram_size"),
    "EncoderNoRepeatNGramLogitsProcessor": ((2, torch.tensor([[1, 2]])), "batch_size generated_ngrams"),
    "SequenceBiasLogitsProcessor": (({(1,): 1.0},), "sequence_bias"),
    "NoBadWordsLogitsProcessor": (([[1, 2]],), "sequence_bias"),
    "MinLengthLogitsProcessor": ((2, 1), "eos_token_id min_length"),
    "MinNewTokensLengthLogitsProcessor": ((2, 3, 1), "eos_token_id prompt_length_to_skip min_new_tokens"),
    "SuppressTokensAtBeginLogitsProcessor": (([1], 2), "begin_suppress_tokens begin_index"),
    "ForcedBOSTokenLogitsProcessor": ((1,), "bos_token_id"),
    "ForcedEOSTokenLogitsProcessor": ((5, 1), "eos_token_id max_length"),
    "TopHLogitsWarper": ((0.5,), "filter_value top_h top_n"),
    "EtaLogitsWarper": ((0.5,), "epsilon filter_value min_tokens_to_keep"),
    "ExponentialDecayLengthPenalty": (((2, 1.1), 1, 3), "eos_token_id regulation_start regulation_factor"),
}


def found(path: str):
    """The object behind a dotted path below `transformers`: a module's attribute, or an attribute of that."""
    *modules, name = path.split(".")
    try:
        home = import_module(".".join(["transformers", *modules]))
    except ModuleNotFoundError:
        home = found(".".join(modules))
    return getattr(home, name)


@pytest.mark.parametrize("path", SIGNATURES)
def test_signature(path):
    takes = " ".join(inspect.signature(found(path)).parameters)
    assert takes == SIGNATURES[path], (
        f"transformers {transformers.__version__}: {path} takes ({takes}), and our code was written for "
        f"({SIGNATURES[path]}); see what changed, then mend compat_twotower.py or its caller, and this list"
    )


@pytest.fixture(scope="module")
def all_kinds():
    return tiny_model("all kinds")


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_attributes(all_kinds, kind):
    module = next(m for m in all_kinds.modules() if isinstance(m, getattr(compat_twotower, kind)))
    missing = [name for name in ATTRIBUTES[kind].split() if not hasattr(module, name)]
    assert not missing, f"transformers {transformers.__version__}: {kind} has no {', '.join(missing)}, which we use"


@pytest.mark.parametrize("kind", PROCESSORS)
def test_attributes_of_processors(kind):
    arguments, names = PROCESSORS[kind]
    processor = getattr(compat_twotower.logits_process, kind)(*arguments)
    missing = [name for name in names.split() if not hasattr(processor, name)]
    assert not missing, f"transformers {transformers.__version__}: {kind} has no {', '.join(missing)}, which we use"


def test_attributes_of_all_vectorised_processors_are_listed():
    assert {kind.__name__ for kind in VECTORISED} == set(PROCESSORS)


def test_private_imports_are_in_one_module():
    public = {"transformers", "transformers.utils"}
    names = {"logging"}
    folders = [ROOT, *(ROOT / name for name in ("checkpoints", "cli", "decoding", "demo", "kernels"))]
    for file in [file for folder in folders for file in folder.glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if file.name == "compat_twotower.py" or not isinstance(node, ast.ImportFrom) or node.level > 0:
                continue
            if (node.module or "").split(".")[0] == "transformers":
                imported = {alias.name for alias in node.names}
                fine = node.module == "transformers" or (node.module in public and imported <= names)
                assert fine, f"{file.name} imports {imported} of {node.module}; do so in compat_twotower.py"


@pytest.mark.parametrize("release", ["5.23.0", "5.23.1", "5.24.0", "5.24.0.dev0", "5.24.9"])
def test_known_releases(release):
    check_release(release)


@pytest.mark.parametrize("release", ["4.57.6", "5.22.2", "5.25.0", "5.25.0.dev0", "6.0.0"])
def test_an_unknown_release_is_refused_in_one_sentence(release):
    with pytest.raises(ImportError, match=rf"knows transformers from 5.23 to before 5.25, and {release} is installed"):
        check_release(release)


def test_the_declared_range_is_that_of_the_code():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    assert f"transformers>={OLDEST_RELEASE},<{FIRST_UNKNOWN_RELEASE}" in declared


class TestBothNamesOfTheCache:
    """No use of either name gives a warning of transformers' or of ours."""

    @pytest.fixture(autouse=True)
    def no_warning(self, capfd):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
        assert "deprecated" not in capfd.readouterr().err

    @pytest.mark.parametrize("name", ["cache", "past_key_values"])
    def test_as_an_argument(self, all_kinds, name):
        ids, more, block = random_ids(2, 5), random_ids(2, 3, seed=1), random_block(2, 4)
        read = all_kinds(ids).cache
        assert torch.equal(all_kinds.denoise(block, **{name: read}), all_kinds.denoise(block, read))
        assert torch.equal(
            all_kinds.predict_next(more[:, :1], **{name: read}), all_kinds.predict_next(more[:, :1], read)
        )
        expected = all_kinds(torch.cat([ids, more], dim=1)).logits[:, 5:]
        assert torch.allclose(all_kinds(more, **{name: read}).logits, expected, atol=1e-4)
        tower_cache = TwoTowerCache(all_kinds.config)
        all_kinds.context_tower(ids, **{name: tower_cache})
        assert tower_cache.width == 5

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("name", ["cache", "past_key_values"])
    def test_of_generate(self, all_kinds, mode, name):
        knobs = {"mode": mode, "max_new_tokens": 6, "return_dict_in_generate": True, "eos_token_id": None}
        first = all_kinds.generate(random_ids(1, 5), **knobs)
        held = first.cache.get_seq_length()
        longer = torch.cat([first.sequences, random_ids(1, 3, seed=2)], dim=1)
        second = all_kinds.generate(longer, **{name: first.cache}, **knobs)
        assert second.cache is first.cache and first.cache.get_seq_length() > held
        assert torch.equal(second.sequences, all_kinds.generate(longer, **knobs).sequences)

    def test_given_twice(self, all_kinds):
        cache = TwoTowerCache(tiny_config("all kinds"))
        for call in (all_kinds, all_kinds.generate):
            with pytest.raises(ValueError, match="cache and past_key_values were both given"):
                call(random_ids(1, 5), cache=cache, past_key_values=cache)
        with pytest.raises(ValueError, match="labels and past_key_values"):
            all_kinds(random_ids(1, 5), labels=random_ids(1, 5), past_key_values=cache)

    @pytest.mark.parametrize("kind", [TwoTowerOutput, TwoTowerGenerateOutput])
    def test_of_a_result(self, kind):
        first, second = TwoTowerCache(tiny_config()), TwoTowerCache(tiny_config())
        output = kind(**{"sequences": random_ids(1, 2)} if kind is TwoTowerGenerateOutput else {}, cache=first)
        assert output.past_key_values is output["past_key_values"] is output["cache"] is output.cache is first
        assert "past_key_values" in output and output.get("past_key_values") is first
        output.past_key_values = second
        assert output.cache is output["cache"] is second
        output["past_key_values"] = first
        assert output.cache is first
        assert list(output.keys()).count("cache") == 1 and "past_key_values" not in list(output.keys())


def test_router_weights_have_the_models_dtype_on_every_release(all_kinds, tmp_path):
    all_kinds.save_pretrained(tmp_path)
    model = type(all_kinds).from_pretrained(tmp_path, dtype=torch.bfloat16)
    in_float32 = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    assert in_float32 and all(name.endswith("e_score_correction_bias") for name in in_float32)
