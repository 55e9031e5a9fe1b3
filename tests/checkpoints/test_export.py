"""Export: a folder that loads without this package, from a folder, a Hub cache and a Hub, and again once saved."""

import ast
import json
import os
import py_compile
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HTTPError
from safetensors.torch import load_file
from tiny import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from twotower import demo_checkpoint
from twotower.checkpoints import export as export_module
from twotower.checkpoints.export import AUTO_MAP, export
from twotower.generation_twotower import MODES
from twotower.modeling_twotower import TwoTowerForBlockDiffusion

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
PROMPT = torch.tensor([[1, 20, 30, 40, 50, 60, 70]])


@pytest.fixture(scope="module")
def model():
    model = tiny_model(hybrid_override_pattern="ME*-", vocab_size=300)
    model.generation_config.mode = "mask_diffusion"
    return model


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<pad>", "<s>", "</s>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator([], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", mask_token="<mask>"
    )


@pytest.fixture(scope="module")
def checkpoint(model, tokenizer, tmp_path_factory):
    """A model folder as `save_pretrained` leaves it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    return export(checkpoint, tmp_path_factory.mktemp("export") / "tiny-model.v1")


@pytest.fixture(scope="module")
def expected(model, tokenizer):
    """What every load must see."""
    return {
        "logits": model(PROMPT).logits.tolist(),
        "generated": model.generate(PROMPT, max_new_tokens=10).tolist(),
        "by_mode": {mode: model.generate(PROMPT, mode=mode, max_new_tokens=10).tolist() for mode in MODES},
        "modules": ["configuration_twotower", "generation_twotower", "modeling_twotower"],
        "mode": "mask_diffusion",
        "token_ids": tokenizer("a cab")["input_ids"],
    }


class TestWhatIsWritten:
    def test_files(self, exported):
        files = {path.name for path in exported.iterdir()}
        weights = {"model.safetensors", "config.json", "generation_config.json"}
        words = {"tokenizer.json", "tokenizer_config.json"}
        assert files >= weights | words | {"README.md", "LICENSE"}
        code = {name for name in files if name.endswith(".py")}
        assert code == {"modeling_twotower.py", "configuration_twotower.py", "generation_twotower.py"}
        assert not [path for path in exported.iterdir() if path.is_dir()]
        assert list(exported.parent.iterdir()) == [exported]  # no leftovers beside it

    def test_config_names_the_code(self, exported):
        config = json.loads((exported / "config.json").read_text())
        assert config["auto_map"] == AUTO_MAP
        assert config["model_type"] == "twotower"
        for reference in AUTO_MAP.values():
            module, name = reference.split(".")
            assert f"class {name}(" in (exported / f"{module}.py").read_text()

    def test_code_is_flat_and_complete(self, exported, tmp_path):
        code = sorted(exported.glob("*.py"))
        needed = {"modeling_twotower.py"} | {
            Path(file).name for file in get_relative_import_files(exported / "modeling_twotower.py")
        }
        assert {path.name for path in code} == needed
        for path in code:
            assert "from .kernels." not in path.read_text()
            assert "from .." not in path.read_text()
            installed = {"huggingface_hub", "safetensors", "torch", "transformers"}  # two of them by transformers
            assert set(get_imports(path)) <= sys.stdlib_module_names | installed
            py_compile.compile(path, cfile=tmp_path / "compiled", doraise=True)
        ruff, how = [sys.executable, "-m", "ruff"], ["--isolated", "--no-cache", "--line-length", "119"]
        # F402: in one file, a local name may be that of another file's import.
        subprocess.run([*ruff, "check", *how, "--select", "E9,F,I", "--ignore", "F402", *code], check=True)
        subprocess.run([*ruff, "format", "--check", *how, *code], check=True)

    def test_code_differs_only_in_its_imports(self, exported):
        joined = []
        for path in exported.glob("*.py"):
            sources = [ROOT / name for name in re.findall(r"^# From (\S+):$", path.read_text(), re.MULTILINE)]
            assert statements(path) == [statement for source in sources for statement in statements(source)]
            comments = [line for source in sources for line in source.read_text().splitlines() if " # " in line]
            assert set(comments) <= set(path.read_text().splitlines())
            assert names_in_all(path) == {name for source in sources for name in names_in_all(source)}
            joined += sources
        assert len(joined) == len(set(joined))
        parts = ("compat_twotower.py", "checkpoints/loading.py", "kernels/ssd.py", "modeling_twotower.py")
        assert set(joined) >= {ROOT / name for name in parts}

    def test_weights_are_the_models(self, model, exported):
        check_weights(load_file(exported / "model.safetensors"), model)  # experts fused, as transformers holds them

    def test_dtypes_are_kept(self, checkpoint, tmp_path):
        half = TwoTowerForBlockDiffusion.from_pretrained(checkpoint, dtype=torch.bfloat16)
        half.save_pretrained(tmp_path / "half")
        weights = load_file(export(tmp_path / "half", tmp_path / "export") / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16, torch.float32}
        check_weights(weights, half)

    def test_weights_stay_as_they_are_stored_and_are_loaded_as_before(self, tmp_path):
        origin = demo_checkpoint()
        folder = export(origin, tmp_path / "export")
        sizes = [(each / "model.safetensors").stat().st_size for each in (origin, folder)]
        assert abs(sizes[1] - sizes[0]) < 0.01 * sizes[0]
        loaded, expected = (TwoTowerForBlockDiffusion.from_pretrained(each, dtype="auto") for each in (folder, origin))
        assert loaded.dtype == expected.dtype == torch.float32
        for name, tensor in expected.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name

    def test_shards(self, checkpoint, model, tmp_path):
        folder = export(checkpoint, tmp_path / "sharded", max_shard_size="100KB")
        assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
        assert (folder / "model.safetensors.index.json").is_file()
        check_weights(TwoTowerForBlockDiffusion.from_pretrained(folder).state_dict(), model)

    def test_loaded_model(self, model, tokenizer, exported, tmp_path):
        folder = export(model, tmp_path / "model", tokenizer=tokenizer)
        for name in ("config.json", "model.safetensors", "tokenizer.json", "modeling_twotower.py"):
            assert (folder / name).read_bytes() == (exported / name).read_bytes(), name
        assert getattr(model.config, "auto_map", None) is None  # the caller's model is left as it was

    def test_without_tokenizer(self, model, tmp_path):
        model.save_pretrained(tmp_path / "model")
        folder = export(tmp_path / "model", tmp_path / "export")
        assert not list(folder.glob("tokenizer*"))


class TestModelCard:
    def test_generated(self, exported):
        card = ModelCard.load(exported / "README.md")
        assert card.data.library_name == "transformers"
        assert card.data.pipeline_tag == "text-generation"
        assert card.data.license == "unknown"  # nobody said
        assert "custom_code" in card.data.tags
        assert "`ME*-`" in card.text and "trust_remote_code=True" in card.text

    def test_an_uploaded_one_names_the_repository_with_its_owner(self, model, tmp_path, monkeypatch):
        uploaded = []
        monkeypatch.setattr(export_module, "create_repo", lambda name, **_: SimpleNamespace(repo_id=f"lab/{name}"))
        monkeypatch.setattr(
            export_module,
            "upload_folder",
            lambda folder_path, **_: uploaded.append(ModelCard.load(folder_path / "README.md").text),
        )
        export(model, tmp_path / "folder", push_to_hub="tiny")
        assert 'AutoModelForCausalLM.from_pretrained("lab/tiny"' in uploaded[0]

    @pytest.mark.parametrize(
        ("step", "kind"),
        [("create_repo", HTTPError), ("upload_folder", HTTPError), ("upload_folder", ConnectionError)],
    )
    def test_an_upload_that_fails_leaves_the_folder_whole_and_says_so(self, model, tmp_path, monkeypatch, step, kind):
        def unreachable(*_, **__):
            raise kind("connection refused")

        monkeypatch.setattr(export_module, "create_repo", lambda name, **_: SimpleNamespace(repo_id=name))
        monkeypatch.setattr(export_module, step, unreachable)
        with pytest.raises(OSError, match=r"export is whole, but uploading it to lab/tiny failed: connection refused"):
            export(model, tmp_path / "export", push_to_hub="lab/tiny")
        assert TwoTowerForBlockDiffusion.from_pretrained(tmp_path / "export").num_parameters()

    def test_copied(self, checkpoint, tmp_path):
        source = shutil.copytree(checkpoint, tmp_path / "source")
        metadata = "library_name: transformers\nlicense: mit\npipeline_tag: text-generation\ntags: [maths]\n"
        text = f"---\n{metadata}---\n# Mine\n"
        (source / "README.md").write_text(text)
        assert (export(source, tmp_path / "export") / "README.md").read_text() == text

    def test_copied_and_completed(self, checkpoint, tmp_path):
        source = shutil.copytree(checkpoint, tmp_path / "source")
        (source / "README.md").write_text("---\nlicense: mit\ndatasets: [mine]\n---\n# Mine\n\ntext\n")
        card = ModelCard.load(export(source, tmp_path / "export") / "README.md")
        assert card.data.license == "mit" and card.data.datasets == ["mine"]
        assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
        assert card.text.strip() == "# Mine\n\ntext"

    def test_licences(self, checkpoint, tmp_path):
        source = shutil.copytree(checkpoint, tmp_path / "source")
        (source / "LICENSE").write_text("the weights' licence")
        (source / "NOTICE.txt").write_text("a notice")
        folder = export(source, tmp_path / "export")
        assert (folder / "LICENSE").read_text() == "the weights' licence"
        assert (folder / "NOTICE.txt").read_text() == "a notice"
        assert "Apache License" in (folder / "LICENSE.code").read_text()
        again = export(folder, tmp_path / "again")
        assert {path.name for path in again.iterdir()} == {path.name for path in folder.iterdir()}


class TestWhereItIsWritten:
    def test_empty_folder(self, checkpoint, tmp_path):
        (tmp_path / "empty").mkdir()
        assert (export(checkpoint, tmp_path / "empty") / "config.json").is_file()

    def test_folder_with_other_things(self, checkpoint, tmp_path):
        (tmp_path / "thesis.tex").write_text("years of work")
        for overwrite in (False, True):
            with pytest.raises(ValueError, match=f"{tmp_path} is not empty"):
                export(checkpoint, tmp_path, overwrite=overwrite)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]

    def test_model_folder_that_is_no_export(self, checkpoint, tmp_path):
        (tmp_path / "config.json").write_text("[1]")
        for folder in (checkpoint, tmp_path):
            with pytest.raises(ValueError, match=r"its config\.json does not name our code"):
                export(checkpoint, folder, overwrite=True)

    def test_earlier_export(self, checkpoint, exported, tmp_path):
        target = shutil.copytree(exported, tmp_path / "target")
        (target / "old.py").write_text("")
        with pytest.raises(ValueError, match=f"{target} holds an earlier export.*overwrite=True"):
            export(checkpoint, target)
        export(checkpoint, target, overwrite=True)
        assert {path.name for path in target.iterdir()} == {path.name for path in exported.iterdir()}
        assert list(tmp_path.iterdir()) == [target]

    def test_a_link_is_followed(self, checkpoint, tmp_path):
        link = tmp_path / "link"
        link.symlink_to(tmp_path / "large disk")
        for overwrite in (False, True):
            assert export(checkpoint, link, overwrite=overwrite) == link
            assert link.is_symlink() and (tmp_path / "large disk" / "config.json").is_file()

    def test_onto_itself(self, model, exported, tmp_path):
        target = shutil.copytree(exported, tmp_path / "target")
        export(target, target, overwrite=True)
        assert {path.name for path in target.iterdir()} == {path.name for path in exported.iterdir()}
        check_weights(load_file(target / "model.safetensors"), model)

    def test_earlier_export_with_other_things(self, checkpoint, exported, tmp_path):
        target = shutil.copytree(exported, tmp_path / "target")
        (target / ".git").mkdir()
        with pytest.raises(ValueError, match=r"it holds \.git"):
            export(checkpoint, target, overwrite=True)

    def test_file(self, checkpoint, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match=f"{tmp_path / 'file'} is a file"):
            export(checkpoint, tmp_path / "file")

    def test_failure_leaves_everything_as_it_was(self, checkpoint, exported, tmp_path, monkeypatch):
        def fail(folder):
            raise OSError("disk full")

        target = shutil.copytree(exported, tmp_path / "target")
        monkeypatch.setattr(export_module, "write_code", fail)
        for folder in (target, tmp_path / "new"):
            with pytest.raises(OSError, match="disk full"):
                export(checkpoint, folder, overwrite=True)
        assert list(tmp_path.iterdir()) == [target]
        assert {path.name for path in target.iterdir()} == {path.name for path in exported.iterdir()}

    def test_failing_move_brings_the_old_back(self, tmp_path):
        (tmp_path / "old").mkdir()
        with pytest.raises(FileNotFoundError):
            export_module._replace(tmp_path / "old", tmp_path / "missing", tmp_path / "replaced")
        assert [path.name for path in tmp_path.iterdir()] == ["old"]


class TestBadInput:
    def test_source_is_no_folder(self, tmp_path):
        with pytest.raises(ValueError, match="nowhere is not a folder"):
            export("nowhere", tmp_path / "export")

    def test_weights_are_cut_off(self, checkpoint, tmp_path):
        source = shutil.copytree(checkpoint, tmp_path / "source")
        [weights] = source.glob("*.safetensors")
        weights.write_bytes(weights.read_bytes()[:-1])
        with pytest.raises(ValueError, match=r"source/model.safetensors is truncated .*; download it again"):
            export(source, tmp_path / "export")

    def test_source_is_another_model(self, tmp_path):
        config = LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
        with pytest.raises(ValueError, match="the model is a LlamaForCausalLM"):
            export(LlamaForCausalLM(config), tmp_path / "export")

    def test_repository_name(self, tmp_path):
        with pytest.raises(ValueError, match="a/b/c"):
            export("nowhere", tmp_path / "export", push_to_hub="a/b/c")


@pytest.mark.parametrize("trust_remote_code", [None, True])
def test_loading_with_this_package_uses_its_code(trust_remote_code, exported, model):
    loaded = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=trust_remote_code)
    assert type(loaded) is TwoTowerForBlockDiffusion
    check_weights(loaded.state_dict(), model)


def test_the_wheel_holds_the_licence_to_export():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "LICENSE" in settings["package-data"]["twotower"]


class TestLoadingWithoutThisPackage:
    """One process per load: transformers keeps remote classes, and their modules, for a process's lifetime."""

    def test_from_a_folder(self, exported, expected, fresh_python, tmp_path):
        saved = tmp_path / "saved"
        check(load(fresh_python, tmp_path, "AutoModel", exported, saved), expected)
        check_saved(saved, exported)
        other_code = shutil.copytree(exported, tmp_path / "other")
        with (other_code / "modeling_twotower.py").open("a") as file:
            file.write("\n\nNEWER = True\n")
        seen = load(fresh_python, tmp_path, "AutoModelForCausalLM", saved, tmp_path / "saved-again", other_code)
        check(seen, expected)
        check_saved(tmp_path / "saved-again", exported)
        assert seen["other_class"]

    def test_with_a_release_of_transformers_that_the_code_does_not_know(self, exported, fresh_python, tmp_path):
        code = (
            "import transformers\n"
            "from transformers import AutoModel, activations\n"
            "transformers.__version__ = '5.99.0'\n"
            "del activations.ACT2FN\n"  # as an unknown release may have
            "try:\n"
            f"    AutoModel.from_pretrained({str(exported)!r}, trust_remote_code=True)\n"
            "except ImportError as error:\n"
            "    print(error)\n"
        )
        said = run_python(fresh_python, tmp_path, "-I", "-c", code, HF_HUB_OFFLINE="1").stdout
        assert said.startswith("this TwoTower code knows transformers from") and said.count("\n") == 1
        assert "5.99.0 is installed: pip install" in said

    def test_kernels_can_be_chosen(self, exported, fresh_python, tmp_path):
        code = (
            "import torch\n"
            "from transformers import AutoModel\n"
            f"model = AutoModel.from_pretrained({str(exported)!r}, trust_remote_code=True, kernels='triton')\n"
            "assert model.kernels['ssd_scan'] == 'triton'\n"
            "prompt = torch.tensor([[1, 20, 30, 40]])\n"
            "def logits():\n"
            "    with torch.no_grad():\n"
            "        return model(prompt).logits\n"
            "by_triton = logits()\n"
            "model.set_kernels('auto')\n"
            "assert not torch.equal(by_triton, logits())\n"  # or it was not used
            "assert torch.allclose(by_triton, logits(), atol=1e-5)\n"
        )
        run_python(fresh_python, tmp_path, "-I", "-c", code, HF_HUB_OFFLINE="1", TRITON_INTERPRET="1")

    def test_without_triton(self, exported, fresh_python, tmp_path):
        code = (
            "import sys\n"
            "sys.modules['triton'] = None\n"  # importing it is now an ImportError
            "from transformers import AutoModel\n"
            f"model = AutoModel.from_pretrained({str(exported)!r}, trust_remote_code=True)\n"
            "try:\n"
            "    model.set_kernels('triton')\n"
            "except ValueError as error:\n"
            "    print(error)\n"
        )
        said = run_python(fresh_python, tmp_path, "-I", "-c", code, HF_HUB_OFFLINE="1").stdout
        assert said.startswith('ssd_scan cannot be computed by "triton": it is ')

    def test_a_model_of_remote_code_is_exported(self, exported, fresh_python, tmp_path):
        code = (
            "from transformers import AutoModel\n"
            f"model = AutoModel.from_pretrained({str(exported)!r}, trust_remote_code=True)\n"
            "assert type(model).__module__.startswith('transformers_modules.')\n"
            "from twotower.checkpoints.export import export\n"
            f"export(model, {str(tmp_path / 'again')!r})\n"
        )
        path = os.environ.get("PYTHONPATH", "")
        run_python(fresh_python, tmp_path, "-c", code, PYTHONPATH=path, HF_HUB_OFFLINE="1")
        for file in [*exported.glob("*.py"), exported / "model.safetensors", exported / "config.json"]:
            assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name

    def test_from_a_hub_and_its_cache(self, checkpoint, exported, expected, hub, fresh_python, tmp_path):
        # 1. Upload, to a repository that holds the shards of an earlier upload.
        push(fresh_python, checkpoint, tmp_path / "pushed", hub, max_shard_sizes=("100KB", "50GB"))
        repo = json.loads((hub.root / "lab" / "tiny.model-1" / "repo.json").read_text())
        uploaded = hub.root / "lab" / "tiny.model-1" / repo["newest"]
        assert repo["private"]
        assert {path.name for path in uploaded.iterdir()} == {path.name for path in exported.iterdir()}
        # 2. Download and load; save, and load what was saved.
        saved = tmp_path / "saved"
        online = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test"}
        first = load(fresh_python, tmp_path, "AutoModelForCausalLM", "lab/tiny.model-1", saved, **online)
        check(first, expected)
        assert first["stderr"].count("A new version of the following files was downloaded") == 3, first["stderr"]
        check_saved(saved, exported)
        check(load(fresh_python, tmp_path, "AutoModel", saved, tmp_path / "saved-again"), expected)
        # 3. The same from the cache alone, in an environment that has not seen the code.
        hub.stop()
        shutil.rmtree(tmp_path / "modules")
        check(load(fresh_python, tmp_path, "AutoModel", "lab/tiny.model-1", tmp_path / "from-cache"), expected)
        check_saved(tmp_path / "from-cache", exported)


