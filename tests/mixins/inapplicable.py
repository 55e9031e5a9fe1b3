"""
Which of the tests that transformers runs on each of its models do not apply to a TwoTower, and why.

Names may hold wildcards. Both lists are checked: a test under INAPPLICABLE that passes is an error, as is a test
outside of both lists that does not pass, or skips itself.
"""

WEIGHTS = "attention weights are never computed as a whole, and output_attentions is refused by name"
ONE_CONFIG = "it is about models composed of parts with configs of their own; both towers share one"
ROTARY = "it is about rotary positions; nothing in a TwoTower encodes positions"
FLASH = "it is about flash attention, which is refused by name: a block is seen by itself in both directions"
NO_HOOKS = "hidden states are collected by the tower itself, not captured by hooks"
NO_PLAN = "no tensor-parallel plan is claimed"

INAPPLICABLE = {
    # Attention
    "test_attention_outputs": WEIGHTS,
    "test_eager_matches_sdpa_inference_*_output_attentions": WEIGHTS,
    "test_flash_attn_*": FLASH,
    "test_flex_attention_with_grads": "flex attention is refused by name",
    "test_sdpa_can_dispatch_on_flash": FLASH,
    "test_sliding_window_mask": "there is no sliding window; the config refuses one",
    # Positions
    "test_model_rope_scaling_*": ROTARY,
    "test_model_rope_with_partial_rotation": ROTARY,
    "test_resize_position_vector_embeddings": ROTARY,
    "test_vision_axial_rope": ROTARY,
    # What a model is made of
    "test_attn_implementation_composite_models": ONE_CONFIG,
    "test_can_set_attention_dynamically_composite_model": ONE_CONFIG,
    "test_internal_model_config_and_subconfig_are_same": ONE_CONFIG,
    "test_sdpa_can_dispatch_composite_models": ONE_CONFIG,
    "test_model_base_model_prefix": "there are two towers, neither of them the base of the other and of both heads",
    "test_num_layers_is_small": "a layer has one kind of mixer; five are the fewest with every kind beside others",
    "test_*tp_plan_*": NO_PLAN,
    # Outputs
    "test_can_capture_specific_layers_hidden_states": NO_HOOKS,
    "test_capture_outputs_decorator": NO_HOOKS,
    "test_moe_models_record_router_logits": "training has no router loss, and output_router_logits is refused by name",
    # Losses and gradients
    "test_causal_lm_loss_honors_shift_labels": "the loss is masked diffusion's, of the same position, never shifted",
    "test_encoder_decoder_loss_no_double_shift": "it is about encoder-decoder models",
    "test_enable_input_require_grads_with_gradient_checkpointing": "it looks at the gradient of the context tower's "
    "embeddings, and the loss gives the context tower none",
    "test_training_gradient_checkpointing*": "it looks at the first layer of all, the context tower's, which runs "
    "without gradients and has nothing to compute again; of the denoiser's, test_objective.py",
    # Checkpoints
    "test_can_init_all_missing_weights": "it loads a state dict without weights, which is refused",
    "test_disk_offload_bin": "pickled weights are never read",
    "test_model_weights_reload_no_missing_tied_weights": "it loads a checkpoint without weights, which is refused",
    # The tests themselves
    "test_generation_tester_mixin_inheritance": "transformers does not publish its GenerationTesterMixin",
    "test_torch_compile_for_training": "transformers runs it for models that name a class for it",
}

# What this machine may not have.
NEEDS = {
    "test_can_load_with_*": "a GPU",
    "test_cpu_offload": "a GPU",
    "test_disk_offload_safetensors": "a GPU",
    "test_sdpa_can_compile_dynamic": "a GPU",
    "test_model_parallelism": "two GPUs",
    "test_kernels_can_load_without_crashing": "the package kernels",
    "test_resize_*_with_deepspeed*": "DeepSpeed",
}
