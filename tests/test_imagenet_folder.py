"""The folder of a run: nothing in it is overwritten, and it belongs to one run at a time."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import resource
import signal
import time
from typing import Any

import pytest
import torch

from imagenet import training
from imagenet.checkpoints import read_checkpoint
from imagenet.data import Bad, DummyImages
from imagenet.run_folder import locked, write_durably
from tests.imagenet_helpers import (
    DUMMY,
    contents,
    end_of,
    equal,
    error_of,
    flags,
    image_tree,  # noqa: F401
    neither_measured_nor_drawn,  # noqa: F401
    run_ranks,
    send_signal_with_the_first_image,
    start,
)
from train_imagenet import main

pytestmark = pytest.mark.slow


def test_a_run_in_the_way_is_moved_aside(tmp_path, capsys):
    argv = flags(DUMMY, checkpoint_dir=tmp_path / "run", epochs=1)
    assert main(argv) == 0
    first = (tmp_path / "run" / "last.pt").read_bytes()
    assert main(argv) == 0
    assert (tmp_path / "run.1" / "last.pt").read_bytes() == first and (tmp_path / "run" / "last.pt").exists()
    assert "--resume" in capsys.readouterr().out


@pytest.mark.parametrize("number, code", ((signal.SIGTERM, 143), (signal.SIGINT, 130)))
def test_an_interrupted_evaluation_writes_nothing(tmp_path, monkeypatch, capsys, number, code):
    argv = flags(DUMMY, checkpoint_dir=tmp_path)
    assert main(argv) == 0
    before = contents(tmp_path)
    send_signal_with_the_first_image(monkeypatch, number)
    assert main([*argv, "--evaluate"]) == code
    assert contents(tmp_path) == before
    assert "--resume" not in capsys.readouterr().err


def test_a_signal_before_the_first_step_writes_nothing(tmp_path, monkeypatch):
    """The images of the first batch can't be read, so that it takes no step."""

    def bad(self, key):
        os.kill(os.getpid(), signal.SIGTERM)
        return Bad(str(key), "spoiled")

    monkeypatch.setattr(DummyImages, "__getitem__", bad)
    assert main(flags(f"{DUMMY} --max-bad-images 99 --checkpoint-minutes 0", checkpoint_dir=tmp_path)) == 143
    assert contents(tmp_path) == {}


