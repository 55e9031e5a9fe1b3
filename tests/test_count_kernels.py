"""`tools/count_kernels.py` counts what passes launch; it is no part of the package."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scripts import load_script
from tiny import BASE

ROOT = Path(__file__).resolve().parents[1]
# Of a pass over 16 rows, at most, per layer of a kind.
MOST = {
    "denoiser pass": {"M": 32, "E": 28},
    "block read": {"M": 32, "E": 27},
    "accept": {"M": 17, "E": 0},
    "AR step": {"M": 24, "E": 27},
}
# What passes of the released geometry launched at commit c9b25cb, over one row, and at most launch now.
ONCE_AND_NOW = {"denoiser pass": (2830, 1415), "block read": (2688, 1344), "AR step": (2347, 1173)}


@pytest.fixture(scope="module")
def tool():
    return load_script(ROOT / "tools" / "count_kernels.py")


def counts(tool, folder, layers) -> dict[str, int]:
    """By kind of pass, of 16 rows in a model of these layers."""
    config = folder / "config.json"
    config.write_text(json.dumps({**BASE, "hybrid_override_pattern": layers, "mamba_num_heads": 16, "n_groups": 8}))
    model = tool.released_model(config)
    with model.prepared():
        return {name: tool.count(call).total() for name, call in tool.passes(model, 16, 4).items()}


def test_an_operation_is_a_kernel_a_view_none_and_what_is_fused_one(tool):
    x = torch.zeros(2, 4, 6, device="meta")
    assert tool.count(lambda: x.transpose(1, 2)[..., 0].view(2, -1)).total() == 0
    assert tool.count(lambda: (x + 1).square()).total() == 2
    assert tool.count(lambda: F.rms_norm(x, (6,)) * 2) == {"rms_norm": 1, "mul": 1}


@pytest.mark.parametrize("layer", ["M", "E"])
def test_a_layer_launches_no_more_kernels_than_it_did(tool, tmp_path, layer):
    one, two = counts(tool, tmp_path, layer + "*"), counts(tool, tmp_path, 2 * layer + "*")
    for kind, most in MOST.items():
        assert 0 <= two[kind] - one[kind] <= most[layer], (kind, two[kind] - one[kind])


def test_a_pass_of_the_released_geometry_launches_half_of_what_it_once_did(tool):
    model = tool.released_model()
    passes = tool.passes(model, 1, model.config.block_size)
    with model.prepared():
        counted = {kind: tool.count(passes[kind]).total() for kind in ONCE_AND_NOW}
    for kind, (once, now) in ONCE_AND_NOW.items():
        assert counted[kind] <= now <= once / 2, (kind, counted)
