"""Texts by `generate(..., compile=True)`, however its programs are made."""

from random import Random

import torch
from mixed_requests import differences, mixed_model, mixed_request
from tiny import random_ids, tiny_model, without_special_tokens

from twotower import TwoTowerEngine

SAMPLED = {"do_sample": True, "temperature": 1.3, "top_k": 20, "seed": 5}
# Prompts of 11, 6 and 2 tokens.
IDS = random_ids(3, 11)
MASK = torch.ones_like(IDS)
MASK[1, :5] = MASK[2, :9] = 0
# Of each mode, so that it denoises where it does.
KNOBS = {
    "ar": {},
    "mock_ar": {},
    "mask_diffusion": {"confidence_threshold": 0.1},
    "self_speculative": {"draft_length": 4, "draft_steps": 2},
}


def text_of(model, mode, **flags):
    flags = {"attention_mask": MASK, "max_new_tokens": 14, "return_dict_in_generate": True, **KNOBS[mode], **flags}
    return model.generate(flags.pop("input_ids", IDS), mode=mode, **flags)


def small_model(pattern="M*E", **fields):
    """Of few layers, since every one is traced for every program."""
    return without_special_tokens(tiny_model(hybrid_override_pattern=pattern, **fields))


def assert_mixed_requests_get_what_they_get_alone(count, made):
    """
    Of every mode, with processors, criteria and callbacks of the user's; some of them do not ask for programs.

    Args:
        count: of requests that join and leave.
        made: says how many programs there are; none before an engine has been asked for some.
    """
    model, rng = mixed_model(), Random(3)
    requests = [mixed_request(rng) for _ in range(count)]
    alone = [model.generate(request.ids, **request.arguments()) for request in requests]
    assert made() == 0
    with TwoTowerEngine(model, slots=5) as engine:
        handles = [
            engine.add_request(request.ids, **request.arguments(), compile=number % 3 > 0)
            for number, request in enumerate(requests)
        ]
        for handle, request, expected in zip(handles, requests, alone, strict=True):
            assert not differences(handle.result(timeout=600), expected), request.plain
