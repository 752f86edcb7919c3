"""The parts of a run in several processes that one process can be asked about."""

import random
import re
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig

from irl_align.errors import UserError
from irl_align.utils import distributed

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "accelerate"


def test_shares_divide_all_rows_about_equally() -> None:
    draw = random.Random(0)
    for _ in range(50):
        weights = [draw.randint(1, 200) for _ in range(draw.randint(0, 40))]
        parts = distributed.shares(weights, count := draw.randint(1, 6))
        assert sorted(i for part in parts for i in part) == list(range(len(weights)))
        loads = [sum(weights[i] for i in part) for part in parts]
        assert len(parts) == count
        assert max(loads) - min(loads) <= max(weights, default=0)
    assert distributed.shares([3, 1, 2], 1) == [[0, 1, 2]]
    assert distributed.shares([5, 1, 1, 1, 1, 1], 2) == [[0], [1, 2, 3, 4, 5]]
    assert distributed.shares([7], 3) == [[0], [], []]


def test_one_process_does_all_the_work() -> None:
    assert (distributed.rank(), distributed.count(), distributed.is_main()) == (0, 1, True)
    assert distributed.broadcast("a") == "a"
    assert distributed.gather(2) == [2]
    assert distributed.on_main(lambda: 3) == 3
    lengths = distributed.over_sequences(
        lambda p, c: [len(x) for x in c], [[1], [2]], [[1, 2], [3]]
    )
    assert lengths == [2, 1]
    assert distributed.over_rows(lambda numbers: numbers, [1.0, 2.0]) == [0, 1]
    numbers = torch.arange(3)
    assert distributed.total(numbers) is numbers and numbers.tolist() == [0, 1, 2]
    with distributed.joined(torch.device("cpu")):
        distributed.barrier()
        assert distributed.count() == 1


def test_launched_and_own_device_read_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.launched() == (0, 1)
    cuda = torch.device("cuda")
    assert distributed.own_device(cuda) == cuda
    launch = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "::1", "MASTER_PORT": "1"}
    for name, value in {**launch, "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert distributed.launched() == (3, 4)
    assert distributed.own_device(cuda) == torch.device("cuda:1")
    assert not distributed.reports_errors()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert distributed.own_device(cuda) == torch.device("cpu")


def test_seconds_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IRL_ALIGN_WAIT", raising=False)
    assert distributed.seconds("IRL_ALIGN_WAIT", 5.0) == 5.0
    monkeypatch.setenv("IRL_ALIGN_WAIT", "2.5")
    assert distributed.seconds("IRL_ALIGN_WAIT", 5.0) == 2.5
    for bad in ("soon", "0", "nan"):
        monkeypatch.setenv("IRL_ALIGN_WAIT", bad)
        with pytest.raises(UserError, match=re.escape(f"IRL_ALIGN_WAIT: found '{bad}'")):
            distributed.seconds("IRL_ALIGN_WAIT", 5.0)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed-zero2", "deepspeed-zero3"])
def test_shipped_configs_are_valid_for_accelerate(name: str) -> None:
    path = RECIPES / f"{name}.yaml"
    config = ClusterConfig.from_yaml_file(yaml_file=str(path))
    assert config.num_processes == 8 and config.mixed_precision == "no"
    plain = yaml.safe_load(path.read_text())
    assert set(plain) <= set(ClusterConfig.__dataclass_fields__)
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    if name.startswith("deepspeed"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1])
