"""
What int8 costs on 400 held-out problems, per library and mode, beside float32: written to quantized.json beside this
file, or where the one argument says. Takes half an hour on one core. Needs torchao, bitsandbytes and optimum-quanto.
"""

import logging
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torchao.quantization import FqnToConfig, Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
from transformers import AutoTokenizer, BitsAndBytesConfig, QuantoConfig, TorchAoConfig
from transformers import logging as transformers_logging

import twotower
from twotower.bench.reports import write_json
from twotower.demo.evaluation import MAX_NEW_TOKENS, conditions
from twotower.demo.marking import Marks
from twotower.demo.tasks import Task, held_out_tasks
from twotower.evaluation.answers import cut_after_end, end_ids, tokenized
from twotower.evaluation.figures import accuracy_figures
from twotower.modeling_twotower import TwoTowerForBlockDiffusion

PROBLEMS, SEED, BATCH_SIZE = 400, 1, 16
# "mock_ar" is left out: this checkpoint answers nothing in it, in float32 neither.
MODES: dict[str, dict[str, Any]] = {
    "ar": {"mode": "ar"},
    "self_speculative": {"mode": "self_speculative"},
    "mask_diffusion": {"mode": "mask_diffusion", "confidence_threshold": 0.8},
}
WEIGHTS = Int8WeightOnlyConfig()
TOWERS = r"re:(context|denoiser)_tower\.layers\.\d+\.mixer\."
KINDS: dict[str, Any] = {
    "float32": None,
    "bitsandbytes, threshold 0": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
    "quanto, weights": QuantoConfig(weights="int8"),
    "torchao, weights": TorchAoConfig(WEIGHTS),
    "torchao, weights and routed experts": TorchAoConfig(
        FqnToConfig({TOWERS + r"experts\.(up|down)_proj": WEIGHTS, TOWERS + r".*_proj": WEIGHTS})
    ),
    "torchao, weights and activations": TorchAoConfig(Int8DynamicActivationInt8WeightConfig()),
    "bitsandbytes, threshold 6 (its default)": BitsAndBytesConfig(load_in_8bit=True),
}
LIBRARIES = ("torchao", "bitsandbytes", "optimum-quanto")


def main(file: Path) -> None:
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    settings = {"problems": PROBLEMS, "seed": SEED, "batch_size": BATCH_SIZE}
    tasks = held_out_tasks("words", PROBLEMS, SEED)
    tokenizer = AutoTokenizer.from_pretrained(twotower.demo_checkpoint())
    rows, texts, correct = [], dict[tuple[str, str], list[list[int]]](), dict[tuple[str, str], list[bool]]()
    for kind, config in KINDS.items():
        model = load(config)
        where = conditions(model)
        where["versions"] |= {name: version(name) for name in LIBRARIES}
        for mode, options in MODES.items():
            found = texts[kind, mode] = answers(model, tokenizer, tasks, options)
            right = correct[kind, mode] = Marks.of(found, tasks, tokenizer).right
            figures = accuracy_figures(right, correct["float32", mode])
            rows.append({"kind": kind, "int8_share": int8_share(model), **options, **figures, "mode": mode})
            rows[-1]["same_text_as_float32"] = same(found, texts["float32", mode])
            rows[-1]["same_text_as_ar"] = same(found, texts[kind, "ar"])
            print(rows[-1], flush=True)
            # After every row, so that a run that is stopped leaves what it has measured.
            write_json(file, settings | {"rows": rows} | where)


def load(config: Any) -> TwoTowerForBlockDiffusion:
    quantized = {} if config is None else {"quantization_config": config}
    return TwoTowerForBlockDiffusion.from_pretrained(twotower.demo_checkpoint(), **quantized).eval()


def answers(
    model: TwoTowerForBlockDiffusion, tokenizer: Any, tasks: list[Task], options: dict[str, Any]
) -> list[list[int]]:
    found = list[list[int]]()
    for batch in tokenized([task.prompt for task in tasks], BATCH_SIZE, tokenizer, model):
        sequences: Any = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, **options)
        found += [cut_after_end(row, end_ids(model)) for row in sequences[:, batch.input_ids.shape[1] :].tolist()]
    return found


def int8_share(model: TwoTowerForBlockDiffusion) -> float:
    """Of all parameters, how many a quantiser has taken: those that are int8, or a library's own kind of tensor."""
    sizes = [(p.numel(), p.dtype == torch.int8 or type(p.data) is not torch.Tensor) for p in model.parameters()]
    return sum(size for size, taken in sizes if taken) / sum(size for size, _ in sizes)


def same(texts: list[list[int]], others: list[list[int]]) -> int:
    return sum(text == other for text, other in zip(texts, others, strict=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("quantized.json"))
