"""Who computes an operation: what "auto" takes, what is refused, and how a whole model is told."""

import dataclasses
import json
import os
import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from golden_cases import QUICKEST, assert_quickest_golden
from tiny import tiny_model
from tolerances import assert_close

from twotower import TwoTowerForBlockDiffusion
from twotower.generation_twotower import MODES
from twotower.kernels import backends
from twotower.kernels._experts_triton import experts_with_triton
from twotower.kernels.backends import BACKENDS, Backend, check_kernels, choose, kernel_table, package_table
from twotower.kernels.block_attention import block_attention
from twotower.kernels.causal_conv import causal_conv
from twotower.kernels.gated_rms_norm import gated_rms_norm
from twotower.kernels.rms_norm import rms_norm
from twotower.kernels.routed_experts import routed_experts
from twotower.kernels.ssd import ssd_scan, ssd_state
from twotower.kernels.top_k_routing import top_k_routing

ROOT = Path(__file__).resolve().parents[2]
X = torch.ones(1, 2, 3)
CALLS = {
    "ssd_scan": lambda **backend: ssd_scan(*SCAN, **backend),
    "ssd_step": lambda **backend: ssd_scan(*(part[:, :1] if part.ndim > 1 else part for part in SCAN), **backend),
    "ssd_state": lambda **backend: ssd_state(*SCAN[:4], **backend),
    "causal_conv": lambda **backend: causal_conv(X, torch.ones(3, 2), **backend),
    "gated_rms_norm": lambda **backend: gated_rms_norm(X, X, X[0, 0], 3, 1e-5, **backend),
    "rms_norm": lambda **backend: rms_norm(X, X[0, 0], 1e-5, **backend),
    "top_k_routing": lambda **backend: top_k_routing(X[0], X[0], X[0, :, 0], 1, **backend),
    "routed_experts": lambda **backend: routed_experts(
        X[0], *ROUTES, *[torch.ones(2, 3, 3)] * 2, torch.relu, **backend
    ),
    "block_attention": lambda **backend: block_attention(*[torch.ones(1, 2, 3, 4)] * 3, **backend),
}
SCAN = [torch.ones(1, 2, 3, 4), X, -torch.ones(3), torch.ones(1, 2, 1, 5), torch.ones(1, 2, 1, 5), torch.ones(3)]
ROUTES = torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)


def fake(name, measured="", cannot=None):
    return Backend(name, lambda *arguments: name, lambda *arguments: cannot, in_triton=True, measured=measured)


@pytest.fixture
def two(monkeypatch):
    """An operation of two backends, whose packages are here."""
    monkeypatch.setattr(backends, "_missing", lambda package: None)

    def enter(*entries):
        monkeypatch.setitem(BACKENDS, "op", {backend.name: backend for backend in entries})

    return enter