def statements(path):
    """What a file does besides importing and listing its names."""
    body = [node for node in ast.parse(path.read_text()).body if not isinstance(node, ast.Import | ast.ImportFrom)]
    texts = [ast.unparse(node) for node in body if not (isinstance(node, ast.Expr) and node is body[0])]
    return [text for text in texts if not text.startswith("__all__ = ")]


def names_in_all(path):
    last = ast.parse(path.read_text()).body[-1]
    return set(ast.literal_eval(last.value)) if ast.unparse(last).startswith("__all__ = ") else set()


def check_weights(weights, model):
    assert weights.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert weights[name].dtype == tensor.dtype and torch.equal(weights[name], tensor), name


def load(python, work, auto_class, source, save_to, *other_source, **environment):
    """Run load_remote.py; offline unless an endpoint is given, with Hub and module cache in `work`."""
    if "HF_ENDPOINT" not in environment:
        environment["HF_HUB_OFFLINE"] = "1"
    arguments = [auto_class, source, save_to, *other_source]
    done = run_python(python, work, "-I", TESTS / "load_remote.py", *arguments, **environment)
    return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}


def push(python, checkpoint, folder, hub, max_shard_sizes):
    code = (
        "from twotower.checkpoints.export import export\n"
        f"for size in {max_shard_sizes!r}:\n"
        f"    export({str(checkpoint)!r}, {str(folder)!r}, push_to_hub='lab/tiny.model-1', private=True,\n"
        "           overwrite=True, max_shard_size=size)\n"
    )
    path = os.environ.get("PYTHONPATH", "")
    run_python(python, folder.parent, "-c", code, PYTHONPATH=path, HF_ENDPOINT=hub.url, HF_TOKEN="hf_test")


