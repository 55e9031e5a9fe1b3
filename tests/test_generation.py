"""Decoding: NVIDIA's numbers token for token, what every row is promised, and what is refused."""

import numpy as np
import pytest
import torch
import transformers
from golden_cases import assert_golden_generations
from tiny import random_ids, tiny_model
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList, TextStreamer

from twotower.configuration_twotower import TwoTowerConfig
from twotower.decoding.asking import PerRow, Stateless
from twotower.decoding.config import CHECKED
from twotower.decoding.rules import one_of
from twotower.generation_twotower import MODES, STRATEGIES, TwoTowerGenerationConfig
from twotower.modeling_twotower import TwoTowerForBlockDiffusion

MASK, VOCAB = 3, 97


@pytest.fixture(scope="module")
def model():
    """Random weights, wide enough apart that float32 rounding flips no choice, with a denoiser of its own."""
    torch.manual_seed(0)
    config = TwoTowerConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        hybrid_override_pattern="ME*-M",
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=2,
        chunk_size=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=32,
        block_size=8,
    )
    model = TwoTowerForBlockDiffusion(config).eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.ndim > 1 and "conv1d" not in name:
                param.normal_(0, 3 / param.shape[-1] ** 0.5)
    return model


def prompts(lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, VOCAB, (length,), generator=generator) for length in lengths]


def padded(rows, side):
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for idx, row in enumerate(rows):
        columns = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[idx, columns], mask[idx, columns] = row, 1
    return ids, mask


def generate(model, ids, **kwargs):
    kwargs = {"max_new_tokens": 21, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True, **kwargs}
    return model.generate(ids, **kwargs)


def test_goldens_token_for_token_with_their_passes(goldens):
    model = TwoTowerForBlockDiffusion.from_pretrained(goldens / "checkpoint")
    assert_golden_generations(model, goldens, every=1)


@pytest.mark.parametrize("mode", MODES)
def test_a_row_gets_what_it_gets_alone(model, mode):
    rows = prompts([1, 13, 4, 9, 2, 30])
    stops = list(range(4, 20))
    # "auto" chooses for all rows together, which changes their passes, but not their texts.
    drafts = {"draft_length": model.config.block_size} if mode == "self_speculative" else {}
    alone = [generate(model, row[None], mode=mode, eos_token_id=stops, **drafts) for row in rows]
    assert any(output.sequences.shape[1] - len(row) < 21 for row, output in zip(rows, alone, strict=True))
    for order, side in ((range(6), "left"), (range(6), "right"), ((3, 0, 5, 2, 4, 1), "left")):
        ids, mask = padded([rows[idx] for idx in order], side)
        batch = generate(model, ids, mode=mode, attention_mask=mask, eos_token_id=stops, **drafts)
        assert torch.equal(batch.sequences[:, : ids.shape[1]], ids)
        for place, idx in enumerate(order):
            expected = alone[idx].sequences[0, len(rows[idx]) :]
            new = batch.sequences[place, ids.shape[1] :]
            assert torch.equal(new[: len(expected)], expected)
            assert (new[len(expected) :] == 0).all()
            counters = ["denoiser_forwards", "context_forwards", "tokens_per_forward"]
            counters += ["tokens_per_denoiser_forward"] if mode != "ar" else []
            for counter in counters:
                pair = batch[counter][place], alone[idx][counter][0]
                torch.testing.assert_close(*pair, rtol=0, atol=0, equal_nan=True, msg=counter)


@pytest.mark.parametrize("mode", MODES)
def test_fewer_new_tokens_are_a_prefix(model, mode):
    prompt = prompts([5])[0][None]
    longest = generate(model, prompt, mode=mode, max_new_tokens=19).sequences
    for count in (1, 7, 8, 9):
        shorter = generate(model, prompt, mode=mode, max_new_tokens=count).sequences
        assert torch.equal(shorter, longest[:, : 5 + count])


def test_passes_are_counted_and_the_last_block_is_not_read(model):
    prompt = prompts([5])[0][None]
    output = generate(model, prompt, mode="mask_diffusion", max_new_tokens=24, confidence_threshold=1.0)
    # One commit per pass at most, as no probability exceeds 1; the prompt and two of three blocks are read.
    assert output.denoiser_forwards.tolist() == [24]
    assert output.context_forwards.tolist() == [3]
    assert output.tokens_per_denoiser_forward.tolist() == [1.0]
    assert output.tokens_per_forward.tolist() == [pytest.approx(24 / 27)]
    assert generate(model, prompt, mode="ar", max_new_tokens=24).context_forwards.tolist() == [24]
    mock_ar = generate(model, prompt, mode="mock_ar", max_new_tokens=24)
    assert (mock_ar.denoiser_forwards.tolist(), mock_ar.context_forwards.tolist()) == ([24], [24])


