"""A file is replaced as a whole or not at all, and no other is touched; what cannot be written is refused first."""

import errno
import fcntl
import functools
import os
import resource
import signal
import stat
import subprocess
import sys
import threading

import pytest

from cnn_jax.runtime import files
from cnn_jax.runtime.errors import StorageError, describe_failure
from cnn_jax.runtime.files import (
    AlreadyLockedError,
    check_output_file,
    check_output_folder,
    locked,
    read_file,
    replaced,
    write_atomically,
)
from tests.helpers import ROOT


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_and_its_neighbours_stay(tmp_path):
    for name in ("a.st.unchecked", "a.st.new", ".a.st.tmp", ".cnn-jax-mine.tmp", "a.st"):
        (tmp_path / name).write_text("the user's")
    write_atomically(tmp_path / "a.st", "new")
    assert (tmp_path / "a.st").read_text() == "new"
    assert len(names(tmp_path)) == 5
    assert all(path.read_text() == "the user's" for path in tmp_path.iterdir() if path.name != "a.st")


def test_a_new_file_has_the_permissions_of_any_other(tmp_path):
    write_atomically(tmp_path / "a", "")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_the_longest_name_that_a_folder_takes_can_be_written(tmp_path):
    write_atomically(tmp_path / ("n" * 255), "")
    assert names(tmp_path) == ["n" * 255]


