"""TwoTower: a block-diffusion language model of two NemotronH towers; importing it registers its Auto classes."""

from importlib.resources import files
from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_twotower import TwoTowerConfig
from .decoding.asking import PerRow, Stateless
from .decoding.serving import TwoTowerEngine
from .generation_twotower import TwoTowerGenerationConfig
from .modeling_twotower import TwoTowerForBlockDiffusion

# Here rather than beside the classes: their files also run as remote code, and there the first model that a process
# loads would lend its code to all that follow.
AutoConfig.register(TwoTowerConfig.model_type, TwoTowerConfig, exist_ok=True)
AutoModel.register(TwoTowerConfig, TwoTowerForBlockDiffusion, exist_ok=True)
AutoModelForCausalLM.register(TwoTowerConfig, TwoTowerForBlockDiffusion, exist_ok=True)


def demo_checkpoint() -> Path:
    """The folder of the demonstration checkpoint that comes with the package; see its model card."""
    folder = Path(str(files(__name__))) / "checkpoint"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"the demonstration checkpoint is not at {folder}; reinstall twotower, or train one with `twotower train`"
        )
    return folder


__all__ = [
    "PerRow",
    "Stateless",
    "TwoTowerConfig",
    "TwoTowerEngine",
    "TwoTowerForBlockDiffusion",
    "TwoTowerGenerationConfig",
    "demo_checkpoint",
]