def test_steps_per_block_bound_the_passes(model):
    prompt = prompts([5])[0][None]
    output = generate(model, prompt, max_new_tokens=16, steps_per_block=3, confidence_threshold=1.0)
    assert output.denoiser_forwards.tolist() == [6]


def test_prompt_logits_are_computed_for_the_last_position_only(model):
    seen = []
    hook = model.context_lm_head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    prompt = prompts([30])[0][None]
    generate(model, prompt, mode="ar", max_new_tokens=2)
    generate(model, prompt, mode="mask_diffusion", max_new_tokens=9)
    hook.remove()
    assert seen == [(1, 32), (1, 32)]


def test_the_mask_is_never_written_and_is_an_ordinary_prompt_token(model, monkeypatch):
    def prefers_the_mask(block_ids, past_key_values, timestep):
        logits = torch.zeros(*block_ids.shape, VOCAB)
        logits[..., MASK], logits[..., 50] = 9.0, 1.0
        return logits

    prompt = prompts([6])[0][None]
    prompt[0, 2] = MASK
    before = generate(model, prompt).sequences
    assert torch.equal(before[:, :6], prompt)
    monkeypatch.setattr(model, "denoise", prefers_the_mask)
    assert (generate(model, prompt).sequences[0, 6:] == 50).all()


@pytest.mark.parametrize("mode", MODES)
def test_text_is_cut_after_its_end_and_padded(model, mode):
    prompt = prompts([5, 5])
    free = generate(model, torch.stack(prompt), mode=mode).sequences[:, 5:]
    stop = int(free[0, 3])
    output = generate(model, torch.stack(prompt), mode=mode, eos_token_id=stop, pad_token_id=1).sequences[:, 5:]
    for row in range(2):
        end = (free[row] == stop).nonzero()
        end = int(end[0]) + 1 if len(end) else 21
        assert torch.equal(output[row, :end], free[row, :end])
        assert (output[row, end:] == 1).all()
    assert output.shape[1] == max((output != 1).sum(1))


def test_users_own_stopping_criteria_cut_inside_a_block(model):
    prompt = prompts([5])[0][None]

    def three_new_tokens(input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 8)

    output = generate(model, prompt, stopping_criteria=[three_new_tokens])
    assert output.sequences.shape == (1, 8)


@pytest.mark.parametrize("mode", MODES)
def test_sampling_is_reproducible_and_free(model, mode):
    ids, mask = padded(prompts([5, 3, 8]), "left")

    def sample(seed, **kwargs):
        torch.manual_seed(seed)
        return generate(model, ids, mode=mode, attention_mask=mask, do_sample=True, **kwargs).sequences

    assert torch.equal(sample(0, temperature=2.0), sample(0, temperature=2.0))
    assert not torch.equal(sample(0, temperature=2.0), sample(1, temperature=2.0))
    greedy = generate(model, ids, mode=mode, attention_mask=mask).sequences
    assert torch.equal(sample(0, top_k=1), greedy)
    assert torch.equal(sample(0, top_k=0, top_p=1e-6), greedy)


class ScriptedDenoiser:
    """The same logits at every pass and position."""

    def __init__(self, values):
        self.logits = torch.full((VOCAB,), -torch.inf)
        for token, value in values.items():
            self.logits[token] = value

    def __call__(self, block_ids, past_key_values, timestep):
        return self.logits.expand(*block_ids.shape, VOCAB).clone()


def test_top_k_and_top_p_keep_to_the_likeliest(model, monkeypatch):
    monkeypatch.setattr(model, "denoise", ScriptedDenoiser({10: 2.0, 11: 1.5, 12: 1.0, 13: 0.5}))
    prompt = prompts([5])[0][None].expand(8, -1)
    torch.manual_seed(0)
    for knobs, allowed in (({"top_k": 2}, {10, 11}), ({"top_k": 0, "top_p": 0.6}, {10, 11}), ({}, {10, 11, 12, 13})):
        new = generate(model, prompt, do_sample=True, temperature=1.5, max_new_tokens=32, **knobs).sequences[:, 5:]
        assert set(new.flatten().tolist()) == allowed


