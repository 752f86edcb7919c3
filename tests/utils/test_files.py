"""Atomic writes, checksums as by sha256sum, and strict JSON."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from irl_align.errors import UserError
from irl_align.utils import files
from irl_align.utils.files import (
    atomic_folder,
    atomic_write,
    file_checksum,
    require_writable_folder,
    to_json,
)


def test_atomic_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    atomic_write(path, "é")
    assert path.read_bytes() == b"\xc3\xa9"
    (tmp_path / "new" / ".a.txt.partial").write_text("left by a kill")
    atomic_write(path, b"\x00")
    assert path.read_bytes() == b"\x00"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_atomic_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    atomic_write(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError("the disk has gone")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="gone"):
        atomic_write(path, "new")
    assert path.read_text() == "old"


def test_a_lone_surrogate_is_written_as_a_question_mark(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a.json", to_json({"text": "\ud83d!"}))
    assert json.loads((tmp_path / "a.json").read_text()) == {"text": "?!"}


def test_atomic_folder_appears_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "model"
    leftover = tmp_path / ".model.partial"
    leftover.mkdir()
    (leftover / "old.bin").write_text("left by a kill")
    with atomic_folder(path) as aside:
        (aside / "a.bin").write_text("a")
        assert not path.exists()
    assert [file.name for file in path.iterdir()] == ["a.bin"]
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileExistsError), atomic_folder(path):
        raise AssertionError("entered")


def test_a_failed_atomic_folder_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "model") as aside:
        (aside / "a.bin").write_text("a")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_file_checksum_equals_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("")
    (tmp_path / "a.txt").write_text("abc")
    # sha256sum a.txt; then: sha256sum a.txt sub/b.txt | sha256sum
    of_abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    of_folder = "7fa174ec633d9dd026791655bcede544783962588e3b79ef7ff0b3347b298d1d"
    assert file_checksum(tmp_path / "a.txt") == of_abc
    assert file_checksum(tmp_path) == of_folder
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "time").write_text("1")
    assert file_checksum(tmp_path) == of_folder
    (tmp_path / "a.txt").rename(tmp_path / "c.txt")
    assert file_checksum(tmp_path) != of_folder
    with pytest.raises(UserError, match="missing: found nothing there, expected a file"):
        file_checksum(tmp_path / "missing")


def test_to_json_is_strict() -> None:
    value = {
        "nan": math.nan,
        "inf": [-math.inf, np.float32("inf")],
        "numpy": (np.float64(0.5), np.int64(3), np.bool_(True)),
        "torch": torch.tensor(2.5),
        "text": "£",
    }
    expected = (
        '{"nan": null, "inf": [null, null], "numpy": [0.5, 3, true], "torch": 2.5, "text": "£"}'
    )
    assert to_json(value) == expected
    with pytest.raises(TypeError, match="Path"):
        to_json({"file": Path("x")})


def test_require_writable_folder_refuses_a_file_a_name_too_long_and_a_locked_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_writable_folder(tmp_path / "new/below", "output_dir")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^output_dir: .*file is a file, expected a folder"):
        require_writable_folder(tmp_path / "file/store", "output_dir")
    with pytest.raises(UserError, match="File name too long"):
        require_writable_folder(tmp_path / ("a" * 300), "output_dir")
    monkeypatch.setattr("os.access", lambda *_: False)  # tests may run as root
    with pytest.raises(UserError, match="nothing can be written in"):
        require_writable_folder(tmp_path, "output_dir")
