"""Training: what each stage changes, and that an interrupted run loses nothing."""

import json

import pytest
import torch
from tiny import tiny_config
from transformers import AutoTokenizer

import twotower
from twotower.demo import training
from twotower.demo.training import Stage, train_demo
from twotower.modeling_twotower import TwoTowerForBlockDiffusion

STAGES = (
    Stage("context", steps=4, batch_size=2, warmup=1),
    Stage("denoiser", steps=4, batch_size=2, warmup=1),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train_demo(folder, STAGES, seed=1, save_every=2)
    return folder


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_result_loads_generates_and_fits_the_wheel(trained):
    model = twotower.TwoTowerForBlockDiffusion.from_pretrained(trained)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert model.dtype == torch.float32
    assert model.generation_config.mode == "mask_diffusion"
    output = model.generate(**tokenizer("Question:", return_tensors="pt"), max_new_tokens=20)
    assert output.shape[1] <= 2 + 20 + 5
    assert sum(file.stat().st_size for file in trained.iterdir() if file.is_file()) < 12e6


def test_the_released_denoiser_predicts_the_same_less_surely(trained):
    released = TwoTowerForBlockDiffusion.from_pretrained(trained)
    last = TwoTowerForBlockDiffusion.from_pretrained(trained / "last", dtype=torch.bfloat16).float()
    block = torch.full((1, 16), 3)
    with torch.no_grad():
        cache = last(torch.arange(4, 20)[None]).past_key_values
        expected = last.denoise(block, cache) / training.CONFIDENCE_TEMPERATURE
        # The head is divided in bfloat16, which rounds it by up to 2 ** -9.
        torch.testing.assert_close(
            released.denoise(block, cache), expected, rtol=0, atol=2**-8 * float(expected.abs().max())
        )


def test_the_log_tells_stage_step_and_loss(trained):
    logged = records(trained)
    assert [(record["stage"], record["step"]) for record in logged] == [
        ("context", 0),
        ("context", 3),
        ("denoiser", 0),
        ("denoiser", 3),
    ]
    assert all(record["loss"] > 0 and record["answer_tokens"] > 0 for record in logged)


def test_the_denoiser_stage_leaves_the_context_tower_alone(trained, tmp_path):
    train_demo(tmp_path, STAGES[:1], seed=1)
    before = TwoTowerForBlockDiffusion.from_pretrained(tmp_path / "last").state_dict()
    after = TwoTowerForBlockDiffusion.from_pretrained(trained / "last").state_dict()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) == name.startswith("context_"), name


def test_a_finished_run_is_not_run_again(trained):
    lines = len(records(trained))
    train_demo(trained, STAGES, seed=1)
    assert len(records(trained)) == lines


def test_a_save_interrupted_half_way_loses_nothing(trained):
    (trained / "last").rename(trained / "last.old")
    train_demo(trained, STAGES, seed=1)
    assert (trained / "last").exists() and len(records(trained)) == 4


def test_an_interrupted_run_goes_on_from_its_last_save(tmp_path, monkeypatch):
    real, calls = training._train_step, []

    def interrupted(*args):
        calls.append(args[3])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(training, "_train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_demo(tmp_path, STAGES, seed=1, save_every=2)
    train_demo(tmp_path, STAGES, seed=1, save_every=2)
    assert calls == [0, 1, 2, 3, 2, 3, 0, 1, 2, 3]
    assert torch.load(tmp_path / "last" / training.STATE_FILE, weights_only=True) == {"done": ["context", "denoiser"]}
    assert not (tmp_path / "last.old").exists() and not (tmp_path / "last.new").exists()


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    """Weights, moments of the optimiser, batches and masks all go on where they were, in both stages."""
    monkeypatch.setattr(training, "TOKENIZER_PROBLEMS", 100)
    monkeypatch.setattr(training, "demo_config", lambda: tiny_config(vocab_size=512, block_size=16))
    train_demo(tmp_path / "whole", STAGES, seed=1, save_every=2)
    real, stops = training._train_step, ["context", "denoiser"]

    def interrupted(model, batch, stage, step, *args):
        if step == 3 and stage.name in stops:  # one step after a save
            stops.remove(stage.name)
            raise KeyboardInterrupt
        return real(model, batch, stage, step, *args)

    monkeypatch.setattr(training, "_train_step", interrupted)
    for _ in ("context", "denoiser"):
        with pytest.raises(KeyboardInterrupt):
            train_demo(tmp_path / "parts", STAGES, seed=1, save_every=2)
    train_demo(tmp_path / "parts", STAGES, seed=1, save_every=2)
    parts, whole = (
        TwoTowerForBlockDiffusion.from_pretrained(tmp_path / name / "last").state_dict() for name in ("parts", "whole")
    )
    for name, tensor in whole.items():
        assert torch.equal(parts[name], tensor), name


def test_the_learning_rate_warms_up_stays_and_decays():
    stage = Stage("context", steps=100, warmup=10, decay=0.5)
    factors = [stage.lr_factor(step) for step in range(100)]
    assert factors[0] == 0.1 and factors[9] == 1.0
    assert set(factors[9:51]) == {1.0}
    assert factors[75] == 0.5 and factors[99] == pytest.approx(0.02)


def test_context_loss_ignores_padding_and_prompts():
    from twotower.demo.batches import Batch

    torch.manual_seed(0)
    model = TwoTowerForBlockDiffusion(training.demo_config())
    ids = torch.randint(4, 500, (1, 24))
    labels = ids.clone()
    labels[:, :16] = -100
    alone = training.context_loss(model, Batch(ids, torch.ones_like(ids), labels), None)
    logits = model(ids, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits[0, 15:23], ids[0, 16:])
    torch.testing.assert_close(alone, expected)
    pad = torch.zeros(1, 8, dtype=torch.long)
    padded = Batch(
        torch.cat([pad, ids], 1), torch.cat([pad, torch.ones_like(ids)], 1), torch.cat([pad - 100, labels], 1)
    )
    torch.testing.assert_close(training.context_loss(model, padded, None), expected)