@pytest.mark.parametrize(("probability", "passes"), [(0.79, 8), (0.81, 1)])
def test_by_default_predictions_surer_than_four_fifths_are_committed_at_once(model, monkeypatch, probability, passes):
    odds = {10: float(np.log(probability)), 11: float(np.log(1 - probability))}
    monkeypatch.setattr(model, "denoise", ScriptedDenoiser(odds))
    assert generate(model, prompts([5])[0][None], max_new_tokens=8).denoiser_forwards.tolist() == [passes]


def test_confidence_is_untempered(model, monkeypatch):
    # Token 10 has probability 0.88 before the temperature, 0.51 after.
    monkeypatch.setattr(model, "denoise", ScriptedDenoiser({10: 2.0, 11: 0.0}))
    prompt = prompts([5])[0][None]
    torch.manual_seed(0)
    output = generate(model, prompt, do_sample=True, temperature=50.0, max_new_tokens=8, confidence_threshold=0.85)
    others = int((output.sequences[0, 5:] == 11).sum())
    assert 0 < others < 8
    # The first pass commits every 10 it drew; a pass that draws none commits one 11.
    assert output.denoiser_forwards.item() < 8


def test_logits_processors_apply_in_every_mode(model):
    class OnlyEven(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, 1::2] = -torch.inf
            return scores

    prompt = prompts([5])[0][None]
    for mode in MODES:
        new = generate(model, prompt, mode=mode, logits_processor=LogitsProcessorList([OnlyEven()])).sequences[:, 5:]
        assert (new % 2 == 0).all()


def test_an_empty_prompt_begins_with_the_beginning_of_text(model):
    empty = torch.empty(1, 0, dtype=torch.long)
    model.generation_config.bos_token_id = 1
    output = generate(model, empty)
    assert output.sequences.shape == (1, 22)
    assert torch.equal(output.sequences, generate(model, torch.ones(1, 1, dtype=torch.long)).sequences)
    plain = GenerationConfig(max_new_tokens=4)
    assert model.generate(empty, generation_config=plain)[0, 0] == 1
    model.generation_config.bos_token_id = None
    with pytest.raises(ValueError, match="bos_token_id"):
        generate(model, empty)
    with pytest.raises(ValueError, match=f"bos_token_id holds {VOCAB}, outside the vocabulary"):
        generate(model, empty, bos_token_id=VOCAB)
    with pytest.raises(ValueError, match=f"bos_token_id holds {VOCAB}, outside the vocabulary"):
        model.generate(bos_token_id=VOCAB, max_new_tokens=4)


def test_a_streamer_gets_the_prompt_then_drafts_and_committed_tokens(model):
    class Recorder(TextStreamer):
        def __init__(self):
            self.events = []

        def put(self, value):
            self.events.append(("put", value.flatten().tolist()))

        def put_draft(self, value):
            self.events.append(("draft", value.flatten().tolist()))

        def end(self):
            self.events.append(("end", []))

    prompt = prompts([5])[0][None]
    recorder = Recorder()
    output = generate(model, prompt, streamer=recorder, max_new_tokens=13, confidence_threshold=1.0)
    kinds = [kind for kind, _ in recorder.events]
    # The second block need not be filled beyond the text's end.
    second = kinds[10:-2].count("draft")
    assert 5 <= second <= 8
    assert kinds == ["put", *["draft"] * 8, "put", *["draft"] * second, "put", "end"]
    put = [token for kind, tokens in recorder.events if kind == "put" for token in tokens]
    assert put == output.sequences[0].tolist()
    assert sum(token == MASK for token in recorder.events[1][1]) == 7


def test_the_checkpoints_generation_config_decides_unless_the_call_does(model, tmp_path):
    prompt = prompts([5])[0][None]
    model.generation_config.mode = "ar"
    try:
        assert generate(model, prompt).denoiser_forwards.item() == 0
        assert generate(model, prompt, mode="mask_diffusion").denoiser_forwards.item() > 0
        model.save_pretrained(tmp_path)
    finally:
        model.generation_config.mode = None
    loaded = TwoTowerForBlockDiffusion.from_pretrained(tmp_path)
    assert isinstance(loaded.generation_config, TwoTowerGenerationConfig)
    assert generate(loaded, prompt).denoiser_forwards.item() == 0
    plain = GenerationConfig(max_new_tokens=4)
    assert loaded.generate(prompt, generation_config=plain).shape == (1, 9)


