"""The embedded checkpoint and some prompts of different lengths, for the tests of tools."""

import pytest
import torch
from grammars import PROMPTS
from transformers import AutoTokenizer

import twotower
from twotower.modeling_twotower import TwoTowerForBlockDiffusion


@pytest.fixture(scope="module")
def model():
    return TwoTowerForBlockDiffusion.from_pretrained(twotower.demo_checkpoint(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(twotower.demo_checkpoint(), padding_side="left")


@pytest.fixture(scope="module")
def inputs(tokenizer):
    """By number of prompts."""
    options = {"padding": True, "return_tensors": "pt", "add_special_tokens": False}
    return {count: tokenizer(PROMPTS[:count], **options) for count in (1, 2, 3)}
