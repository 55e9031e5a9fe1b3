"""The method names of NVIDIA's released code, so that scripts written for it run here: aliases over `generate`.

What differs: a row ends at its own end-of-text token, with nothing after it, whatever the other rows do; in a batch
every row has its own timestep; and any number of new tokens may be asked for.

Shapes: B batch, R rows still generating, P prompt columns, N new tokens, S block, V vocabulary.
"""

from collections.abc import Callable
from threading import get_ident
from typing import Any

import torch

from ..checkpoints.placement import CONTEXT_PARTS, DENOISER_PARTS
from ..compat_twotower import BaseStreamer, is_accelerate_available, requires_backends
from ..inputs_twotower import check_ids
from .state import BlockStep

# Without the condition, transformers would ask everybody who loads an exported model to install accelerate.
if is_accelerate_available():
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_submodules


class ReleasedInterface:
    """
    Mixin with the methods of NVIDIA's model class.

    `_last_nfe` counts the denoiser passes of this thread's last `generate_mask_diffusion`; in a thread that has made
    none, those of the last in any. Before any, as with a plain attribute, there is none.
    """

    @property
    def _last_nfe(self) -> int:
        counts = vars(self).get("_nfe_by_thread", {})
        if not counts:
            raise AttributeError  # which torch's Module then raises in its own words
        return counts.get(get_ident(), counts[None])

    @_last_nfe.setter
    def _last_nfe(self, count: int) -> None:
        vars(self).setdefault("_nfe_by_thread", {}).update({None: count, get_ident(): count})

    def generate_mask_diffusion(
        self: Any,
        input_ids: torch.Tensor,
        max_new_tokens: int = 128,
        block_size: int = 16,
        steps_per_block: int = 16,
        mask_token_id: int = 3,
        temperature: float | None = 0.0,
        top_k: int | None = None,
        confidence_threshold: float = 0.9,
        eos_token_id: int | list[int] | None = None,
        step_callback: Callable[..., Any] | None = None,
    ) -> torch.Tensor:
        """
        `generate` in mode "mask_diffusion"; the number of denoiser passes of the whole batch goes to `_last_nfe`.

        Args:
            input_ids: (B, P), all of them tokens.
            max_new_tokens: of each row, at most.
            block_size, steps_per_block, confidence_threshold: as in [`TwoTowerGenerationConfig`].
            mask_token_id: the config's, or a ValueError.
            temperature: 0 or None takes the likeliest tokens.
            top_k: None draws from the whole vocabulary. (The released code ignores it.)
            eos_token_id: where a row ends; None nowhere, whatever the generation config says.
            step_callback: called as `(step, steps, block_ids, t=, logits=, block_idx=)`: for every block with step 0,
                t 1.0 and no logits, then for every denoiser pass with the (R, S) ids it was given, their masked
                fraction and its (R, S, V) float32 logits. Nothing comes of what it changes or returns.

        Returns:
            (B, P + N) prompts and new tokens.
        """
        if mask_token_id != self.config.mask_token_id:
            raise ValueError(
                f"mask_token_id is {mask_token_id}, but the model's is {self.config.mask_token_id}; give that one"
            )
        passes = _PassCounter()
        sequences = self.generate(
            input_ids,
            mode="mask_diffusion",
            block_size=block_size,
            steps_per_block=steps_per_block,
            unmasking_rule="confidence",
            confidence_threshold=confidence_threshold,
            step_callback=None if step_callback is None else _released_callback(step_callback, mask_token_id),
            streamer=passes,
            **_common_arguments(input_ids, max_new_tokens, temperature, top_k, None, eos_token_id),
        )
        self._last_nfe = passes.count
        return sequences.to(input_ids.device)

    def generate_mock_ar(
        self: Any,
        input_ids: torch.Tensor,
        max_new_tokens: int = 128,
        temperature: float | None = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | list[int] | None = None,
    ) -> torch.Tensor:
        """`generate` in mode "mock_ar"; arguments and result as for [`generate_mask_diffusion`]."""
        arguments = _common_arguments(input_ids, max_new_tokens, temperature, top_k, top_p, eos_token_id)
        return self.generate(input_ids, mode="mock_ar", **arguments).to(input_ids.device)

    def generate_ar(
        self: Any,
        input_ids: torch.Tensor,
        max_new_tokens: int = 128,
        temperature: float | None = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | list[int] | None = None,
    ) -> torch.Tensor:
        """`generate` in mode "ar"; arguments and result as for [`generate_mask_diffusion`]."""
        arguments = _common_arguments(input_ids, max_new_tokens, temperature, top_k, top_p, eos_token_id)
        return self.generate(input_ids, mode="ar", **arguments).to(input_ids.device)

    def place_towers_on_devices(
        self: Any, ctx_device: torch.device | str | int = "cuda:0", den_device: torch.device | str | int = "cuda:1"
    ) -> Any:
        """
        Put the context tower on one device and the denoiser on another, as `from_pretrained(device_map=...)` does.

        Args:
            ctx_device: of the context tower and its head.
            den_device: of the denoiser, its head and its time conditioning. As in a device map, "cpu" beside an
                accelerator means kept there and computed on the accelerator.

        Returns:
            The model itself.
        """
        requires_backends(self, "accelerate")
        self.check_denoiser("place_towers_on_devices")
        remove_hook_from_submodules(self)  # of an earlier placement
        device_map = dict.fromkeys(CONTEXT_PARTS, ctx_device) | dict.fromkeys(DENOISER_PARTS, den_device)
        return dispatch_model(self, device_map, skip_keys=self._skip_keys_device_placement)


def _common_arguments(
    input_ids: torch.Tensor,
    max_new_tokens: int,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    eos_token_id: int | list[int] | None,
) -> dict[str, Any]:
    check_ids("input_ids", input_ids)
    arguments: dict[str, Any] = {
        "attention_mask": torch.ones_like(input_ids),
        "max_new_tokens": max_new_tokens,
        "eos_token_id": eos_token_id,
        "do_sample": temperature is not None and temperature > 0,
        "return_dict_in_generate": False,
    }
    if arguments["do_sample"]:
        # What the call leaves out is off, whatever transformers' defaults and the generation config say.
        arguments |= {"temperature": temperature, "top_k": top_k or 0, "top_p": top_p or 1.0}
    return arguments


class _PassCounter(BaseStreamer):
    """Of one call, whatever other threads do with the model: `generate` shows it the block after every pass."""

    def __init__(self) -> None:
        self.count = 0

    def put_draft(self, value: torch.Tensor) -> None:
        self.count += 1

    def put(self, value: torch.Tensor) -> None:
        pass

    def end(self) -> None:
        pass


def _released_callback(step_callback: Callable[..., Any], mask_token_id: int) -> Callable[[BlockStep], None]:
    def call(state: BlockStep) -> None:
        ids, steps, block = state.ids, state.steps, state.block
        if state.step == 0:
            step_callback(0, steps, ids.clone(), t=1.0, logits=None, block_idx=block)
        masked_fraction = float(state.timestep.mean())
        # As the denoiser gave them; `generate` forbids the mask.
        state.logits[..., mask_token_id] = state.mask_logits
        step_callback(state.step, steps, ids, t=masked_fraction, logits=state.logits, block_idx=block)

    return call


__all__ = ["ReleasedInterface"]