def test_a_larger_block_than_trained_is_warned_of(model, warned):
    prompt = prompts([5])[0][None]
    generate(model, prompt, block_size=9)
    assert "block_size 9 is larger than the 8" in warned.text
    warned.clear()
    generate(model, prompt, block_size=8)
    assert "block_size" not in warned.text


@pytest.mark.parametrize("call", ["generate", "labels", "denoise"])
def test_towers_of_different_dtypes_are_refused(call):
    """Some calls failed within torch, others computed in whichever was wider."""
    model = tiny_model("all kinds")
    for part in (model.denoiser_tower, model.lm_head, model.t_embedder, model.t_block, model.scale_shift_tables):
        part.to(torch.bfloat16)
    ids = random_ids(1, 6)
    calls = {
        "generate": lambda: model.generate(ids, max_new_tokens=4),
        "labels": lambda: model(ids, labels=ids),
        "denoise": lambda: model.denoise(ids, model(ids).cache),
    }
    said = r"context tower is in torch.float32, the denoiser in torch.bfloat16; .* model.to\(torch.float32\)"
    with pytest.raises(ValueError, match=said):
        calls[call]()
    assert model.generate(ids, mode="ar", max_new_tokens=4).shape[0] == 1, "which needs the context tower alone"


def test_our_warnings_go_by_transformers_verbosity(model, warned):
    transformers.logging.set_verbosity_error()
    generate(model, prompts([5])[0][None], block_size=9)
    assert not warned.records


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mode": "beam"}, "mode is 'beam'"),
        ({"block_size": 0}, "block_size is 0"),
        ({"block_size": 2.5}, "block_size is 2.5"),
        ({"steps_per_block": 0}, "steps_per_block is 0"),
        ({"confidence_threshold": 0.0}, "confidence_threshold is 0.0"),
        ({"confidence_threshold": 1.01}, "confidence_threshold is 1.01"),
        ({"confidence_threshold": "high"}, "confidence_threshold is 'high'"),
        ({"confidence_threshold": float("nan")}, "confidence_threshold is nan"),
        ({"do_sample": True, "temperature": 0.0}, "temperature is 0.0"),
        ({"do_sample": True, "temperature": -1.0}, "temperature is -1.0"),
        ({"num_beams": 2}, "num_beams=2"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size is 0"),
        ({"draft_steps": 0}, "draft_steps is 0"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"seed": [1, True]}, r"seed is \[1, True\]"),
        ({"mode": "self_speculative", "block_size": 1}, "block_size is 1"),
        ({"use_cache": False}, "use_cache=False"),
        ({"output_attentions": True}, "output_attentions=True"),
        ({"treshold": 0.5}, "treshold"),
        ({"seed": [1, None]}, r"seed is \[1, None\]"),
        ({"seed": 2**64}, f"seed is {2**64}"),
        ({"num_return_sequences": 0, "do_sample": True}, "num_return_sequences is 0"),
        ({"num_return_sequences": 1.5, "do_sample": True}, "num_return_sequences is 1.5"),
        ({"do_sample": True, "temperature": "hot"}, "temperature is 'hot'"),
        ({"step_callback": 5}, "step_callback is 5"),
        ({"eos_token_id": []}, r"eos_token_id is \[\]; give a token id or a list of some"),
        ({"eos_token_id": [5, "a"]}, r"eos_token_id is \[5, 'a'\]"),
        ({"pad_token_id": [1]}, r"pad_token_id is \[1\]; give a token id"),
        ({"generation_config": {"mode": "ar"}}, r"generation_config is \{'mode': 'ar'\}; give a GenerationConfig, or"),
        ({"logits_processor": len}, "logits_processor is .*; give a list"),
        ({"logits_processor": [3]}, "logits_processor holds 3, which cannot be called"),
        ({"stopping_criteria": ["."]}, "stopping_criteria holds '.', which cannot be called"),
        ({"prefix_allowed_tokens_fn": [4]}, r"prefix_allowed_tokens_fn is \[4\], which cannot be called"),
        ({"streamer": print}, "streamer is .*; give an object with the methods put and end"),
        # Arguments of `forward` that mean nothing here.
        ({"generator": torch.Generator()}, "generator is no argument of .*give seed"),
        ({"corruptions": 3}, "corruptions is no argument"),
        ({"logits_to_keep": 3}, "logits_to_keep is no argument"),
        ({"position_ids": torch.zeros(1, 5)}, "position_ids is no argument"),
    ],
)
def test_a_bad_knob_is_refused_by_name_before_any_work(model, kwargs, message, monkeypatch):
    monkeypatch.setattr(model.context_tower, "forward", lambda *_: pytest.fail("the context tower ran"))
    with pytest.raises(ValueError, match=message):
        generate(model, prompts([5])[0][None], **kwargs)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[5, VOCAB]], None, f"holds {VOCAB}, outside the vocabulary of {VOCAB}"),
        ([[5, -2]], None, "holds -2, outside"),
        ([[5, 6]], [[1, 1, 1]], r"attention_mask has shape \(1, 3\)"),
        ([[5, 6]], [[1], [1]], r"attention_mask has shape \(2, 1\)"),
        ([[5, 6, 7], [5, 6, 7]], [[1, 1, 1], [1, 0, 1]], r"row 1 of attention_mask has holes: \[1, 0, 1\]"),
        ([[5, 6], [5, 6]], [[0, 0], [1, 1]], "row 0 of attention_mask masks all"),
        ([5, 6], None, r"input_ids has shape \(2,\)"),
        ([[5.0, 6.0]], None, "input_ids are torch.float32; give token ids"),
        # Without a mask, the padding id is padding.
        ([[5, 0, 6]], None, r"input_ids hold the padding id 0; give attention_mask.*row 0 .* has holes: \[1, 0, 1\]"),
    ],
)
def test_a_bad_prompt_is_refused_by_name_before_any_work(model, ids, mask, message, monkeypatch):
    monkeypatch.setattr(model.context_tower, "forward", lambda *_: pytest.fail("the context tower ran"))
    mask = None if mask is None else torch.tensor(mask)
    with pytest.raises(ValueError, match=message):
        generate(model, torch.tensor(ids), attention_mask=mask)


