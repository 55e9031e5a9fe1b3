"""Device maps of towers: what goes where, by the config alone, and from_pretrained(device_map="towers")."""

import pytest
import torch
from tiny import random_ids, tiny_config, tiny_model

from twotower.checkpoints import placement
from twotower.checkpoints.placement import CONTEXT_PARTS, DENOISER_PARTS, devices_for_towers, execution_device
from twotower.configuration_twotower import TwoTowerConfig
from twotower.modeling_twotower import TWOTOWER_PARTS, TwoTowerForBlockDiffusion

CONFIG = tiny_config("all kinds")
towers_device_map = TwoTowerForBlockDiffusion.towers_device_map


def bytes_on(config, device_map, dtype=torch.bfloat16) -> dict:
    """Of each device; every tensor has exactly one."""
    with torch.device("meta"):
        model = TwoTowerForBlockDiffusion(config)
    sizes: dict = {}
    for name, tensor in model.state_dict().items():
        places = [device for part, device in device_map.items() if f"{name}.".startswith(f"{part}." if part else "")]
        assert len(places) == 1, (name, places)
        sizes[places[0]] = sizes.get(places[0], 0) + tensor.numel() * dtype.itemsize
    return sizes


def test_a_tower_on_each_of_two():
    expected = dict.fromkeys(CONTEXT_PARTS, 0) | dict.fromkeys(DENOISER_PARTS, 1)
    assert towers_device_map(CONFIG, [0, 1]) == expected
    assert set(expected) == set(TWOTOWER_PARTS)


@pytest.mark.parametrize("device", [0, "cpu", torch.device("cuda", 3)])
def test_everything_on_one(device):
    assert towers_device_map(CONFIG, [device]) == {"": device}


def test_four_of_the_released_geometry(goldens):
    """Two for each tower, divided between layers; none has more than a layer of experts above half of its tower."""
    config = TwoTowerConfig.from_pretrained(goldens.parent / "nvidia_30b")
    device_map = towers_device_map(config, [0, 1, 2, 3], torch.bfloat16)
    assert {device for part, device in device_map.items() if part.startswith("context")} == {0, 1}
    assert {device for part, device in device_map.items() if not part.startswith("context")} == {2, 3}
    sizes = bytes_on(config, device_map)
    assert max(sizes.values()) < 1.05 * sum(sizes.values()) / 4
    assert sum(sizes.values()) == pytest.approx(63.19e9 * 2, rel=1e-3)
    layers = [device_map[f"denoiser_tower.layers.{idx}"] for idx in range(52)]
    assert layers == sorted(layers), "a pass goes from one device to the next, once"


def test_three_of_the_released_geometry(goldens):
    """Each a third; the second has layers of both towers, in the order of a pass."""
    config = TwoTowerConfig.from_pretrained(goldens.parent / "nvidia_30b")
    device_map = towers_device_map(config, [0, 1, 2], torch.bfloat16)
    sizes = bytes_on(config, device_map)
    assert max(sizes.values()) < 1.05 * sum(sizes.values()) / 3
    assert device_map["context_tower.embeddings"] == 0 and device_map["context_lm_head"] == 1
    assert device_map["t_embedder"] == device_map["denoiser_tower.embeddings"] == 1 and device_map["lm_head"] == 2


def test_one_tower_alone_has_all_devices():
    device_map = towers_device_map(CONFIG, [0, 1, 2], towers="context")
    assert set(device_map.values()) == {0, 1, 2}
    assert all(name.startswith("context_") for name in device_map)
    assert towers_device_map(CONFIG, [5], towers="context") == {"": 5}


