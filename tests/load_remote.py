"""Load a model as its users do, in a process of its own that cannot import twotower; see test_export.py.

`python -I load_remote.py AUTO_CLASS SOURCE SAVE_TO [OTHER_SOURCE]` prints what it saw as JSON on its last line.
"""

import json
import pickle
import sys

sys.modules["twotower"] = None  # importing it is now an ImportError

import torch  # noqa: E402
import transformers  # noqa: E402

PROMPT = [[1, 20, 30, 40, 50, 60, 70]]
MODES = ("mask_diffusion", "self_speculative", "mock_ar", "ar")


def main(auto_class, source, save_to, other_source=None):
    torch.set_num_threads(1)
    auto = getattr(transformers, auto_class)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=True)
    model = auto.from_pretrained(source, trust_remote_code=True)
    prompt, knobs = torch.tensor(PROMPT), {"max_new_tokens": 10}
    output = model.generate(prompt, return_dict_in_generate=True, **knobs)
    seen = {
        "module": type(model).__module__,
        "config_module": type(transformers.AutoConfig.from_pretrained(source, trust_remote_code=True)).__module__,
        "modules": sorted(
            {type(part).__module__.rsplit(".")[-1] for part in (model, model.config, output, output.cache)}
        ),
        "logits": model(prompt).logits.tolist(),
        "generated": output.sequences.tolist(),
        "by_mode": {mode: model.generate(prompt, mode=mode, **knobs).tolist() for mode in MODES},
        "pickled": pickle.loads(pickle.dumps((model.config, model.generation_config, model)))[2](
            prompt
        ).logits.tolist(),
        "mode": model.generation_config.mode,
        "token_ids": tokenizer("a cab")["input_ids"],
    }
    placed = auto.from_pretrained(source, trust_remote_code=True, device_map="towers", max_memory={"cpu": "1GB"})
    seen["placed"] = placed(prompt).logits.tolist()
    model.save_pretrained(save_to)
    tokenizer.save_pretrained(save_to)
    # A second load in this process gets the same class, unless its folder holds other code.
    seen["same_class_again"] = type(auto.from_pretrained(source, trust_remote_code=True)) is type(model)
    if other_source is not None:
        seen["other_class"] = type(auto.from_pretrained(other_source, trust_remote_code=True)) is not type(model)
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
