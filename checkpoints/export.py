"""Exporting a model: a folder for the Hugging Face Hub that loads with `trust_remote_code=True`, without this package.

It holds the package's code in three files (see bundling.py), weights, tokenizer, configs and a model card.
"""

import json
import math
import shutil
import tempfile
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..compat_twotower import logger
from ..configuration_twotower import LAYER_LETTERS, TwoTowerConfig
from ..modeling_twotower import TwoTowerForBlockDiffusion
from .bundling import CODE_ROOT, write_code
from .loading import (
    ADAPTER_CONFIG,
    REMEDY_OF_RENAMED,
    WEIGHT_DTYPES,
    check_no_adapter,
    opened_weights,
    renamed_weights,
)

AUTO_MAP = {
    "AutoConfig": f"configuration_twotower.{TwoTowerConfig.__name__}",
    "AutoModel": f"modeling_twotower.{TwoTowerForBlockDiffusion.__name__}",
    "AutoModelForCausalLM": f"modeling_twotower.{TwoTowerForBlockDiffusion.__name__}",
}
WEIGHT_FILES = "model*.safetensors*"
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
NOTICE_FILES = ("LICENSE*", "NOTICE*")
EXPORTED_FILES = (WEIGHT_FILES, "*.json", "*.py", "*.jinja", "*.model", "*.txt", "README.md", *NOTICE_FILES)


def export(
    source: str | Path | PreTrainedModel,
    folder: str | Path,
    push_to_hub: str | None = None,
    private: bool | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "50GB",
) -> Path:
    """
    Write a self-contained Hub folder: all of it, or nothing.

    Args:
        source: folder of a TwoTower checkpoint in any layout, or a loaded model. A folder's weights stay in the dtype
            they are stored in, its model card and licence files are copied; otherwise a card is generated from the
            config.
        folder: what to write; must not hold anything yet, but see `overwrite`.
        push_to_hub: repository, `name` or `owner/name`, to upload the folder to; created when absent.
        private: visibility of a repository created here; default the owner's setting.
        tokenizer: default the one in the source folder, if there is one.
        overwrite: replace `folder` when it is an earlier export.
        max_shard_size: largest weight file, as in `save_pretrained`.

    Returns:
        The folder's absolute path.

    Raises:
        ValueError: for a source that is no folder and no TwoTower, or has an adapter, a target that holds something
            else than an earlier export, or an impossible repository name; before any work.
        OSError: where the upload fails; the folder is whole.
    """
    # 1. Refuse before loading anything.
    folder = Path(folder).expanduser().absolute()
    _check_target(folder, overwrite)
    if push_to_hub is not None:
        validate_repo_id(push_to_hub)
    elif private is not None:
        raise ValueError(f"private is {private}, which is about a repository; give push_to_hub, too, or leave it out")
    origin = None if isinstance(source, nn.Module) else Path(source).expanduser()
    _check_source(source, origin)
    # 2. Load.
    model: Any = source
    if origin is not None:
        model = TwoTowerForBlockDiffusion.from_pretrained(origin, dtype=_stored_dtype(origin))
    if tokenizer is None and origin is not None:
        tokenizer = _load_tokenizer(origin)
    # 3. Write beside the target, then move into place: a link is followed, not replaced.
    place = folder.resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}-") as scratch:
        staged = Path(scratch) / "export"
        model.save_pretrained(staged, max_shard_size=max_shard_size, save_original_format=False)
        _complete_config(staged / "config.json", None if origin is None else origin / "config.json")
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        write_code(staged)
        _write_notices(origin, staged)
        (staged / "README.md").write_text(_model_card(origin, model, push_to_hub or folder.name), encoding="utf-8")
        _replace(place, staged, Path(scratch) / "replaced")
    # 4. Upload. Weight files of an earlier upload go: with other shards they would be loaded in place of the new ones.
    if push_to_hub is not None:
        try:
            repo_id = create_repo(push_to_hub, private=private, exist_ok=True).repo_id
            if repo_id != push_to_hub:  # whose owner is known only now
                (folder / "README.md").write_text(_model_card(origin, model, repo_id), encoding="utf-8")
            upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                delete_patterns=WEIGHT_FILES,
                commit_message="Upload TwoTower model",
            )
        except (HTTPError, ConnectionError, TimeoutError) as error:  # the latter from hf_xet, which uploads weights
            if isinstance(error, HfHubHTTPError):  # the Hub's own, which says what is wrong
                raise
            raise ConnectionError(
                f"{folder} is whole, but uploading it to {push_to_hub} failed: {str(error) or type(error).__name__}; "
                "once the Hub can be reached, export again with overwrite, or use `hf upload`"
            ) from error
    return folder


