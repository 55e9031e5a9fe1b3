"""FSDP2 with two processes on a CPU trains as one process does, and its weights are saved and loaded."""

import torch
from tiny import student_model
from tolerances import GRADIENTS, assert_close
from tools.processes import SCRIPT, launch
from tools.train_in_processes import optimizer_of, train

from twotower.modeling_twotower import TwoTowerForBlockDiffusion


def test_two_processes_train_as_one(tmp_path):
    result = launch(f"-m torch.distributed.run --standalone --nproc-per-node 2 {SCRIPT} fsdp", tmp_path)
    assert result["processes"] == 2
    model = student_model("all kinds")
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert_close(
        torch.tensor(result["losses"]), torch.tensor(train(model, optimizer_of(model), torch.Tensor.backward))
    )
    loaded = TwoTowerForBlockDiffusion.from_pretrained(tmp_path / "saved").state_dict()
    for name, tensor in model.state_dict().items():
        trained = result["weights"][name]
        assert_close(trained - start[name], tensor - start[name], slack=10 * GRADIENTS)
        assert torch.equal(result["restored"][name], trained), name
        assert torch.equal(loaded[name], trained), name
