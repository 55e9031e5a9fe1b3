"""Every flag of transformers' GenerationConfig: it has its documented effect, or it is refused by name."""

import pytest
import torch
from tiny import random_ids, tiny_model, without_special_tokens
from transformers import GenerationConfig, WatermarkingConfig
from transformers.generation import CompileConfig, ContinuousBatchingConfig

from twotower import Stateless
from twotower.generation_twotower import MODES

PROMPT = 6
# Say where a config comes from, not what to generate.
METADATA = {"_from_model_config", "transformers_version"}
SAMPLED = {"do_sample": True, "temperature": 3.0, "seed": 0}
PLAIN = GenerationConfig()

# Flags whose effect is another text: a value, and what else the call needs for the effect to show.
CHANGE_TEXT = {
    "bad_words_ids": ([[token] for token in range(4, 40)], {}),
    "begin_suppress_tokens": (list(range(4, 40)), {}),
    "do_sample": (True, {"temperature": 3.0, "seed": 0}),
    "encoder_no_repeat_ngram_size": (1, {"sequence_bias": {(20,): 100.0}}),  # which a prompt holds
    "encoder_repetition_penalty": (50.0, {}),
    "epsilon_cutoff": (0.2, SAMPLED),
    "eta_cutoff": (0.9, SAMPLED),
    "exponential_decay_length_penalty": ((1, 50.0), {"eos_token_id": 9}),
    "forced_eos_token_id": (47, {}),
    "min_p": (0.99, SAMPLED),
    "no_repeat_ngram_size": (1, {}),
    "repetition_penalty": (50.0, {}),
    "sequence_bias": ({(11,): 100.0}, {}),
    "suppress_tokens": (list(range(4, 40)), {}),
    "temperature": (0.01, {"do_sample": True, "seed": 0}),
    "top_h": (0.01, SAMPLED),
    "top_k": (1, SAMPLED),
    "top_p": (0.01, SAMPLED),
    "typical_p": (0.01, SAMPLED),
    "watermarking_config": (WatermarkingConfig(bias=50.0), {}),
}
# Flags with an effect of another kind, each with a test of its own below.
OTHER_EFFECT = {
    "bos_token_id",
    "eos_token_id",
    "forced_bos_token_id",
    "max_length",
    "max_new_tokens",
    "max_time",
    "min_length",
    "min_new_tokens",
    "num_return_sequences",
    "output_logits",
    "output_scores",
    "pad_token_id",
    "prefill_chunk_size",
    "remove_invalid_values",
    "renormalize_logits",
    "return_dict_in_generate",
    "stop_strings",
}
# Flags without meaning for two towers: a value, and what else transformers wants before it passes it on.
REFUSED = {
    "assistant_confidence_threshold": (0.5, {}),
    "assistant_early_exit": (2, {}),
    "assistant_ensemble_weight": (0.5, {}),
    "assistant_lookbehind": (5, {}),
    "cache_config": ({"backend": "quanto"}, {}),
    "cache_implementation": ("paged", {}),
    "compile_config": (CompileConfig(), {}),
    "constraints": ([object()], {}),
    "continuous_batching_config": (ContinuousBatchingConfig(), {}),
    "decoder_start_token_id": (5, {}),
    "disable_compile": (True, {"compile": True}),
    "diversity_penalty": (0.5, {}),
    "dola_layers": ("low", {}),
    "early_stopping": (True, {}),
    "force_words_ids": ([[5]], {}),
    "guidance_scale": (2.0, {}),
    "is_assistant": (True, {}),
    "length_penalty": (2.0, {}),
    "low_memory": (True, {}),
    "max_cache_len": (64, {}),
    "max_matching_ngram_size": (2, {}),
    "num_assistant_tokens": (5, {}),
    "num_assistant_tokens_schedule": ("heuristic", {}),
    "num_beam_groups": (2, {}),
    "num_beams": (2, {}),
    "output_attentions": (True, {}),
    "output_hidden_states": (True, {}),
    "penalty_alpha": (0.6, {}),
    "prompt_lookup_num_tokens": (3, {}),
    "speculation_type": ("eagle", {}),
    "target_lookbehind": (5, {}),
    "token_healing": (True, {}),
    "use_cache": (False, {}),
    "use_mtp": (True, {}),
}


@pytest.fixture(scope="module")
def model():
    return without_special_tokens(tiny_model("each kind once"))


@pytest.fixture(scope="module")
def prompt():
    return random_ids(2, PROMPT, seed=1)


def generate(model, ids, **kwargs):
    return model.generate(ids, **{"max_new_tokens": 10, "pad_token_id": 0, "return_dict_in_generate": True, **kwargs})