def _check_source(source: str | Path | PreTrainedModel, origin: Path | None) -> None:
    if isinstance(source, nn.Module):
        check_no_adapter(source)
        if renamed := renamed_weights(source):
            raise ValueError(f"{renamed[0]} is computed from other tensors; {REMEDY_OF_RENAMED}")
        # Not isinstance of our class: a model that was itself loaded as remote code is of another one.
        kind = getattr(getattr(source, "config", None), "model_type", None)
        if kind != TwoTowerConfig.model_type:
            raise ValueError(f"the model is a {type(source).__name__}; only TwoTower models can be exported")
    if origin is not None and not origin.is_dir():
        raise ValueError(f"{source} is not a folder; give the folder of a TwoTower checkpoint, or a loaded model")
    if origin is not None and (origin / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{source} holds an adapter; load it with peft and merge it (merge_and_unload()) first")


def _load_tokenizer(origin: Path) -> PreTrainedTokenizerBase | None:
    if not any((origin / name).is_file() for name in TOKENIZER_FILES):
        logger.warning(f"{origin} holds no tokenizer, so neither will the export")
        return None
    return AutoTokenizer.from_pretrained(origin, trust_remote_code=False)


def _stored_dtype(origin: Path) -> torch.dtype | str:
    """What most weights of a folder are stored in, whatever its config asks to load them in; else "auto"."""
    sizes: Counter[torch.dtype] = Counter()
    for file in origin.glob(WEIGHT_FILES):
        if file.suffix == ".safetensors":
            with opened_weights(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118  # which is no dict
                    part = tensors.get_slice(name)
                    if (dtype := WEIGHT_DTYPES.get(part.get_dtype())) is not None:
                        sizes[dtype] += math.prod(part.get_shape())
    return sizes.most_common(1)[0][0] if sizes else "auto"


def _complete_config(written: Path, origin: Path | None) -> None:
    """Name the classes, and ask to load the weights in what the source's config asks for."""
    config = {**json.loads(written.read_text(encoding="utf-8")), "auto_map": AUTO_MAP}
    asked = {} if origin is None else json.loads(origin.read_text(encoding="utf-8"))
    config["dtype"] = asked.get("dtype") or asked.get("torch_dtype") or config["dtype"]
    written.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_notices(origin: Path | None, staged: Path) -> None:
    """The source's licence files, which are about its weights, and ours, which is about the code."""
    for notice in [] if origin is None else [path for pattern in NOTICE_FILES for path in origin.glob(pattern)]:
        shutil.copyfile(notice, staged / notice.name)
    ours = CODE_ROOT / "LICENSE"
    taken = (staged / "LICENSE").is_file() and (staged / "LICENSE").read_bytes() != ours.read_bytes()
    shutil.copyfile(ours, staged / ("LICENSE.code" if taken else "LICENSE"))


def _check_target(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder that does not exist yet")
    if not any(folder.iterdir()):
        return
    foreign = _foreign_files(folder)
    if foreign:
        raise ValueError(f"{folder} is not empty and no earlier export ({foreign}); give another folder")
    if not overwrite:
        raise ValueError(
            f"{folder} holds an earlier export; give another folder, or overwrite=True (--overwrite) to replace it"
        )


def _foreign_files(folder: Path) -> str | None:
    """What keeps a folder from being an export of ours, and nothing else."""
    if not _names_our_code(folder / "config.json"):
        return "its config.json does not name our code"
    for path in sorted(folder.iterdir()):
        if path.is_dir() or not any(fnmatch(path.name, pattern) for pattern in EXPORTED_FILES):
            return f"it holds {path.name}"
    return None


def _names_our_code(config_file: Path) -> bool:
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("auto_map") == AUTO_MAP


def _replace(folder: Path, staged: Path, replaced: Path) -> None:
    """Move `staged` to `folder`; what was there goes to `replaced`, or back when the move fails."""
    if not folder.exists():
        staged.rename(folder)
        return
    folder.rename(replaced)
    try:
        staged.rename(folder)
    except OSError:
        replaced.rename(folder)
        raise


def _model_card(origin: Path | None, model: PreTrainedModel, name: str) -> str:
    """The source's model card, or one made from the config's facts, with the metadata the Hub needs."""
    if origin is not None and (origin / "README.md").is_file():
        text = (origin / "README.md").read_text(encoding="utf-8")
    else:
        text = _generated_card(model, name)
    metadata = ModelCardData(
        library_name="transformers",
        license="unknown",
        pipeline_tag="text-generation",
        tags=["twotower", "diffusion", "custom_code"],
    )
    if not text.startswith("---\n"):
        return f"---\n{metadata.to_yaml()}\n---\n\n{text}"
    card = ModelCard(text)
    missing = {key: value for key, value in metadata.to_dict().items() if card.data.get(key) is None}
    for key, value in missing.items():
        setattr(card.data, key, value)
    return str(card) if missing else text


def _generated_card(model: PreTrainedModel, name: str) -> str:
    config, dtype = model.config, str(model.dtype).removeprefix("torch.")
    letters = {kind: letter for letter, kind in LAYER_LETTERS.items()}
    pattern = "".join(letters[kind] for kind in config.layers_block_type)
    parts = {
        "context tower": ("context_tower", "context_lm_head"),
        "denoiser": ("denoiser_tower", "lm_head", "t_embedder", "t_block", "scale_shift_tables"),
    }
    sizes = {
        part: sum(parameter.numel() for name in names for parameter in model.get_submodule(name).parameters())
        for part, names in parts.items()
    }
    return f"""# {name}

A TwoTower block-diffusion language model: a context tower reads the text and a denoiser fills the next
{config.block_size} tokens at once, in as many passes as it needs. No card came with the weights, so nothing is stated
here about their training data, quality, intended use or licence.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
inputs = tokenizer("What is 2 + 2?", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64)  # or mode="ar", the context tower alone
print(tokenizer.decode(output[0], skip_special_tokens=True))
```

| | |
|---|---|
| Parameters | {sum(sizes.values()):,}: {", ".join(f"{part} {size:,}" for part, size in sizes.items())} |
| Weights | {dtype}, safetensors |
| Layers of each tower | {len(pattern)}: `{pattern}` (M Mamba-2, * attention, E mixture of experts, - MLP) |
| Hidden size | {config.hidden_size} |
| Vocabulary | {config.vocab_size}, of which token {config.mask_token_id} is the mask |
| Block size | {config.block_size} |

The Python files are those of the `twotower` package, under the Apache License 2.0. Where that package is installed,
`import twotower` makes `trust_remote_code` unnecessary.
"""


__all__ = ["export"]
