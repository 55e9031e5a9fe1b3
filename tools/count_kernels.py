"""
How many kernels passes of the released geometry launch on a GPU in bfloat16, counted without one: on meta tensors
every operation that is no view is taken for one kernel, and so are the norms and the attention that torch has fused.

    python tools/count_kernels.py             # by kind of pass and batch
    python tools/count_kernels.py --most 12   # and by which operations most of them are
    python tools/count_kernels.py --config F  # of another geometry, as JSON
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import twotower
from twotower import TwoTowerConfig, TwoTowerForBlockDiffusion
from twotower.cache_twotower import TwoTowerCache

RELEASED = Path(twotower.__file__).parent / "tests" / "nvidia_30b" / "config.json"
CONTEXT = 40
# What launches nothing: views, memory that is only reserved, and a question about dtypes.
VIEWS = set(
    """
    _reshape_alias _unsafe_view alias as_strided detach empty empty_like expand lift_fresh narrow new_empty permute
    promote_types reshape select slice split split_with_sizes squeeze t transpose unbind unfold unsqueeze view
    """.split()  # noqa: SIM905
)
# One kernel on a GPU, and several operations on meta tensors.
FUSED = {F.rms_norm: "rms_norm", F.scaled_dot_product_attention: "attention"}


class FusedKernels(TorchFunctionMode):
    """Counts a call of what is `FUSED` as one, whatever it is made of."""

    def __init__(self, counted: "Kernels"):
        self.counted = counted

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in FUSED:
            return function(*args, **kwargs or {})
        before = Counter(self.counted.names)
        result = function(*args, **kwargs or {})
        self.counted.names = before + Counter([FUSED[function]])
        return result


class Kernels(TorchDispatchMode):
    """Counts by name the operations that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name not in VIEWS:
            self.names[name] += 1
        return function(*args, **kwargs or {})


def count(call: Callable[[], Any]) -> Counter[str]:
    """By name, the kernels a call launches."""
    with torch.no_grad(), Kernels() as counted, FusedKernels(counted):
        call()
    return counted.names


def passes(model: Any, batch: int, block_size: int) -> dict[str, Callable[[], Any]]:
    """The kinds of passes, over so many rows of equal length."""

    def ids(tokens: int) -> torch.Tensor:
        return torch.zeros(batch, tokens, dtype=torch.long, device="meta")

    def read() -> TwoTowerCache:
        cache = TwoTowerCache(model.config)
        with torch.no_grad():
            model.context_tower(ids(CONTEXT), cache)
        return cache

    cache, block = read(), read()
    several, one = ids(block_size), ids(1)
    return {
        "denoiser pass": lambda: model.denoise(several, cache, 0.5),
        "block read": lambda: model.context_tower(several, block, tentative=True),
        "accept": lambda: block.accept([1] * batch),
        "AR step": lambda: model.context_tower(one, cache),
    }


def released_model(config: Path = RELEASED) -> Any:
    """A model without weights, in bfloat16 as `from_pretrained` would load it."""
    with torch.device("meta"):
        model = TwoTowerForBlockDiffusion(TwoTowerConfig(**json.loads(config.read_text()))).eval()
    kept = model._keep_in_fp32_modules_strict
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not any(part in name for part in kept):
            tensor.data = tensor.data.to(torch.bfloat16)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=RELEASED, help="of the geometry; default the released one")
    parser.add_argument("--most", type=int, default=0, metavar="N", help="show the N most frequent operations, too")
    chosen = parser.parse_args()
    model = released_model(chosen.config)
    for batch in (1, 16):
        for name, call in passes(model, batch, model.config.block_size).items():
            # As in a call of generate.
            with model.prepared():
                names = count(call)
            print(f"{batch} rows, {name}: {names.total()} kernels")
            if chosen.most:
                print("   " + ", ".join(f"{each} {number}" for each, number in names.most_common(chosen.most)))


if __name__ == "__main__":
    main()