class OnCard(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True
    device = torch.device("cuda")


def on_card(dtype=torch.bfloat16, tokens=2, **flags):
    return torch.ones(1, tokens, 3, dtype=dtype, **flags).as_subclass(OnCard)


def on_card_as(op, case):
    """What `wins` looks at in a case of the results, such as "ssd_scan, 4 rows, 16 tokens"."""
    rows, tokens = (int(part.split()[0]) for part in case.split(", ")[1:3])
    sizes = {"block_attention": (rows, 1, tokens, 1), "routed_experts": (rows * tokens, 1)}
    return torch.ones(sizes.get(op, (rows, tokens, 1)), dtype=torch.bfloat16).as_subclass(OnCard)


class TestAuto:
    def test_takes_the_first_that_was_measured_and_can(self, two):
        two(fake("never"), fake("unable", "H100", "is too small"), fake("able", "H100"), fake("later", "H100"))
        assert choose("op", "auto", on_card())(X) == "able"

    def test_takes_none_where_it_did_not_win(self, two):
        few = Backend("few", lambda x: "few", lambda x: None, measured="H100", wins=lambda x: x.shape[1] < 5)
        two(few, fake("later", "H100"))
        assert choose("op", "auto", on_card(tokens=4))(X) == "few"
        assert choose("op", "auto", on_card(tokens=5))(X) == "later"

    def test_what_was_measured_is_what_the_results_say(self):
        sections = json.loads((ROOT / "benchmarks" / "gpu.json").read_text())["sections"]
        results = sections["kernels"]["outcome"] | sections["kernels of experts"]["outcome"]
        for op, backend in [(op, each) for op, several in BACKENDS.items() for each in several.values()]:
            if not backend.measured:
                continue
            cases = {case.rsplit(", ", 1)[0] for case in results if case.startswith(f"{op}, ")}
            won = [case for case in cases if backend.wins(on_card_as(op, case))]
            assert won
            for case in won:
                assert results[f"{case}, {backend.name}"]["ms"] < results[f"{case}, torch"]["ms"], case

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_is_torch_where_the_precision_of_products_would_be_seen(self, two, dtype):
        two(fake("able", "H100"))
        assert choose("op", "auto", on_card(dtype)) is None

    def test_is_torch_on_a_cpu_and_in_compiled_passes(self, two, monkeypatch):
        two(fake("able", "H100"))
        assert choose("op", "auto", X) is None and choose("op", "auto", X.bfloat16()) is None
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert choose("op", "auto", on_card()) is None

    def test_is_torch_where_none_can(self, two):
        two(fake("unable", "H100", "is too small"))
        assert choose("op", "auto", on_card()) is None

    def test_is_torch_where_the_package_is_not_here(self, two, monkeypatch):
        two(fake("able", "H100"))
        monkeypatch.setattr(backends, "_missing", lambda package: "is not installed")
        assert choose("op", "auto", on_card()) is None

    def test_is_torch_where_gradients_are_wanted(self, two):
        two(fake("able", "H100"))
        assert choose("op", "auto", on_card(requires_grad=True)) is None
        with torch.no_grad():
            assert choose("op", "auto", on_card(requires_grad=True)) is not None

    def test_is_torch_where_torch_func_computes(self, two):
        two(fake("able", "H100"))
        seen = []

        def look(x):
            seen.append(choose("op", "auto", on_card()))
            return x

        torch.vmap(look)(X)
        torch.func.jvp(look, (X,), (X,))
        with torch.no_grad(), torch.autograd.forward_ad.dual_level():
            look(X)
        assert seen == [None] * 3


class TestByName:
    def test_torch_is_the_operations_own_code(self):
        assert {op for op in BACKENDS if choose(op, "torch", X) is None} == set(BACKENDS)

    def test_a_backend_never_timed_is_taken(self, two):
        two(fake("never"))
        assert choose("op", "never", X)(X) == "never"

    @pytest.mark.parametrize("op", BACKENDS)
    def test_an_unknown_one_is_refused(self, op):
        with pytest.raises(ValueError, match=rf"{op} has no backend 'cuda'; use one of \"auto\".*\"torch\""):
            CALLS[op](backend="cuda")

    def test_what_it_cannot_compute_is_refused(self, two):
        two(fake("unable", cannot="is too small"))
        with pytest.raises(ValueError, match=r'op cannot .* by "unable": it is too small; use the backend "torch"'):
            choose("op", "unable", X)

    def test_gradients_are_refused(self, two):
        two(fake("able"))
        with pytest.raises(ValueError, match=r"it gives no gradients, and these tensors require them"):
            choose("op", "able", X.clone().requires_grad_())

    def test_torch_func_is_refused(self, two):
        two(fake("able"))
        with pytest.raises(ValueError, match=r"it computes plain values, not within torch\.func or forward-mode"):
            torch.vmap(lambda x: choose("op", "able", x))(X)

    @pytest.mark.parametrize(("op", "name"), [(op, name) for op in BACKENDS for name in BACKENDS[op]])
    def test_another_device_is_refused(self, op, name, monkeypatch):
        monkeypatch.setattr(backends, "_missing", lambda package: None)
        monkeypatch.setattr(backends, "_interpreted", lambda: False)
        with pytest.raises(ValueError, match=rf'{op} cannot .* "{name}": it runs on CUDA devices.* are on cpu'):
            CALLS[op](backend=name)

    def test_a_package_that_is_not_here_is_refused(self, monkeypatch):
        monkeypatch.setattr(backends, "package_version", lambda package: None)
        backends._missing.cache_clear()
        message = r'"flash-attn": it is not installed: pip install --no-build-isolation flash-attn'
        with pytest.raises(ValueError, match=message):
            CALLS["block_attention"](backend="flash-attn")
        with pytest.raises(ValueError, match=message):
            check_kernels("flash-attn")
        backends._missing.cache_clear()

    def test_a_package_that_does_not_import_is_refused(self, monkeypatch, tmp_path):
        monkeypatch.setattr(backends, "package_version", lambda package: "2.8")
        monkeypatch.setitem(sys.modules, "flash_attn", None)
        backends._missing.cache_clear()
        with pytest.raises(ValueError, match=r"is installed, but does not import \(.*flash_attn.*build it for"):
            CALLS["block_attention"](backend="flash-attn")
        backends._missing.cache_clear()


class TestCheckKernels:
    def test_operations_that_are_not_named_are_auto(self):
        assert check_kernels({"ssd_scan": "triton"}) == dict.fromkeys(BACKENDS, "auto") | {"ssd_scan": "triton"}

    def test_one_backend_is_of_all_that_have_it(self):
        chosen = check_kernels("triton")
        ours = {
            "ssd_scan",
            "ssd_step",
            "ssd_state",
            "causal_conv",
            "top_k_routing",
            "routed_experts",
            "block_attention",
        }
        assert {op for op, backend in chosen.items() if backend == "triton"} == ours
        assert set(check_kernels("torch").values()) == {"torch"}

    @pytest.mark.parametrize(
        ("kernels", "message"),
        [
            ("cuda", "kernels is 'cuda'; use one of"),
            (7, "kernels is 7; give the name of a backend"),
            ({"scan": "triton"}, "kernels names the operation 'scan'; those there are"),
            ({"ssd_state": "mamba-ssm"}, "ssd_state has no backend 'mamba-ssm'"),
            ({"ssd_scan": ["triton"]}, r"ssd_scan has no backend \['triton'\]"),
        ],
    )
    def test_what_is_unknown_is_refused(self, kernels, message):
        with pytest.raises(ValueError, match=message):
            check_kernels(kernels)


TRITON = dict.fromkeys(("ssd_scan", "ssd_step", "ssd_state"), "triton")


@pytest.fixture(scope="module")
def model():
    return tiny_model(hybrid_override_pattern="ME*", block_size=4).eval()


class TestOfAModel:
    @pytest.fixture
    def launches(self, monkeypatch):
        """Of our Triton kernel: whether it computed outputs, and to ends of the rows' own."""
        from twotower.kernels import _ssd_triton

        seen, launch = [], _ssd_triton._launch
        monkeypatch.setattr(
            _ssd_triton,
            "_launch",
            lambda *args, **options: (
                seen.append(("y" in options, options.get("ends") is not None)) or launch(*args, **options)
            ),
        )
        return seen

    @pytest.mark.parametrize("mode", MODES)
    def test_same_tokens(self, model, mode, launches):
        prompt = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
        options = {"max_new_tokens": 6, "mode": mode, "do_sample": False}
        options |= {"mask_diffusion": {"steps_per_block": 2}, "self_speculative": {"draft_length": 4}}.get(mode, {})
        model.set_kernels("torch")
        expected = model.generate(prompt, **options)
        assert not launches
        model.set_kernels("triton")
        assert torch.equal(model.generate(prompt, **options), expected)
        assert (True, False) in launches
        assert ((False, True) in launches) == (mode == "self_speculative")

    @QUICKEST
    def test_nvidias_tokens(self, goldens, mode, tokens):
        assert_quickest_golden("triton", goldens, mode, tokens)

    def test_what_is_asked_for_by_name_is_not_replaced(self, model):
        model.set_kernels({"ssd_scan": "triton"})
        with pytest.raises(ValueError, match=r'ssd_scan cannot be computed by "triton": it gives no gradients'):
            model(torch.tensor([[5, 6, 7, 8]]), labels=torch.tensor([[5, 6, 7, 8]]))
        model.set_kernels("auto")
        assert model(torch.tensor([[5, 6, 7, 8]]), labels=torch.tensor([[5, 6, 7, 8]])).loss.isfinite()

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_attention_in_torch_is_as_attn_implementation_says(self, model, implementation, monkeypatch):
        import twotower.modeling_twotower as modeling

        seen = []

        def attention(*args, backend, **options):
            seen.append(backend)
            return block_attention(*args, backend=backend, **options)

        monkeypatch.setattr(modeling, "block_attention", attention)
        model.set_kernels("torch")
        model.set_attn_implementation(implementation)
        model(torch.tensor([[5, 6]]))
        assert set(seen) == {"eager" if implementation == "eager" else "torch"}

    @pytest.mark.parametrize("implementation", ["eager", "grouped_mm_or_all"])
    def test_experts_by_name_go_before_experts_implementation(self, implementation, monkeypatch):
        seen, backend = [], BACKENDS["routed_experts"]["triton"]

        def run(*arguments):
            seen.append(arguments)
            return experts_with_triton(*arguments)

        monkeypatch.setitem(BACKENDS["routed_experts"], "triton", dataclasses.replace(backend, run=run))
        model = tiny_model(hybrid_override_pattern="E", block_size=4, experts_implementation=implementation).eval()
        ids = torch.tensor([[5, 6]])
        with torch.no_grad():
            expected = model(ids, use_cache=False).logits
            assert not seen
            model.set_kernels({"routed_experts": "triton"})
            assert_close(model(ids, use_cache=False).logits, expected, torch.float32)
            assert len(seen) == 1
            model.context_tower.layers[0].mixer.experts._is_expert_parallel = True
            with pytest.raises(ValueError, match=r'routed_experts cannot .* "triton" where ranks share experts'):
                model(ids, use_cache=False)

    def test_when_it_is_loaded_and_never_saved(self, model, tmp_path):
        model.set_kernels("triton")
        model.save_pretrained(tmp_path)
        assert "triton" not in (tmp_path / "config.json").read_text()
        again = TwoTowerForBlockDiffusion.from_pretrained(tmp_path)
        assert again.kernels == dict.fromkeys(BACKENDS, "auto")
        again = TwoTowerForBlockDiffusion.from_pretrained(tmp_path, kernels=TRITON)
        towers = (again.context_tower, again.denoiser_tower)
        mixers = [layer.mixer for tower in towers for layer in tower.layers if hasattr(layer.mixer, "kernels")]
        mixers += [part for tower in towers for part in (tower.layers[1].mixer.gate, tower.layers[1].mixer.experts)]
        norms = [layer.norm for tower in towers for layer in tower.layers] + [tower.norm_f for tower in towers]
        expected = dict.fromkeys(BACKENDS, "auto") | TRITON
        assert all(part.kernels == expected for part in (again, *towers, *mixers, *norms))
        with pytest.raises(ValueError, match="kernels is 'tritton'"):
            TwoTowerForBlockDiffusion.from_pretrained(tmp_path, kernels="tritton")

    def test_another_model_keeps_its_own(self, model):
        other = tiny_model(hybrid_override_pattern="M", block_size=4)
        model.set_kernels("triton")
        assert other.kernels == dict.fromkeys(BACKENDS, "auto")


class TestTables:
    def test_without_a_gpu_every_operation_is_torchs(self):
        rows = kernel_table()
        assert [row[0] for row in rows if row[0]] == list(BACKENDS)
        assert all(row[3] == ("everywhere" if row[1] == "torch" else "never") for row in rows)

    def test_what_was_never_timed_says_so(self, two):
        two(fake("never"), fake("timed", "H100"))
        lacks = {row[1]: row[2] for row in kernel_table()}
        assert "never timed on a GPU" in lacks["never"] and "never timed" not in lacks["timed"]

    def test_on_a_gpu_what_was_measured_is_taken_where_it_won(self, monkeypatch):
        monkeypatch.setattr(backends, "_missing", lambda package: None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        rows = kernel_table()
        assert ("ssd_state", "torch", "everywhere", "elsewhere") in rows
        assert ("", "triton", "ready", "in 16 bits, up to 64 tokens") in rows
        assert ("rms_norm", "torch", "everywhere", "in 32 bits") in rows
        assert ("", "mamba-ssm", "ready", "in 16 bits") in rows
        step = rows.index(("ssd_step", "torch", "everywhere", "in 32 bits"))
        assert [row[3] for row in rows[step + 1 : step + 3]] == ["in 16 bits", "never"]
        assert ("", "flash-attn", "ready", "in 16 bits, more than 64 tokens") in rows
        for op, second in ("ssd_scan", "mamba-ssm"), ("block_attention", "triton"):  # each after one that goes before
            first = rows.index((op, "torch", "everywhere", "in 32 bits")) + 1
            assert rows[first + 1] == ("", second, "ready", "else in 16 bits")

    def test_packages_and_versions(self, monkeypatch):
        monkeypatch.setattr(backends, "package_version", {"triton": "3.9.0"}.get)
        rows = {row[0]: row[1:] for row in package_table()}
        ours = "ssd_scan, ssd_step, ssd_state, causal_conv, top_k_routing, routed_experts, block_attention"
        assert rows["triton"] == ("3.9.0", ours, "H100, 2026-11-27")
        assert rows["flash-attn"] == ("not installed", "block_attention", "H100, 2026-11-27")


def test_without_triton_the_files_of_our_kernels_can_be_imported_still(fresh_python, tmp_path):
    kernels = {
        "attention": "attend",
        "conv": "conv_kernel",
        "experts": "expert_product",
        "routing": "choose_experts",
        "ssd": "ssd_kernel",
    }
    (tmp_path / "triton.py").write_text("raise ImportError('no triton here')")
    code = (
        "from importlib import import_module\n"
        f"for name, kernel in {kernels}.items():\n"
        "    ours = import_module(f'twotower.kernels._{name}_triton')\n"
        "    print(ours.triton, hasattr(ours, kernel))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    result = fresh_python("-c", code, env=environment)
    assert result.stdout.splitlines() == ["None False"] * len(kernels), result.stderr


def test_the_gpu_extra_installs_what_backends_use_and_nothing_else():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]
    used = {backend.name for own in BACKENDS.values() for backend in own.values()}
    assert {re.match(r"[a-z0-9-]+", each).group() for each in extra} == used == set(backends.MODULES)
