"""transformers' text-generation pipeline around a loaded model: what else its callers pass, against `generate`."""

from threading import Thread

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, TextIteratorStreamer, pipeline

import twotower
from twotower.generation_twotower import MODES
from twotower.modeling_twotower import TwoTowerForBlockDiffusion

QUESTION = "Tom has 124 apples. He buys 57 more and then gives 38 to Ana. How many apples does Tom have now?"
PROMPT = f"Question: {QUESTION}\nAnswer:"
GREEDY = {"do_sample": False, "max_new_tokens": 24}


@pytest.fixture(scope="module")
def pipe():
    folder = twotower.demo_checkpoint()
    model = TwoTowerForBlockDiffusion.from_pretrained(folder)
    return pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(folder))


@pytest.fixture(scope="module")
def written(pipe):
    """What `generate` writes after a prompt."""

    def written(prompt, **options):
        ids = pipe.tokenizer(prompt, return_tensors="pt").input_ids
        output = pipe.model.generate(ids, tokenizer=pipe.tokenizer, **options)
        texts = pipe.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        return texts if len(texts) > 1 else texts[0]

    return written


def text(records):
    return records[0]["generated_text"]


def test_by_default_it_writes_until_the_end(pipe):
    assert text(pipe(PROMPT)).endswith("#### 143")


def test_the_prompt_may_be_returned_too(pipe, written):
    expected = written(PROMPT, **GREEDY)
    assert text(pipe(PROMPT, return_full_text=False, **GREEDY)) == expected
    assert text(pipe(PROMPT, return_full_text=True, **GREEDY)) == PROMPT + expected
    ids = pipe(PROMPT, return_tensors=True, **GREEDY)[0]["generated_token_ids"]
    assert pipe.tokenizer.decode(ids, skip_special_tokens=True) == PROMPT + expected


def test_a_stop_sequence(pipe, written):
    expected = written(PROMPT, stop_strings=["= 181"], **GREEDY)
    assert expected.endswith("= 181")
    assert text(pipe(PROMPT, stop_sequence="= 181", return_full_text=False, **GREEDY)) == expected


def test_several_texts_of_each_prompt(pipe, written):
    sampled = {"do_sample": True, "temperature": 2.0, "seed": 4, "max_new_tokens": 8, "num_return_sequences": 3}
    prompts = [PROMPT, "Question: Mia"]
    results = pipe(prompts, batch_size=2, return_full_text=False, **sampled)
    expected = [written(prompt, **sampled) for prompt in prompts]
    assert len(set(expected[0])) > 1
    assert [[record["generated_text"] for record in records] for records in results] == expected


def test_a_prefix(pipe, written):
    assert text(pipe(QUESTION, prefix="Question: ", return_full_text=False, **GREEDY)) == written(
        f"Question: {QUESTION}", **GREEDY
    )


@pytest.mark.parametrize("options", [{"max_length": 60}, {"max_new_tokens": None, "max_length": 60}])
def test_max_length_counts_the_prompt(pipe, written, options):
    ids = pipe(PROMPT, return_tensors=True, do_sample=False, **options)[0]["generated_token_ids"]
    assert len(ids) == 60


def test_a_generation_config(pipe, written):
    config = GenerationConfig(**GREEDY)
    assert text(pipe(PROMPT, generation_config=config, return_full_text=False)) == written(PROMPT, **GREEDY)


def test_a_beginning_of_the_answer(pipe):
    chat = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": " After buying, 124 + 57"}]
    answer = text(pipe(chat, continue_final_message=True, **GREEDY))[-1]["content"]
    assert answer.startswith(" After buying, 124 + 57 = 181")


@pytest.mark.parametrize("mode", MODES)
def test_a_stream_from_another_thread(pipe, written, mode):
    streamer = TextIteratorStreamer(pipe.tokenizer, skip_prompt=True, timeout=120, skip_special_tokens=True)
    options = {**GREEDY, "mode": mode}
    thread = Thread(target=lambda: pipe(PROMPT, streamer=streamer, **options))
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == written(PROMPT, **options) and len(pieces) > 1


@pytest.mark.parametrize(
    ("place", "dtype"),
    [({"device_map": "auto"}, torch.float32), ({"dtype": torch.bfloat16}, torch.bfloat16), ({"device": "cpu"}, None)],
)
def test_a_folder_loaded_by_the_pipeline(place, dtype):
    pipe = pipeline("text-generation", model=str(twotower.demo_checkpoint()), **place)
    assert type(pipe.model) is TwoTowerForBlockDiffusion and pipe.model.dtype == (dtype or torch.float32)
    assert text(pipe(PROMPT, do_sample=False)).endswith("#### 143")


def test_knobs_given_once(written):
    """The pipeline takes them into a generation config of its own."""
    pipe = pipeline("text-generation", model=str(twotower.demo_checkpoint()), mode="ar", **GREEDY)
    assert text(pipe(PROMPT, return_full_text=False)) == written(PROMPT, mode="ar", **GREEDY)