@pytest.mark.parametrize("failure", [OSError("no"), ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_after_a_failure_the_old_file_is_there_and_nothing_else(failure, tmp_path):
    (tmp_path / "a").write_text("old")

    def write():
        with replaced(tmp_path / "a") as new:
            new.write_text("half")
            raise failure

    with pytest.raises(type(failure)):
        write()
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize("leads_to", ["there", "nowhere", "link"])
def test_a_link_stays_and_what_it_leads_to_is_replaced(leads_to, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "there").write_text("old")
    (tmp_path / "link").symlink_to("folder/there")
    name = tmp_path / "name"
    name.symlink_to("link" if leads_to == "link" else f"folder/{leads_to}")
    write_atomically(name, "new")
    assert name.is_symlink()
    assert (tmp_path / "folder" / ("there" if leads_to == "link" else leads_to)).read_text() == "new"


def test_two_writers_of_one_name_end_as_one_after_the_other(tmp_path):
    with replaced(tmp_path / "a") as first:
        first.write_text("first")
        with replaced(tmp_path / "a") as second:
            second.write_text("second")
        assert (tmp_path / "a").read_text() == "second"
    assert (tmp_path / "a").read_text() == "first"
    assert names(tmp_path) == ["a"]


def test_a_lock_whose_file_its_last_holder_removes_is_taken_anew(tmp_path, monkeypatch):
    file, flock = tmp_path / "lock", fcntl.flock

    def removed_before(stream, operation):
        monkeypatch.setattr(fcntl, "flock", flock)
        file.unlink()
        flock(stream, operation)

    monkeypatch.setattr(fcntl, "flock", removed_before)
    with locked(file), pytest.raises(AlreadyLockedError), locked(file):
        pass


def test_a_file_that_another_writer_removed_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    lock, removed = files.fcntl.flock, []

    def remove_then_lock(stream, operation):
        if not removed:
            removed.append(stream.name)
            os.unlink(stream.name)
        lock(stream, operation)

    monkeypatch.setattr(files.fcntl, "flock", remove_then_lock)
    write_atomically(tmp_path / "a", "whole")
    assert ((tmp_path / "a").read_text(), names(tmp_path), len(removed)) == ("whole", ["a"], 1)


def test_many_writers_at_once_leave_one_whole_file(tmp_path):
    contents = [str(number) * 100_000 for number in range(8)]
    writers = [threading.Thread(target=write_atomically, args=(tmp_path / "a", content)) for content in contents]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert (tmp_path / "a").read_text() in contents
    assert names(tmp_path) == ["a"]


WRITE = """
import signal, sys
from pathlib import Path
from cnn_jax.runtime.files import replaced
from cnn_jax.runtime.signals import end_on_signals
end_on_signals()
with replaced(Path(sys.argv[1])) as new:
    print("writing", flush=True)
    signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_writer_leaves_nothing_and_a_killed_ones_file_goes_with_the_next(number, program, tmp_path):
    process = program("-c", WRITE, tmp_path / "a")
    assert process.stdout.readline() == "writing\n"
    (being_written,) = names(tmp_path)
    write_atomically(tmp_path / "b", "")  # a file that is being written is not taken for an abandoned one
    assert names(tmp_path) == [being_written, "b"]
    process.send_signal(number)
    process.wait(10)
    assert names(tmp_path) == ([being_written, "b"] if number == signal.SIGKILL else ["b"])
    write_atomically(tmp_path / "b", "")
    assert names(tmp_path) == ["b"]


def fifo(path):
    os.mkfifo(path)
    return path


def linked(path, target):
    path.symlink_to(target)
    return path


@functools.cache
def device():
    """The path of a device: a terminal, because no program, however wrong, can put a file in the place of one."""
    return os.ttyname(os.openpty()[1])


SPECIAL = {
    "folder": lambda folder: folder,
    "fifo": lambda folder: fifo(folder / "x"),
    "device": lambda folder: device(),
    "link to a device": lambda folder: linked(folder / "x", device()),
    "link to itself": lambda folder: linked(folder / "x", "x"),
    "folder by way of nothing": lambda folder: folder / "none" / "..",
    "in no folder": lambda folder: folder / "none" / "x",
    "below a file": lambda folder: ROOT / "train.py" / "x",
    "name too long": lambda folder: folder / ("n" * 256),
    "nothing": lambda folder: "",
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_refused_and_stays_what_it_is(kind, tmp_path):
    path = type(tmp_path)(SPECIAL[kind](tmp_path))
    before = names(tmp_path)
    with pytest.raises(OSError, match=r".") as refused:
        write_atomically(path, "")
    assert refused.value.filename == str(path)
    with pytest.raises(StorageError, match=r"; give another --output$"):
        check_output_file(path, "--output")
    for use in (read_file, lambda file: locked(file).__enter__()):
        with pytest.raises(OSError, match=r".") as refused:
            use(path)
        assert str(refused.value.filename) == str(path)
    assert names(tmp_path) == before
    assert stat.S_ISCHR(os.stat(device()).st_mode)


def test_a_lock_that_cannot_be_written_is_named(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as failure, locked(tmp_path / "lock"):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert failure.value.filename == str(tmp_path / "lock")


def test_where_nothing_can_be_locked_the_file_is_named(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("cnn_jax.runtime.files.fcntl.flock", fail)
    with pytest.raises(OSError, match="No locks available") as failure, locked(tmp_path / "lock"):
        pass
    line = (
        f"error: cannot read or write {tmp_path}/lock: No locks available; choose a folder on a file system with locks"
    )
    assert describe_failure(failure.value) == (line, 4)


def test_a_lock_that_is_a_link_changes_no_other_file(tmp_path):
    (tmp_path / "other").write_text("precious")
    with pytest.raises(OSError, match="symbolic link"), locked(linked(tmp_path / "lock", "other")):
        pass
    assert (tmp_path / "other").read_text() == "precious"


COMMANDS = {
    "export": ["export", "--to", "safetensors"],
    "report": ["report", "a-run"],
    "diff": ["diff", "a-run", "another"],
    "compare": ["compare"],
    "benchmark": ["benchmark"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["device", "fifo", "below a file"])
def test_a_command_refuses_its_output_at_once(kind, command, tmp_path):
    path = SPECIAL[kind](tmp_path)
    assert_refused([*COMMANDS[command], "--output", path], path, "--output")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_no_output_takes_the_place_of_what_is_printed(stream, tmp_path):
    command = [sys.executable, "-m", "cnn_jax", *COMMANDS["export"], "--output", f"/dev/{stream}"]
    with (tmp_path / "stdout").open("w") as out, (tmp_path / "stderr").open("w") as err:
        ended = subprocess.run(command, cwd=ROOT, stdout=out, stderr=err, timeout=60, check=False)
    assert (ended.returncode, (tmp_path / "stdout").read_text()) == (4, "")
    line = f"error: cannot write /dev/{stream} (the program prints there); give another --output\n"
    assert (tmp_path / "stderr").read_text() == line


def assert_refused(arguments, path, options):
    """The program ends with 4 in a line, before JAX is imported."""
    code = "import atexit, sys; atexit.register(lambda: print('jax' in sys.modules)); "
    code += "from cnn_jax.__main__ import program; program()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (4, "False\n"), ended.stderr
    assert ended.stderr.startswith(f"error: cannot write {path} (")
    assert ended.stderr.endswith(f"; give another {options}\n")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "path", "options"),
    [
        (["train", "--profile", "train.py"], "train.py", "--profile"),
        (["train", "--profile", "n" * 256], "n" * 256, "--profile"),
        (["train", "--dry-run", "--profile", f"a/{'n' * 256}/b"], f"a/{'n' * 256}/b", "--profile"),
        (["train", "--profile", ("/" + "n" * 99) * 40], ("/" + "n" * 99) * 40, "--profile"),
        (["train", "--profile", "n/" * 300 + "n"], "n/" * 300 + "n", "--profile"),
        (["compare", "--output", ("/" + "n" * 99) * 41], ("/" + "n" * 99) * 41, "--output"),
        (
            ["train", "--dry-run", "--checkpoint-dir", f"a/{'n' * 256}", "--run-name", "b"],
            f"a/{'n' * 256}/b",
            "--checkpoint-dir or --run-name",
        ),
        (["sweep", "--checkpoint-dir", "train.py"], "train.py/sweep", "--checkpoint-dir or --study"),
        (["import-torch", "a.pt", "--checkpoint-dir", "train.py"], "train.py/a", "--checkpoint-dir or --run-name"),
    ],
)
def test_a_folder_that_cannot_be_made_or_written_is_refused_at_once(arguments, path, options):
    assert_refused(arguments, path, options)


def test_a_folder_is_not_made_by_being_checked(tmp_path, monkeypatch):
    check_output_folder(tmp_path / "a" / "b", "--output")
    check_output_folder(tmp_path, "--output")
    check_output_folder(tmp_path / "a" / ("n" * 255) / "b" / ".." / "c", "--output")
    monkeypatch.chdir(tmp_path)
    check_output_folder(type(tmp_path)("a"), "--output")
    assert names(tmp_path) == []


def test_a_full_disk_is_named_as_the_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/a'"):
        write_atomically(tmp_path / "a", "")
    assert names(tmp_path) == []
