"""transformers' text-generation pipeline over an exported folder, without this package, against `generate`."""

import json
import os
from pathlib import Path

import pytest
from tiny import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from twotower.checkpoints.export import export

HERE = Path(__file__).resolve().parent
TEXTS = ["a cab", "the quick brown fox", "", "zzz 123", "b"]
CHATS = [
    [{"role": "user", "content": "a cab?"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is 2 + 2?"}],
    [{"role": "user", "content": "b"}],
]
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role + ':' + m.content + ';' }}{% endfor %}assistant:"
GREEDY = {"max_new_tokens": 11, "do_sample": False}
MODES = ("mask_diffusion", "ar", "mock_ar", "self_speculative")
CALLS = {
    "one text": {"inputs": TEXTS[1], "call": GREEDY},
    "no text": {"inputs": "", "call": GREEDY},
    "texts": {"inputs": TEXTS, "call": GREEDY},
    "a batch": {"inputs": TEXTS[:2] + TEXTS[3:], "call": GREEDY, "batch_size": 2},
    "one chat": {"inputs": CHATS[0], "call": GREEDY},
    "chats": {"inputs": CHATS, "call": GREEDY, "batch_size": 2},
    "knobs": {
        "inputs": TEXTS[:2],
        "call": {**GREEDY, "block_size": 8, "steps_per_block": 2, "confidence_threshold": 0.5},
        "batch_size": 2,
    },
    "an end": {"inputs": TEXTS[:2], "call": {**GREEDY, "eos_token_id": list(range(4, 262, 2))}, "batch_size": 2},
    "sampling": {
        "inputs": TEXTS[:2],
        "call": {**GREEDY, "do_sample": True, "temperature": 1.3, "seed": 5},
        "batch_size": 2,
    },
    "a dict": {"inputs": TEXTS[:2], "call": {**GREEDY, "return_dict_in_generate": True}, "batch_size": 2},
    **{f"mode {mode}": {"inputs": TEXTS[:2], "call": {**GREEDY, "mode": mode}, "batch_size": 2} for mode in MODES},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An exported model whose tokens are mostly bytes."""
    model = tiny_model(hybrid_override_pattern="ME*-", vocab_size=262)
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return export(model, tmp_path_factory.mktemp("export") / "tiny-model", tokenizer=byte_tokenizer())


def byte_tokenizer():
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator([], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", mask_token="<mask>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def results(folder, fresh_python, tmp_path_factory):
    """Of every call, all made in one process."""
    work = tmp_path_factory.mktemp("work")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(work),
        "HF_HOME": str(work / "hf"),
        "HF_MODULES_CACHE": str(work / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    calls = json.dumps(list(CALLS.values()))
    done = fresh_python("-I", HERE / "run_pipeline.py", folder, input=calls, env=environment, cwd=work)
    assert done.returncode == 0, done.stderr
    return dict(zip(CALLS, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_each_answer_is_what_generate_gives_its_prompt_alone(results, name):
    result = results[name]
    assert result["pipeline"] == result["alone"]
    assert all(result["pipeline"])


def test_the_calls_differ(results):
    """So that no argument was lost on the way."""
    texts = {name: result["pipeline"][0] for name, result in results.items()}
    assert texts["mode ar"] == texts["mode self_speculative"]
    assert len({texts[name] for name in ("texts", "knobs", "an end", "sampling", "mode ar", "mode mock_ar")}) == 6
    assert texts["a batch"] == texts["texts"] == texts["mode mask_diffusion"] == texts["a dict"]
    assert "confidences" in results["a dict"]["records"][0]