def test_generation_config_checks_what_it_is_given():
    with pytest.raises(ValueError, match="mode is 'x'"):
        TwoTowerGenerationConfig(mode="x")
    config = TwoTowerGenerationConfig(mode="ar", block_size=4, confidence_threshold=0.5)
    assert TwoTowerGenerationConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("mode", MODES)
def test_without_a_mask_a_row_gets_what_it_gets_alone(model, mode):
    """The padding id is padding then, whatever the other rows hold."""
    ids, mask = padded(prompts([4, 7, 5]), "left")
    together = generate(model, ids, mode=mode)
    masked = generate(model, ids, mode=mode, attention_mask=mask)
    assert torch.equal(together.sequences, masked.sequences)
    for idx in range(3):
        alone = generate(model, ids[idx : idx + 1], mode=mode).sequences[0]
        assert torch.equal(together.sequences[idx, : len(alone)], alone)


@pytest.mark.parametrize("mode", MODES)
def test_a_padding_id_that_also_ends_the_text_is_no_padding(model, mode):
    ids = torch.tensor([[5, 9, 6, 9]])
    whole = generate(model, ids, mode=mode, attention_mask=torch.ones_like(ids), eos_token_id=9, pad_token_id=9)
    for ends in (9, [9], torch.tensor(9), torch.tensor([9])):
        found = generate(model, ids, mode=mode, eos_token_id=ends, pad_token_id=9).sequences
        assert torch.equal(found, whole.sequences)


@pytest.mark.parametrize("how", ["argument", "config"])
def test_a_max_length_of_the_call_goes_before_the_checkpoints_new_tokens(model, how, monkeypatch):
    monkeypatch.setattr(model.generation_config, "max_new_tokens", 20)
    prompt = prompts([5])[0][None]
    limit = {"max_length": 8} if how == "argument" else {"generation_config": GenerationConfig(max_length=8)}
    assert model.generate(prompt, eos_token_id=None, mode="ar", **limit).shape == (1, 8)
    assert model.generate(prompt, eos_token_id=None, mode="ar").shape == (1, 25)
    assert model.generate(prompt, eos_token_id=None, mode="ar", max_length=8, max_new_tokens=6).shape == (1, 11)


def test_seeds_of_other_kinds(model):
    ids = torch.stack(prompts([5, 5]))
    options = {"do_sample": True, "temperature": 3.0}
    expected = generate(model, ids, seed=[7, 2**63 + 5], **options).sequences
    signed = [7, 2**63 + 5 - 2**64]
    for seed in (signed, torch.tensor(signed), np.array([7, 2**63 + 5], dtype=np.uint64), tuple(signed)):
        assert torch.equal(generate(model, ids, seed=seed, **options).sequences, expected)
    config = TwoTowerGenerationConfig(seed=torch.tensor([1, 2]))
    assert config.seed == [1, 2]
    one = generate(model, ids, seed=np.int64(7), **options).sequences
    assert torch.equal(one, generate(model, ids, seed=7, **options).sequences)


