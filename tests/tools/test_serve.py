"""`transformers serve`, asked by OpenAI's client on the loopback interface, against `generate`."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from transformers import AutoTokenizer

import twotower
from twotower.checkpoints.export import export
from twotower.generation_twotower import MODES
from twotower.modeling_twotower import TwoTowerForBlockDiffusion

APP = Path(__file__).with_name("serve_app.py")
SECONDS = 120  # for each call, the first of which waits for the server
QUESTION = "Tom has 124 apples. He buys 57 more and then gives 38 to Ana. How many apples does Tom have now?"
CHAT = [{"role": "user", "content": QUESTION}]


@contextmanager
def serve(folder, work, *options):
    """A client of a server that ends with the block."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(work),
        "HF_HOME": str(work / "hf"),
        "HF_MODULES_CACHE": str(work / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    with (work / "stderr.txt").open("w") as errors:
        server = subprocess.Popen(
            [sys.executable, "-I", APP, folder, *options],
            env=environment,
            cwd=work,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            port = server.stdout.readline().strip()
            assert port, (work / "stderr.txt").read_text()
            url = f"http://127.0.0.1:{port}/v1"
            with openai.OpenAI(base_url=url, api_key="none", timeout=SECONDS, max_retries=0) as client:
                yield client
        finally:
            server.terminate()
            server.wait(timeout=SECONDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(export(twotower.demo_checkpoint(), tmp_path_factory.mktemp("export") / "model"))


@pytest.fixture(scope="module")
def client(folder, tmp_path_factory):
    with serve(folder, tmp_path_factory.mktemp("work")) as client:
        yield client


@pytest.fixture(scope="module")
def generated():
    """What `generate` answers."""
    tokenizer = AutoTokenizer.from_pretrained(twotower.demo_checkpoint())
    model = TwoTowerForBlockDiffusion.from_pretrained(twotower.demo_checkpoint()).eval()
    inputs = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    def generated(**options):
        output = model.generate(**inputs, tokenizer=tokenizer, **options)
        return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return generated


def asked(client, folder, **options):
    return client.chat.completions.create(model=folder, messages=CHAT, **options)


def streamed(chunks):
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_a_chat(client, folder, generated):
    answer = asked(client, folder)
    assert answer.choices[0].message.content == generated()
    assert answer.choices[0].message.content.endswith("#### 143")
    assert answer.choices[0].finish_reason == "stop"


def test_a_chat_as_a_stream(client, folder, generated):
    chunks = list(asked(client, folder, stream=True))
    assert streamed(chunks) == generated()
    assert sum(bool(chunk.choices[0].delta.content) for chunk in chunks) > 1
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("mode", MODES)
def test_knobs_as_a_generation_config(client, folder, generated, mode):
    knobs = {"mode": mode, "max_new_tokens": 9, "draft_steps": 2, "pad_token_id": 0, "eos_token_id": 2}
    body = {"generation_config": json.dumps(knobs)}
    assert asked(client, folder, extra_body=body).choices[0].message.content == generated(**knobs)
    assert streamed(asked(client, folder, stream=True, extra_body=body)) == generated(**knobs)


def test_limits_and_stops(client, folder, generated):
    short = asked(client, folder, max_tokens=5)
    assert short.choices[0].message.content == generated(max_new_tokens=5)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 5
    stopped = asked(client, folder, stop=["181"]).choices[0].message.content
    assert stopped == generated(stop_strings=["181"]) and stopped.endswith("181")


def test_a_completion(client, folder):
    answer = client.completions.create(model=folder, prompt=f"Question: {QUESTION}\nAnswer:", max_tokens=80)
    assert answer.choices[0].text.endswith("#### 143")


def test_a_reader_who_leaves_does_not_harm_the_next(client, folder, generated):
    with asked(client, folder, stream=True) as chunks:
        next(iter(chunks))
    assert asked(client, folder).choices[0].message.content == generated()


def test_continuous_batching(folder, generated, tmp_path):
    """Chats that come together share an engine; a reader who leaves, and one with a stream, do not harm the others."""
    with serve(folder, tmp_path, "continuous-batching") as client, ThreadPoolExecutor(4) as pool:
        with asked(client, folder, stream=True) as left:
            next(iter(left))
        whole = [pool.submit(asked, client, folder, max_tokens=limit) for limit in (80, 5)]
        stream = pool.submit(lambda: list(asked(client, folder, stream=True)))
        for answer, limit in zip(whole, (80, 5), strict=True):
            assert answer.result().choices[0].message.content == generated(max_new_tokens=limit)
        assert streamed(stream.result()) == generated()
        assert sum(bool(chunk.choices[0].delta.content) for chunk in stream.result()) > 1
        # With a config that says neither where the text ends nor how long it may be, the server gives None for both.
        unset = {"generation_config": json.dumps({"mode": "mask_diffusion"})}
        assert asked(client, folder, extra_body=unset).choices[0].message.content == generated()
