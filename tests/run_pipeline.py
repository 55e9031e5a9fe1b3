"""Generate through transformers' pipeline, in a process of its own that cannot import twotower; see test_pipeline.py.

`python -I run_pipeline.py FOLDER` reads cases, the arguments of `run`, as JSON from standard input. On its last line
it prints per case what the pipeline gave, and what `generate` gives each prompt alone.
"""

import json
import sys

sys.modules["twotower"] = None  # importing it is now an ImportError

import torch  # noqa: E402
from transformers import pipeline  # noqa: E402


def main(folder):
    torch.set_num_threads(1)
    pipe = pipeline("text-generation", model=folder, trust_remote_code=True)
    assert type(pipe.model).__module__.startswith("transformers_modules.")
    print(json.dumps([run(pipe, **case) for case in json.load(sys.stdin)]))


def run(pipe, inputs, call, batch_size=None):
    given = pipe(inputs, batch_size=batch_size, return_full_text=False, **call)
    prompts = inputs if isinstance(inputs, list) and not is_chat(inputs) else [inputs]
    # Of several inputs, each has a list of its records.
    records = [record[0] if isinstance(record, list) else record for record in given]
    return {
        "pipeline": [text_of(record["generated_text"]) for record in records],
        "alone": [alone(pipe, prompt, call) for prompt in prompts],
        "records": [sorted(record) for record in records],
    }


def is_chat(inputs):
    return isinstance(inputs[0], dict)


def text_of(generated):
    return generated if isinstance(generated, str) else generated[-1]["content"]


def alone(pipe, prompt, call):
    if is_chat(prompt or "-"):
        ids = pipe.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    else:
        ids = pipe.tokenizer(prompt, return_tensors="pt")["input_ids"].long()
    call = {"tokenizer": pipe.tokenizer, **call, "return_dict_in_generate": False}
    stops = call.pop("stop_sequence", None)
    output = pipe.model.generate(ids, stop_strings=stops, **call)
    # An empty prompt comes back with the beginning-of-text token.
    return pipe.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
