"""What is taken for token ids and for their mask at every door of the model, and what is refused by name."""

import numpy as np
import pytest
import torch
from tiny import random_block, random_ids, tiny_model
from transformers import BatchEncoding

from twotower.inputs_twotower import check_attention_mask

IDS = random_ids(2, 5)
MODES = ("mask_diffusion", "self_speculative", "mock_ar", "ar")
NO_TENSORS = [
    (IDS.tolist(), "is a list; give a tensor"),
    (IDS.numpy(), "is a ndarray; give a tensor"),
    ("text", "is a str; give a tensor"),
    ({"input_ids": IDS}, r"is a dict; unpack it, as model\(\*\*inputs\)"),
    (BatchEncoding({"input_ids": IDS}), "is a BatchEncoding; unpack it"),
    (BatchEncoding({"input_ids": IDS.tolist()}), "is a BatchEncoding; unpack it"),
]
NO_IDS = [
    *NO_TENSORS,
    (IDS[0], r"has shape \(5,\); expected \(batch, tokens\)"),
    (IDS[None], r"has shape \(1, 2, 5\); expected"),
    (IDS[:0], r"has shape \(0, 5\); expected \(batch, tokens\) with at least one row"),
    (IDS.float(), "are torch.float32; give token ids as torch.int64"),
    (IDS > 0, "are torch.bool; give token ids"),
    (IDS.to(torch.uint8), "are torch.uint8; give token ids"),
]


@pytest.fixture(scope="module")
def model():
    model = tiny_model()
    model.generation_config.pad_token_id = None
    return model


@pytest.fixture
def cache(model):
    return model(IDS).past_key_values


@pytest.mark.parametrize(("ids", "message"), NO_IDS)
def test_what_is_no_batch_of_ids_is_refused_by_name(model, cache, ids, message):
    doors = {
        "input_ids": [model, model.generate, model.generate_ar, model.generate_mask_diffusion],
        "block_ids": [lambda ids: model.denoise(ids, cache)],
        "labels": [lambda labels: model(IDS, labels=labels)],
    }
    for name, calls in doors.items():
        for call in calls:
            with pytest.raises(ValueError, match=f"^{name} {message}"):
                call(ids)
    with pytest.raises(ValueError, match=f"^input_ids {message}"):
        model.generate(input_ids=ids)


@pytest.mark.parametrize("empty", [torch.empty(1, 0), torch.empty(1, 0, dtype=torch.long)])
def test_an_empty_prompt_of_a_tokenizer_is_a_prompt(model, empty):
    """Of whatever dtype: that of an empty list is float32."""
    assert model.generate(empty, bos_token_id=1, max_new_tokens=2).shape == (1, 3)


@pytest.mark.parametrize(("mask", "message"), NO_TENSORS)
def test_what_is_no_mask_is_refused_by_name(model, cache, mask, message):
    for call in (model, model.generate, lambda ids, **kwargs: model.denoise(ids, cache, **kwargs)):
        with pytest.raises(ValueError, match=f"^attention_mask {message}"):
            call(IDS, attention_mask=mask)


def test_a_mask_without_dimensions_is_refused(model):
    with pytest.raises(ValueError, match=r"attention_mask has shape \(\)"):
        model(IDS, attention_mask=torch.tensor(1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_what_transformers_accepts_is_accepted(model, mode, dtype):
    """Masks of any dtype, and ids of the two that embeddings take."""
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    flags = {"mode": mode, "max_new_tokens": 4, "eos_token_id": None}
    expected = model.generate(IDS, attention_mask=mask, **flags)
    assert torch.equal(model.generate(IDS, attention_mask=mask.to(dtype), **flags), expected)
    assert torch.equal(model.generate(IDS.int(), attention_mask=mask, **flags), expected)
    assert torch.equal(model(IDS.int(), attention_mask=mask.to(dtype)).logits, model(IDS, attention_mask=mask).logits)


@pytest.mark.parametrize(
    ("timestep", "message"),
    [
        ("late", "timestep is 'late'; give a number"),
        (torch.ones(3), r"timestep has shape \(3,\); give a number, or one for each of the 2 rows"),
        ([[0.5], [0.5]], r"timestep has shape \(2, 1\)"),
    ],
)
def test_a_time_that_is_none_is_refused(model, cache, timestep, message):
    with pytest.raises(ValueError, match=message):
        model.denoise(random_block(2, 4), cache, timestep)


def test_a_time_is_a_number_or_one_per_row(model, cache):
    block = random_block(2, 4)
    expected = model.denoise(block, cache, 0.5)
    for timestep in (torch.tensor(0.5), [0.5, 0.5], np.array([0.5, 0.5]), torch.tensor([0.5])):
        assert torch.equal(model.denoise(block, cache, timestep), expected)


@pytest.mark.parametrize("mask", [[1.0, float("nan")], [1.0, 0.5], [1, -1], [0.0, -1e9], [1 + 0j, 0j]])
def test_a_mask_of_other_numbers_than_0_and_1_is_refused(mask):
    with pytest.raises(ValueError, match="attention_mask holds other numbers than 1, on tokens, and 0, on padding"):
        check_attention_mask(torch.tensor([[5, 6]]), torch.tensor([mask]))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_a_mask_of_any_dtype_is_taken(dtype):
    found = check_attention_mask(torch.tensor([[5, 6]]), torch.tensor([[1, 0]], dtype=dtype))
    assert found.tolist() == [[True, False]]
