"""Every failure has a code of its own, and what a user or the machine causes is never the program's."""

import errno
import importlib
import os

import pytest

from cnn_jax.runtime.errors import CnnJaxError, UsageError, describe_failure, one_line_failures

FAILURES = [
    (UsageError("--epochs 0:\nwrong"), 2, "error: --epochs 0:\\nwrong"),
    (MemoryError(), 2, "error: the memory does not suffice (MemoryError); "),
    (MemoryError("std::bad_alloc"), 2, "error: the memory does not suffice (std::bad_alloc); "),
    (
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nand more"),
        2,
        "error: the memory does not suffice (RESOURCE_EX",
    ),
    (RuntimeError("can't start new thread"), 2, "error: the memory does not suffice (can't start new thread); "),
    (ImportError("no segment", name="libjax"), 2, "error: cannot load libjax (no segment); install cnn-jax anew"),
    (
        PermissionError(13, "Permission denied", "/a"),
        4,
        "error: cannot read or write /a: Permission denied; see to its",
    ),
    (BrokenPipeError(32, "Broken pipe"), 4, "error: cannot read or write: Broken pipe; see to"),
    (
        FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"),
        4,
        "error: cannot read or write: No usable temporary directory found in ['/tmp']; set TMPDIR to a folder that",
    ),
    (UnicodeEncodeError("ascii", "é", 0, 1, "no"), 4, "error: cannot read or write '\\xe9' in ascii; "),
    (KeyboardInterrupt(), 130, "stopped by SIGINT; run the same command again"),
    (RecursionError("too deep"), 8, "error: the program failed, RecursionError: too deep; please report it with what"),
    (OverflowError("too large"), 8, "error: the program failed, OverflowError: too large; please report it with what"),
    (
        FloatingPointError("invalid value (nan)"),
        5,
        "error: the loss is not finite (invalid value (nan)); lower --learn",
    ),
    (RuntimeError("INVALID_ARGUMENT: Disallowed host-to-device transfer: a"), 2, "error: JAX_TRANSFER_GUARD forbids"),
    (GeneratorExit(), 8, "error: the program failed, GeneratorExit: ; please report it with what --debug shows"),
    (CnnJaxError("no class"), 8, "error: no class"),
]


@pytest.mark.parametrize(("failure", "code", "line"), FAILURES, ids=[repr(failure) for failure, *_ in FAILURES])
@pytest.mark.parametrize("debug", [False, True])
def test_a_failure_ends_in_its_code_and_one_line(failure, code, line, debug, capsys):
    described, _ = describe_failure(failure)
    with pytest.raises(SystemExit) as end, one_line_failures(debug):
        raise failure
    _, err = capsys.readouterr()
    assert end.value.code == code
    assert described.startswith(line)
    assert err.splitlines()[-1] == described
    assert ("Traceback" in err) == debug


@pytest.mark.parametrize("code", errno.errorcode)
def test_whatever_the_system_refuses_is_told_with_a_remedy(code):
    line, exit_code = describe_failure(OSError(code, os.strerror(code), "a-file"))
    assert exit_code == 4
    assert line.startswith(f"error: cannot read or write a-file: {os.strerror(code)}; ")
    assert ("ulimit -f" in line) == (code == errno.EFBIG)
    assert ("make room" in line) == (code in (errno.ENOSPC, errno.EDQUOT))


def test_a_library_that_the_environment_keeps_from_loading_is_named(tmp_path, monkeypatch):
    (tmp_path / "a_library.py").write_text("int('abc')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="abc") as failed:
        importlib.import_module("a_library")
    line, code = describe_failure(failed.value)
    assert code == 2
    assert line.startswith(
        "error: cannot load a_library (invalid literal for int() with base 10: 'abc'); see to the env"
    )
