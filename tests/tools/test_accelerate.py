"""`accelerate launch` with two processes on a CPU trains as one process does."""

import torch
from accelerate.utils import convert_outputs_to_fp32
from tiny import random_ids, student_model, tiny_model
from tolerances import GRADIENTS, assert_close
from tools.processes import SCRIPT, launch
from tools.train_in_processes import optimizer_of, train


def test_two_processes_train_as_one(tmp_path):
    """Many steps without `find_unused_parameters`, one of them without a label on any row, one on one row alone."""
    command = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    result = launch(f"{command} --mixed_precision no --dynamo_backend no {SCRIPT} accelerate", tmp_path)
    assert result["processes"] == 2
    model = student_model("all kinds")
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = train(model, optimizer_of(model), torch.Tensor.backward)
    assert_close(torch.tensor(result["losses"]), torch.tensor(losses))
    assert losses[1] == 0
    for name, tensor in model.state_dict().items():
        moved = result["weights"][name] - start[name]
        assert_close(moved, tensor - start[name], slack=10 * GRADIENTS)
        assert moved.any() == (not name.startswith("context_") and "correction_bias" not in name), name


def test_mixed_precision_leaves_the_cache_as_it_is():
    """What `Accelerator.prepare` makes of `forward` with mixed precision: outputs in float32."""
    model, ids = tiny_model("all kinds"), random_ids(2, 7)
    model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
    with torch.no_grad():
        read = model(ids[:, :4])
        assert read.logits.dtype == read.last_hidden_state.dtype == torch.float32
        assert_close(model(ids[:, 4:], cache=read.cache).logits, model(ids).logits[:, 4:], torch.bfloat16, slack=5)