def test_processors_and_criteria_by_position(model):
    ids = prompts([5])[0][None]
    processors = LogitsProcessorList([Prefer(11)])
    criteria = StoppingCriteriaList([lambda text, _: text.shape[1] >= 8])
    assert model.generate(ids, GenerationConfig(max_new_tokens=9), processors, criteria).tolist()[0][5:] == [11] * 3

    def only(row, text):
        return [12 + row]

    assert model.generate(ids, GenerationConfig(max_new_tokens=2), None, None, only).tolist()[0][5:] == [12] * 2


class Prefer(LogitsProcessor):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.tensor([self.token]), 1e3)


# Passes run in inference mode, of which nothing is to be seen.


@pytest.mark.parametrize("mode", ["mask_diffusion", "self_speculative", "mock_ar", "ar"])
def test_what_comes_back_is_made_of_ordinary_tensors(model, mode):
    output = generate(model, prompts([6])[0][None], mode=mode, output_scores=True, output_logits=True)
    given = [
        output.sequences,
        output.commit_steps,
        output.confidences,
        output.log_probs,
        *output.scores,
        *output.logits,
    ]
    held = [part for view in output.cache.views() if view is not None for part in view]
    assert not any(tensor.is_inference() for tensor in given + held)
    output.sequences[0, 0] = 1  # which could not be done to an inference tensor


class Watches:
    """As a streamer, a callback, a processor and a criterion: whether what it is shown is an ordinary tensor."""

    def __init__(self):
        self.ordinary = []

    def put(self, value):
        self.ordinary.append(not value.is_inference() and not torch.is_grad_enabled())

    put_draft = put

    def end(self):
        pass

    def __call__(self, *given):
        tensors = vars(given[0]).values() if len(given) == 1 else given
        self.ordinary += [not value.is_inference() for value in tensors if isinstance(value, torch.Tensor)]
        return given[1] if len(given) == 2 else None


@pytest.mark.parametrize("mode", ["mask_diffusion", "self_speculative"])
def test_code_of_the_users_is_shown_ordinary_tensors(model, mode):
    prompt = prompts([6])[0][None]
    streamer, callback, processor, criterion = (Watches() for _ in range(4))
    generate(model, prompt, mode=mode, streamer=streamer)
    generate(model, prompt, mode=mode, step_callback=callback, draft_length=4)
    generate(model, prompt, mode=mode, logits_processor=[PerRow(lambda row: processor)])
    generate(model, prompt, mode=mode, stopping_criteria=[Stateless(lambda ids, scores: criterion(ids, ids) is None)])
    for watch in (streamer, callback, processor, criterion):
        assert watch.ordinary and all(watch.ordinary)


def test_a_hook_of_the_users_is_shown_ordinary_tensors(model):
    seen = []
    hook = model.context_tower.layers[0].register_forward_hook(lambda _, __, output: seen.append(output[0]))
    generate(model, prompts([6])[0][None], mode="ar", max_new_tokens=3)
    hook.remove()
    assert len(seen) == 3 and not any(tensor.is_inference() for tensor in seen)


@pytest.mark.parametrize(
    ("mode", "knobs"),
    [
        (
            "self_speculative",
            {"draft_steps": 2, "draft_length": 5, "confidence_threshold": 0.3, "acceptance_ratio": 0.2},
        ),
        ("mask_diffusion", {"block_size": 4, "steps_per_block": 2, "confidence_threshold": 0.5}),
        ("mock_ar", {}),
        ("ar", {}),
    ],
)
def test_nothing_else_names_modes(model, mode, knobs, monkeypatch, warned):
    """A strategy under another name is the same mode."""
    monkeypatch.setitem(STRATEGIES, "another", STRATEGIES[mode])
    monkeypatch.setitem(CHECKED, "mode", one_of((*MODES, "another")))
    call = {"max_new_tokens": 11, "return_dict_in_generate": True, "pad_token_id": 0, **knobs}
    expected, found = (model.generate(random_ids(2, 6), mode=name, **call) for name in (mode, "another"))
    assert set(found) == set(expected)
    for name, value in expected.items():
        if name != "cache":
            torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True)
    assert not warned.records