def run_python(python, work, *arguments, **environment):
    base = {
        "PATH": os.environ["PATH"],
        "HOME": work,
        "HF_HOME": work / "hf",
        "HF_MODULES_CACHE": work / "modules",
        "NO_PROXY": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",
    }
    done = python(*arguments, env=base | environment, cwd=work)
    assert done.returncode == 0, done.stderr
    return done


def check(seen, expected):
    assert seen["module"].startswith("transformers_modules.")
    assert seen["config_module"].startswith("transformers_modules.")
    assert seen["same_class_again"]
    for name in ("logits", "pickled", "placed"):
        torch.testing.assert_close(torch.tensor(seen[name]), torch.tensor(expected["logits"]))
    for name in ("generated", "by_mode", "modules", "mode", "token_ids"):
        assert seen[name] == expected[name], name


def check_saved(folder, exported):
    """`save_pretrained` of remote code has copied all of it, also what is only imported by an import."""
    assert {path.name for path in folder.glob("*.py")} == {path.name for path in exported.glob("*.py")}
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP


class Hub:
    def __init__(self, root):
        self.root = root
        self.process = subprocess.Popen(
            [sys.executable, TESTS / "fake_hub.py", root], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.url = self.process.stdout.readline().strip()

    def stop(self):
        self.process.communicate()


@pytest.fixture
def hub(tmp_path_factory):
    hub = Hub(tmp_path_factory.mktemp("hub"))
    yield hub
    if hub.process.poll() is None:
        hub.stop()