def new_tokens(model, ids, **kwargs):
    return generate(model, ids, **kwargs).sequences[:, ids.shape[1] :]


def test_every_flag_of_transformers_is_classified():
    groups = (METADATA, CHANGE_TEXT.keys(), OTHER_EFFECT, REFUSED.keys())
    known = [name for group in groups for name in group]
    assert len(known) == len(set(known))
    assert set(known) == PLAIN.to_dict().keys() | vars(PLAIN).keys()


@pytest.fixture(scope="module")
def texts_without(model, prompt):
    """What a call gives without a flag, which is generated once for all of them."""
    texts = {}

    def text(mode, extra):
        key = mode, repr(extra)
        if key not in texts:
            texts[key] = generate(model, prompt, mode=mode, **extra).sequences
        return texts[key]

    return text


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("flag", CHANGE_TEXT)
def test_a_flag_changes_the_text(model, prompt, texts_without, flag, mode):
    value, extra = CHANGE_TEXT[flag]
    with_it = generate(model, prompt, mode=mode, **{flag: value}, **extra).sequences
    assert not torch.equal(with_it, texts_without(mode, extra))
    config = GenerationConfig(max_new_tokens=10, pad_token_id=0, **{flag: value}, **extra)
    by_config = model.generate(prompt, generation_config=config, mode=mode)
    assert torch.equal(by_config, with_it)


@pytest.mark.parametrize("in_config", [False, True])
@pytest.mark.parametrize("flag", REFUSED)
def test_a_flag_without_meaning_is_refused_by_name(model, prompt, flag, in_config, monkeypatch):
    monkeypatch.setattr(model.context_tower, "forward", lambda *_: pytest.fail("the context tower ran"))
    value, extra = REFUSED[flag]
    flags = {flag: value, **extra}
    for mode in ("mask_diffusion", "ar"):
        with pytest.raises(ValueError, match=flag):
            if in_config:
                config = GenerationConfig(max_new_tokens=4)
                for name, setting in flags.items():
                    setattr(config, name, setting)
                model.generate(prompt, generation_config=config, mode=mode)
            else:
                generate(model, prompt, mode=mode, **flags)


@pytest.mark.parametrize("flag", REFUSED)
def test_transformers_default_of_a_refused_flag_is_accepted(model, prompt, texts_without, flag):
    default = GenerationConfig._get_default_generation_params().get(flag)
    assert torch.equal(generate(model, prompt, **{flag: default}).sequences, texts_without("mask_diffusion", {}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("assistant_model", torch.nn.Identity()),
        ("assistant_tokenizer", object()),
        ("negative_prompt_ids", torch.ones(2, 3, dtype=torch.long)),
        ("negative_prompt_attention_mask", torch.ones(2, 3)),
        ("inputs_embeds", torch.zeros(2, 3, 32)),
        ("cache_implementation", "paged"),
        ("custom_generate", lambda model, input_ids, logits_processor, **kwargs: logits_processor(input_ids, None)),
    ],
)
def test_an_argument_without_meaning_is_refused_by_name(model, prompt, name, value):
    for mode in ("mask_diffusion", "ar"):
        with pytest.raises(ValueError, match=name):
            generate(model, prompt, mode=mode, **{name: value})


def test_inputs_embeds_alone_are_refused(model):
    with pytest.raises(ValueError, match="inputs_embeds"):
        model.generate(inputs_embeds=torch.zeros(2, 3, 32), max_new_tokens=4)


@pytest.mark.parametrize("mode", MODES)
def test_lengths(model, prompt, mode):
    free = new_tokens(model, prompt, mode=mode)
    assert torch.equal(new_tokens(model, prompt, mode=mode, max_new_tokens=3), free[:, :3])
    by_length = model.generate(prompt, mode=mode, max_length=PROMPT + 3, pad_token_id=0)
    assert torch.equal(by_length[:, PROMPT:], free[:, :3])
    # Everything ends the text, but not before the least length.
    stops = [token for token in range(48) if token != 20]
    for least in ({"min_new_tokens": 4}, {"min_length": PROMPT + 4}):
        short = new_tokens(model, prompt, mode=mode, eos_token_id=stops, **least)
        assert (short[:, :4] == 20).all()
        assert short.shape[1] == 5


@pytest.mark.parametrize("mode", MODES)
def test_max_time_ends_the_text(model, prompt, mode):
    output = generate(model, prompt, mode=mode, max_time=1e-9, max_new_tokens=1000)
    assert output.sequences.shape[1] < PROMPT + 8
    if mode in ("ar", "self_speculative"):  # which may choose the mask's id, as any other
        new = output.sequences[:, PROMPT:]
        assert torch.equal(new, new_tokens(model, prompt, mode="ar")[:, : new.shape[1]])
    else:
        assert not (output.sequences == model.config.mask_token_id).any()


