import pytest
import torch


@pytest.fixture
def nan_where_nothing_is_written(monkeypatch):
    """What a kernel should write, but does not, is then no number; of integers, a place far out of bounds."""
    make = torch.Tensor.new_empty

    def new_empty(*args, **options):
        made = make(*args, **options)
        return made.fill_(torch.nan if made.is_floating_point() else 2**30)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
