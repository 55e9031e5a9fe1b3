"""A TwoTower on disk from a NemotronH backbone on disk, without either in memory.

A safetensors file is the length of a header, the header, which says where each tensor's bytes are, and the bytes. A
TwoTower's tensors are the backbone's under two names each; so bytes are copied, a piece at a time, and no tensor is
made of them. `from_pretrained(folder, device_map=...)` then puts each where there is room.
"""

import json
import shutil
import struct
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from transformers import GenerationConfig

from ..compat_twotower import (
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    NemotronHConfig,
)
from ..configuration_twotower import TwoTowerConfig
from ..decoding.config import TwoTowerGenerationConfig
from ..modeling_twotower import TwoTowerForBlockDiffusion
from .loading import check_complete, check_mask, check_safetensors, config_of_backbone, take_text_tokens

PIECE = 2**22  # bytes copied at a time
# What a backbone's names begin with, in NVIDIA's layout or transformers', and what they begin with in either tower.
PREFIXES = {
    "backbone.": ("context_tower.", "denoiser_tower."),
    "model.": ("context_tower.", "denoiser_tower."),
    "lm_head.": ("context_lm_head.", "lm_head."),
}
PREDICTION_LAYERS = "mtp."  # which a TwoTower has none of
OTHER_FILES = ("*.jinja", "*.model", "*.txt", "tokenizer*", "special_tokens_map.json")


def convert_backbone(source: str | Path, folder: str | Path, **fields: Any) -> Path:
    """
    Write the TwoTower that `from_backbone(source, **fields)` makes, in a few megabytes of memory.

    Args:
        source: folder or Hub id of a NemotronH checkpoint.
        folder: gets it, with the backbone's tokenizer; must not exist, or be empty.
        fields: `block_size`, `mask_token_id` and what else [`TwoTowerConfig`] adds.

    Returns:
        The folder.

    Raises:
        ValueError: for a folder that holds something, another field, for weights that are missing, cut off or none of
            a backbone's.
    """
    added = TwoTowerConfig.__annotations__
    if unknown := [name for name in fields if name not in added]:
        raise ValueError(f"{unknown[0]} is no field that a TwoTower adds; leave it out, or use {', '.join(added)}")
    source, folder = Path(source).expanduser(), Path(folder).expanduser()
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; give another folder")
    origin = source if source.is_dir() else Path(snapshot_download(str(source)))
    names = check_safetensors(origin, {})
    if names is None:
        raise ValueError(f"{origin} holds an adapter; load it with peft, merge it (merge_and_unload()) and save that")
    foreign = [name for name in sorted(names) if not name.startswith((*PREFIXES, PREDICTION_LAYERS))]
    if foreign:
        raise ValueError(f"{origin} holds {foreign[0]}, which is no NemotronH's; give the folder of a backbone")
    check_complete({each for each in ("lm_head.weight",) if each not in names}, origin)
    own = NemotronHConfig.from_pretrained(origin)
    if getattr(own, "quantization_config", None) is not None:
        raise ValueError(f"{origin} is quantised, which no denoiser is trained from; give what it was made of")
    config = config_of_backbone(own, **fields)
    texts = TwoTowerGenerationConfig.from_model_config(config)
    if (origin / GENERATION_CONFIG_NAME).is_file():
        take_text_tokens(texts, GenerationConfig.from_pretrained(origin))
    check_mask(config.mask_token_id, texts)
    texts.validate()
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, str] = {}
    for shard in _weight_files(origin):
        for tower, part in enumerate(("context", "denoiser")):
            written = _copy_renamed(shard, folder / f"{part}-{shard.name}", tower)
            files |= dict.fromkeys(written, f"{part}-{shard.name}")
    conditioning = _time_conditioning(config)
    save_file(conditioning, folder / "conditioning.safetensors", metadata={"format": "pt"})
    files |= dict.fromkeys(conditioning, "conditioning.safetensors")
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")
    for pattern in OTHER_FILES:
        for file in origin.glob(pattern):
            shutil.copy(file, folder)
    texts.save_pretrained(folder)
    config.architectures = [TwoTowerForBlockDiffusion.__name__]
    config.save_pretrained(folder)  # last: without it, what is there is no checkpoint
    return folder


def _weight_files(folder: Path) -> list[Path]:
    """Those that transformers would load; there may be others, such as another division of the same weights."""
    single, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if single.is_file():
        return [single]
    return [
        folder / shard for shard in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    ]


def _copy_renamed(source: Path, target: Path, tower: int) -> list[str]:
    """Copy a file's tensors under the names they have in a tower, 0 or 1; returns these."""
    with source.open("rb") as read, target.open("wb") as write:
        (length,) = struct.unpack("<Q", read.read(8))
        header = json.loads(read.read(length))
        begin, metadata = 8 + length, header.pop("__metadata__", {"format": "pt"})
        renamed, offset, pieces = {"__metadata__": metadata}, 0, []
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
            if prefix is None:
                continue
            first, last = entry["data_offsets"]
            renamed[PREFIXES[prefix][tower] + name.removeprefix(prefix)] = {
                **entry,
                "data_offsets": [offset, offset + last - first],
            }
            offset += last - first
            pieces.append((begin + first, last - first))
        text = json.dumps(renamed).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at whole numbers of 8 bytes
        write.write(struct.pack("<Q", len(text)) + text)
        for start, count in pieces:
            _copy(read, write, start, count)
    return [name for name in renamed if name != "__metadata__"]


def _copy(read: BinaryIO, write: BinaryIO, start: int, count: int) -> None:
    read.seek(start)
    while count:
        piece = read.read(min(PIECE, count))
        write.write(piece)
        count -= len(piece)


def _time_conditioning(config: TwoTowerConfig) -> dict[str, torch.Tensor]:
    """The tensors a backbone has none of, as they are before training."""
    with torch.device("meta"):
        model = TwoTowerForBlockDiffusion(config)
    parts = {"t_embedder": model.t_embedder, "t_block": model.t_block, "scale_shift_tables": model.scale_shift_tables}
    for part in parts.values():
        part.to_empty(device="cpu")
    model.t_embedder.apply(model._init_weights)
    model.reset_time_conditioning()
    dtype = config.dtype or torch.float32
    return {
        f"{name}.{key}": tensor.to(dtype).contiguous()
        for name, part in parts.items()
        for key, tensor in part.state_dict().items()
    }


__all__ = ["convert_backbone"]