def test_limits_move_the_division():
    even = bytes_on(CONFIG, towers_device_map(CONFIG, [0, 1, 2], "bfloat16"))
    less = dict(even) | {0: even[0] // 2}
    device_map = towers_device_map(CONFIG, [0, 1, 2], "bfloat16", {0: less[0], 1: "1MB"})
    uneven = bytes_on(CONFIG, device_map)
    assert uneven[0] <= less[0] and max(uneven[1], uneven[2]) < sum(even.values()) * 0.6


def test_a_half_without_room_for_its_tower_shares_it():
    tower = bytes_on(CONFIG, towers_device_map(CONFIG, [0, 1], "bfloat16"))[0]
    uneven = bytes_on(CONFIG, towers_device_map(CONFIG, [0, 1], "bfloat16", {0: tower // 2}))
    assert 0 < uneven[0] <= tower // 2 < uneven[1]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"do not fit on 0 \(1.0 KB\), 1 \(2.0 KB\).*max_memory.*\"auto\".*context"):
        towers_device_map(CONFIG, [0, 1], max_memory={0: "1KB", 1: 2000})


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ([], "one or more"),
        ("cuda", "give a list"),
        ([0, 0], "one of them twice"),
        (["cuda:1", torch.device("cuda:1")], "one of them twice"),
        (["nonsense"], "'nonsense' is no device"),
        ([0, -1], "numbered from 0"),
        ([True], "True is no device"),
        ([None], "None is no device"),
    ],
)
def test_bad_devices_are_refused(devices, message):
    with pytest.raises(ValueError, match=message):
        towers_device_map(CONFIG, devices)


@pytest.mark.parametrize("size", ["much", "GB", -1, True, [1]])
def test_bad_sizes_are_refused(size):
    with pytest.raises(ValueError, match=r"max_memory of 1 is .*70GB"):
        towers_device_map(CONFIG, [0, 1], max_memory={0: "1GB", 1: size})


@pytest.mark.parametrize("dtype", ["bfloat", "nn", 2])
def test_bad_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=f"dtype is {dtype!r}; give a torch dtype"):
        towers_device_map(CONFIG, [0, 1], dtype)


def test_unknown_towers_are_refused():
    with pytest.raises(ValueError, match="towers is 'left'; use one of both, context"):
        TwoTowerForBlockDiffusion(CONFIG, towers="left")


# The devices there are.


def test_devices_named_by_max_memory():
    assert devices_for_towers({1: "70GB", 0: "70GB", "cpu": "100GB"}) == [1, 0]
    assert devices_for_towers({"cpu": "100GB"}) == ["cpu"]


@pytest.mark.parametrize(
    ("kind", "count", "expected"),
    [("cuda", 3, [0, 1, 2]), ("xpu", 2, ["xpu:0", "xpu:1"]), ("mps", 1, ["mps"]), (None, 0, ["cpu"])],
)
def test_devices_of_the_machine(kind, count, expected, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: kind is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    assert devices_for_towers() == expected


def test_what_accelerators_have_free_is_a_limit(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(placement, "get_max_memory", lambda: {0: 5, 1: 6, "cpu": 7})
    assert placement.memory_for_towers() == {0: 5, 1: 6}
    assert placement.memory_for_towers({1: "2KB"}) == {0: 5, 1: "2KB"}


def test_what_other_accelerators_have_free_is_a_limit_by_their_names(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(placement, "get_max_memory", lambda: {0: 5, 1: 6, "cpu": 7})
    assert placement.memory_for_towers() == dict(zip(devices_for_towers(), (5, 6), strict=True))


# Loading.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    tiny_model("all kinds").save_pretrained(path, max_shard_size="60KB")
    return path


@pytest.mark.parametrize("arguments", [{}, {"max_memory": {"cpu": "1GB"}}, {"dtype": "bfloat16"}])
def test_with_a_cpu_alone_all_of_it_is_there(folder, arguments):
    model = TwoTowerForBlockDiffusion.from_pretrained(folder, device_map="towers", **arguments)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert model.generate(random_ids(1, 5), max_new_tokens=4).shape == (1, 9)


def test_too_little_memory_is_refused_before_anything_is_loaded(folder, monkeypatch):
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"do not fit on cpu \(1.0 KB\)"):
        TwoTowerForBlockDiffusion.from_pretrained(folder, device_map="towers", max_memory={"cpu": "1KB"})


def test_two_accelerators_get_a_tower_each(folder, monkeypatch):
    """As far as transformers: the map it is given, of a config from the folder, and of one in memory."""
    given = {}

    class Stop(Exception):
        pass

    def loaded(cls, path, *args, **kwargs):
        given.update(kwargs)
        raise Stop

    monkeypatch.setattr("twotower.checkpoints.pretrained.devices_for_towers", lambda max_memory: [0, 1])
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", classmethod(loaded))
    for arguments in ({}, {"config": CONFIG}, {"config": str(folder), "torch_dtype": torch.bfloat16}):
        with pytest.raises(Stop):
            TwoTowerForBlockDiffusion.from_pretrained(folder, device_map="towers", **arguments)
        assert given["device_map"] == dict.fromkeys(CONTEXT_PARTS, 0) | dict.fromkeys(DENOISER_PARTS, 1)


@pytest.mark.parametrize("devices", [["cpu", "disk"], ["disk", "cpu"]])
def test_transformers_takes_the_map(folder, devices, tmp_path):
    """Of the two places a machine without accelerators has, one of which is a folder."""
    device_map = towers_device_map(CONFIG, devices)
    model = TwoTowerForBlockDiffusion.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
    offloaded = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.is_meta}
    assert offloaded == set(CONTEXT_PARTS if devices[0] == "disk" else DENOISER_PARTS)
    assert {execution_device(layer.norm) for layer in model.denoiser_tower.layers} == {torch.device("cpu")}
    expected = tiny_model("all kinds").generate(random_ids(2, 5), max_new_tokens=6)
    assert torch.equal(model.generate(random_ids(2, 5), max_new_tokens=6), expected)


def test_transformers_takes_a_map_by_layers(folder, tmp_path):
    """Of three, the one in the middle standing for a device with layers of both towers."""
    device_map = towers_device_map(CONFIG, [0, 1, 2])
    places = {part: {0: "cpu", 1: "disk", 2: "cpu"}[device] for part, device in device_map.items()}
    model = TwoTowerForBlockDiffusion.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    expected = tiny_model("all kinds").generate(random_ids(2, 5), max_new_tokens=6)
    assert torch.equal(model.generate(random_ids(2, 5), max_new_tokens=6), expected)