@pytest.mark.parametrize("mode", MODES)
def test_special_tokens(model, prompt, mode):
    free = new_tokens(model, prompt[:1], mode=mode)
    end = int((free[0] == free[0, 4]).nonzero()[0]) + 1
    ended = new_tokens(model, prompt[:1], mode=mode, eos_token_id=int(free[0, 4]))
    assert torch.equal(ended, free[:, :end])
    assert (new_tokens(model, prompt[:1, :1], mode=mode, forced_bos_token_id=8)[0, 0] == 8).all()
    both = new_tokens(model, prompt, mode=mode, eos_token_id=int(free[0, 4]), pad_token_id=2)
    assert (both[0, end:] == 2).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("in_config", [False, True])
def test_an_empty_prompt_begins_with_the_calls_bos_token_id(model, mode, in_config):
    empty = torch.empty(1, 0, dtype=torch.long)
    flags = {"generation_config": GenerationConfig(bos_token_id=7)} if in_config else {"bos_token_id": 7}
    assert generate(model, empty, mode=mode, **flags).sequences[0, 0] == 7


@pytest.mark.parametrize("mode", MODES)
def test_num_return_sequences(model, prompt, mode):
    greedy = new_tokens(model, prompt, mode=mode)
    copies = new_tokens(model, prompt, mode=mode, num_return_sequences=2, do_sample=True, top_k=1)
    assert torch.equal(copies, greedy.repeat_interleave(2, 0))
    drawn = new_tokens(model, prompt, mode=mode, num_return_sequences=3, **SAMPLED)
    assert len(drawn) == 6
    assert torch.equal(drawn[::3], new_tokens(model, prompt, mode=mode, **SAMPLED))
    assert len(drawn[:3].unique(dim=0)) == len(drawn[3:].unique(dim=0)) == 3


@pytest.mark.parametrize("mode", MODES)
def test_outputs(model, prompt, mode):
    plain = generate(model, prompt, mode=mode)
    assert (plain.scores, plain.logits) == (None, None)
    assert torch.equal(generate(model, prompt, mode=mode, return_dict_in_generate=False), plain.sequences)
    output = generate(model, prompt, mode=mode, output_scores=True, output_logits=True, suppress_tokens=[5, 6])
    scores, logits = torch.stack(output.scores, 1), torch.stack(output.logits, 1)
    assert scores.shape == logits.shape == (2, 10, model.config.vocab_size)
    assert torch.equal(scores.argmax(-1), output.sequences[:, PROMPT:])
    assert (scores[..., 5:7] == -torch.inf).all()
    assert logits[..., 5:7].isfinite().all()
    chosen = output.sequences[:, PROMPT:, None]
    torch.testing.assert_close(output.log_probs, scores.log_softmax(-1).gather(-1, chosen)[..., 0])
    torch.testing.assert_close(output.confidences, logits.softmax(-1).gather(-1, chosen)[..., 0])
    normalized = generate(model, prompt, mode=mode, output_scores=True, renormalize_logits=True)
    torch.testing.assert_close(torch.stack(normalized.scores, 1).logsumexp(-1), torch.zeros(2, 10), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_remove_invalid_values(model, prompt, mode):
    def poison(input_ids, scores):
        scores[:, 10] = torch.nan
        return scores

    def scores_of(**kwargs):
        output = generate(model, prompt, mode=mode, output_scores=True, logits_processor=[Stateless(poison)], **kwargs)
        return torch.stack(output.scores, 1)

    assert scores_of()[..., 10].isnan().all()
    # transformers puts a user's processors behind this one; it repairs what a bias of infinity makes of the logits.
    banned = {(12,): -float("inf")}
    repaired = generate(model, prompt, mode=mode, output_scores=True, sequence_bias=banned, remove_invalid_values=True)
    finite = torch.stack(repaired.scores, 1).isfinite()
    # The mask stays impossible to the denoiser.
    possible = torch.arange(model.config.vocab_size) != model.config.mask_token_id
    assert torch.equal(finite, (possible if mode == "mask_diffusion" else possible | True).expand_as(finite))


@pytest.mark.parametrize("mode", MODES)
def test_the_prompt_in_chunks(model, prompt, mode):
    seen = []
    hook = model.context_tower.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    chunked = generate(model, prompt, mode=mode, prefill_chunk_size=2)
    hook.remove()
    assert seen[:2] == [2, 2]
    assert torch.equal(chunked.sequences, generate(model, prompt, mode=mode).sequences)