def test_a_run_resumed_in_its_validation_and_stopped_there_keeps_both_checkpoints(tmp_path, monkeypatch):
    argv = flags(DUMMY, checkpoint_dir=tmp_path, checkpoint_minutes=0, epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate", lambda run: run.stop(signal.SIGTERM))
        assert main(argv) == 143
    before = contents(tmp_path)
    assert read_checkpoint(tmp_path / "last.pt")["progress"]["batch"] == 6
    send_signal_with_the_first_image(monkeypatch, signal.SIGTERM)
    assert main([*argv, "--resume"]) == 143
    assert contents(tmp_path) == before


def test_a_run_that_goes_on_in_another_folder_moves_the_run_there_aside(tmp_path):
    first, second = tmp_path / "A", tmp_path / "B"
    steady = f"{DUMMY} --lr-schedule step --warmup-epochs 0"
    assert main(flags(steady, checkpoint_dir=first, epochs=1)) == 0
    assert main(flags(steady, checkpoint_dir=second, seed=1)) == 0
    before, source = contents(second), contents(first)
    assert main(flags(steady, checkpoint_dir=second, resume=first / "last.pt")) == 0
    assert contents(tmp_path / "B.1") == before and contents(first) == source
    assert main(flags(steady, checkpoint_dir=tmp_path / "whole")) == 0
    assert equal(end_of(second), end_of(tmp_path / "whole"))
    assert main(flags(f"{DUMMY} --evaluate", checkpoint_dir=second)) == 0  # of the best.pt there


@pytest.mark.parametrize("file", ("last.pt", "previous.pt", "best.pt", "metrics.csv", "config.json", "curves.png"))
def test_any_file_of_a_run_is_moved_aside_and_no_other(tmp_path, file):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (file, "notes.txt"):
        (folder / name).write_text(name)
    assert main(flags(DUMMY, checkpoint_dir=folder, epochs=1)) == 0
    assert contents(tmp_path / "run.1") == {file: file.encode()}
    assert (folder / "notes.txt").read_text() == "notes.txt"


@pytest.mark.parametrize("more", ("--memory-gib 1e-6", "--resume nothing.pt", "--use-hessian --memory-gib 1e-6"))
def test_a_run_that_is_refused_moves_nothing(tmp_path, capsys, more):
    argv = flags(DUMMY, checkpoint_dir=tmp_path / "run", epochs=1)
    assert main(argv) == 0
    before = contents(tmp_path / "run")
    error_of([*argv, *more.split()], capsys)
    assert contents(tmp_path / "run") == before and not (tmp_path / "run.1").exists()


def test_resuming_with_nothing_to_resume_names_the_run_that_was_moved_aside(tmp_path, capsys):
    argv = flags(DUMMY, checkpoint_dir=tmp_path / "run", epochs=1)
    assert main(argv) == 0
    (tmp_path / "run").rename(tmp_path / "run.1")
    assert main([*argv, "--resume"]) == 0
    assert f"--resume {tmp_path / 'run.1' / 'last.pt'}" in capsys.readouterr().out


def test_a_damaged_last_checkpoint_does_not_take_the_place_of_the_whole_one(tmp_path, monkeypatch):
    argv = flags(DUMMY, checkpoint_dir=tmp_path)
    assert main(argv) == 0
    whole = (tmp_path / "previous.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(b"damaged")
    send_signal_with_the_first_image(monkeypatch, signal.SIGTERM)
    assert main([*argv, "--resume"]) == 143
    assert (tmp_path / "previous.pt").read_bytes() == whole


@pytest.mark.parametrize("folder", (".", ""))
def test_the_present_folder_can_be_used_again(tmp_path, monkeypatch, folder):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    argv = [*DUMMY.split(), "--epochs", "1", "--checkpoint-dir", folder]
    assert main(argv) == main(argv) == 0
    assert (tmp_path / "run" / "last.pt").exists() and (tmp_path / "run.1" / "last.pt").exists()


# --------------------------------------------------------------------------------------------------- one run at a time


def test_a_second_run_in_a_folder_is_refused(tmp_path, capsys):
    argv = flags(DUMMY, checkpoint_dir=tmp_path / "run", epochs=1)
    assert main(argv) == 0
    before = contents(tmp_path / "run")
    with locked(tmp_path / "run"):
        for more in ([], ["--resume"]):
            assert f"in use by process {os.getpid()} " in error_of([*argv, *more], capsys)
        assert run_ranks([argv, argv], tmp_path) == [1, 1]
        assert f"in use by process {os.getpid()} " in (tmp_path / "rank0.log").read_text()
    assert contents(tmp_path / "run") == before
    assert run_ranks([argv, argv], tmp_path) == [0, 0]


def test_a_worker_that_lives_on_does_not_keep_the_lock(tmp_path):
    with locked(tmp_path):
        forks = multiprocessing.get_context("fork")
        began = forks.Event()
        worker = forks.Process(target=lambda: (began.set(), time.sleep(60)))
        worker.start()
        assert began.wait(10)
    with locked(tmp_path):
        worker.kill()
    worker.join()


def test_the_lock_stays_while_a_run_is_moved_aside_and_goes_with_its_process(tmp_path, capsys):
    argv = flags(DUMMY, checkpoint_dir=tmp_path / "run", checkpoint_minutes=0)
    assert main([*argv, "--epochs", "1"]) == 0
    process = start([*argv, "--epochs", "100000"], tmp_path / "log")
    until = time.monotonic() + 60
    while not ((tmp_path / "run.1").exists() and (tmp_path / "run" / "last.pt").exists()):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert f"in use by process {process.pid} " in error_of(argv, capsys)
    process.kill()
    process.join()
    assert main([*argv, "--epochs", "1"]) == 0
    assert (tmp_path / "run.2" / "last.pt").exists()


# --------------------------------------------------------------------------------------------------------------- files


def test_a_file_is_whole_or_what_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_durably(path, b"before")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("died")))
    with pytest.raises(OSError, match="died"):
        write_durably(path, b"after")
    assert path.read_bytes() == b"before"


class FullDisk(io.RawIOBase):
    def __init__(self, free: int):
        self.free = free

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.free -= len(data)
        if self.free < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(data)


def test_a_disk_that_fills_at_any_place_keeps_the_old_file(tmp_path):
    state = {"weights": [torch.rand(100) for _ in range(20)]}
    path, before = tmp_path / "last.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    write_durably(path, lambda file: torch.save(state, file))
    old = path.read_bytes()
    for size in range(0, len(old), len(old) // 46):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            with pytest.raises(OSError):
                write_durably(path, lambda file: torch.save(state, file))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert contents(tmp_path) == {"last.pt": old}
        with pytest.raises(OSError, match="No space left"):  # torch itself raises a RuntimeError at some places
            write_durably(path, lambda _, size=size: torch.save(state, FullDisk(size)))
        assert contents(tmp_path) == {"last.pt": old}
