"""simple_example.py: the whole demo on little data, and its failures."""

from __future__ import annotations

import hashlib
import pickle
import socket
from pathlib import Path

import pytest
import torch
from torchvision.datasets import CIFAR10

import simple_example
from simple_example import NoNetworkError, batches, check_network, main


def write_small_cifar10(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CIFAR-10 folder in the true on-disk format, 20 images a batch. torchvision is given its checksums."""
    base = folder / CIFAR10.base_folder
    base.mkdir(parents=True)

    def write(name: str, content: dict) -> list[str]:
        data = pickle.dumps(content)
        (base / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    generator = torch.Generator().manual_seed(0)
    entries = []
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        pixels = torch.randint(256, (20, 3072), generator=generator, dtype=torch.uint8).numpy()
        entries.append(write(name, {"data": pixels, "labels": [i % 10 for i in range(20)]}))
    name, checksum = write("batches.meta", {"label_names": [f"class {i}" for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "train_list", entries[:5])
    monkeypatch.setattr(CIFAR10, "test_list", entries[5:])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": checksum})


@pytest.mark.slow
def test_demo_on_cifar10_and_its_failures(tmp_path, monkeypatch, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    flags = ["--data-dir", str(data), "--out-dir", str(out), "--seconds", "2", "--steps", "2", "--samples", "30"]
    monkeypatch.setattr(simple_example, "TRIAL_SECONDS", 0.05)
    write_small_cifar10(data, monkeypatch)
    assert main([*flags, "--data", "cifar10", "--batch-size", "8"]) == 0
    printed = capsys.readouterr().out
    assert "CIFAR-10: 30 training images, batches of 8; 3072" in printed and " won, " in printed
    assert (out / "loss.png").stat().st_size > 5000
    # a truncated file, and an archive that a broken download left
    (data / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"cut")
    assert main([*flags, "--data", "auto"]) == 1
    assert "cifar-10-batches-py is partial or corrupt: delete it" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "cifar-10-python.tar.gz").write_bytes(b"cut")
    assert main([*flags, "--data-dir", str(tmp_path / "other")]) == 1
    assert "cifar-10-python.tar.gz is partial or corrupt" in capsys.readouterr().err

    # no network
    def refuse(url: str) -> None:
        raise NoNetworkError("no route")

    monkeypatch.setattr(simple_example, "check_network", refuse)
    flags[1] = str(tmp_path / "none")
    assert main([*flags, "--data", "cifar10"]) == 1
    assert "can't be downloaded (no route)" in capsys.readouterr().err
    assert main(flags) == 0
    assert "running on scikit-learn's 8×8 digits" in capsys.readouterr().out
    assert main([*flags, "--data", "digits", "--samples", "10000"]) == 1
    assert "digits has 1437 training images" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([*flags, "--data", "digits", "--out-dir", str(tmp_path / "file")]) == 1
    with pytest.raises(SystemExit) as caught:
        main(["--samples", "0"])
    assert caught.value.code == 2


def test_the_network_check_gives_up(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("localhost", 0)) as server:  # takes the request and never answers
        url = f"http://localhost:{server.getsockname()[1]}"
        monkeypatch.setattr(simple_example, "DOWNLOAD_TIMEOUT", 1)
        with pytest.raises(NoNetworkError, match="no answer in 1 s"):
            check_network(url)
    monkeypatch.setattr(simple_example, "DOWNLOAD_TIMEOUT", 60)
    with pytest.raises(NoNetworkError, match=r"^<urlopen error .*refused>$"):
        check_network(url)


def test_batches_hold_every_image_once_an_epoch():
    x, y = torch.arange(7.0)[:, None], torch.arange(7)
    source = batches(x, y, 3)
    epochs = [[next(source) for _ in range(3)] for _ in range(2)]
    orders = [torch.cat([y for _, y, _ in epoch]).tolist() for epoch in epochs]
    assert [sorted(order) for order in orders] == [list(range(7))] * 2 and orders[0] != orders[1]
    assert [starts for epoch in epochs for _, _, starts in epoch] == [True, False, False] * 2
    assert next(batches(x, y, 7)) == (x, y, True)
