"""What the environment and the machine lack is left out, or refused in one line with 2 or 4."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.helpers import ROOT, assert_same_run
from tests.helpers import TRAIN as WITHOUT_REPORT

NO_HOME = """
import os, pwd
os.environ.pop("HOME", None)
def getpwuid(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = getpwuid
"""
TRAIN = [sys.executable, "train.py", "--epochs", "0.01", "--features", "2", "2"]


@pytest.fixture
def started():
    """Run a program to its end with these variables, None for one that is not set."""

    def run(command, **variables):
        # A command in this process may have chosen a platform for those that it would start; the tests choose flags.
        wanted = os.environ | {"JAX_PLATFORMS": None, "XLA_FLAGS": None} | variables
        environment = {name: value for name, value in wanted.items() if value is not None}
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)

    return run


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"XLA_FLAGS": "--nonsense"}, "XLA_FLAGS=--nonsense: XLA does not understand it (Unknown flag in XLA_FLAGS"),
        ({"XLA_FLAGS": "no file"}, "XLA_FLAGS=no file: XLA does not understand it (Could not open file"),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=a"}, "XLA_FLAGS=--xla_force_host"),
        (
            {"XLA_FLAGS": "--xla_force_host_platform_device_count=-1"},
            "XLA_FLAGS=--xla_force_host_platform_device_count",
        ),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=100000"}, "XLA_FLAGS=--xla_force_host"),
        ({"JAX_NUM_CPU_DEVICES": "100000"}, "JAX_NUM_CPU_DEVICES=100000: a CPU cannot be so many"),
        ({"JAX_NUM_CPU_DEVICES": "0"}, "JAX_NUM_CPU_DEVICES=0: JAX finds no such device here"),
        ({"JAX_PLATFORMS": "cuda"}, "JAX_PLATFORMS=cuda: JAX finds no such device here"),
        ({"JAX_PLATFORMS": "abacus"}, "JAX_PLATFORMS=abacus: JAX finds no such device here"),
        ({"JAX_PLATFORMS": "tpu"}, "JAX_PLATFORMS=tpu: JAX finds no such device here"),
        ({"JAX_ENABLE_X64": "maybe"}, "JAX does not start with JAX_"),
    ],
)
def test_what_jax_cannot_start_with_is_named(variables, complaint, started, tmp_path):
    if "cuda" in variables.values() and os.path.exists("/dev/nvidia0"):
        pytest.skip("here it can")
    ended = started([*TRAIN, "--checkpoint-dir", tmp_path / "runs"], **variables)
    assert ended.stderr.startswith(f"error: {complaint}")
    assert (ended.returncode, ended.stdout, len(ended.stderr.splitlines())) == (2, "", 1)


def test_a_benchmark_cannot_start_with_it_either(started, tmp_path):
    pytest.importorskip("torch", reason="needs the extra torch")
    for name, value in (("XLA_FLAGS", "--nonsense"), ("JAX_PLATFORMS", "abacus")):
        ended = started([sys.executable, "-m", "cnn_jax", "benchmark", "--output", tmp_path / "new"], **{name: value})
        assert ended.stderr.splitlines()[-1].startswith(f"error: {name}={value}: ")
        assert (ended.returncode, ended.stdout) == (2, "")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "value"), [("JAX_NO_EXECUTION", "1"), ("JAX_HLO_SOURCE_FILE_CANONICALIZATION_REGEX", "(")]
)
def test_what_fails_with_one_of_jaxs_variables_names_it(name, value, started):
    ended = started([sys.executable, "-m", "cnn_jax", "predict", "docs/four.jpg"], **{name: value})
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.splitlines()[-1].startswith(f"error: the program fails with {name}={value} (")


@pytest.mark.slow
def test_jaxs_variables_change_no_number_of_a_run(trained_run, program, small_mnist, tmp_path):
    variables = {"JAX_RANDOM_SEED_OFFSET": "5", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_ENABLE_X64": "1"}
    process = program(
        *WITHOUT_REPORT, "--dataset-dir", small_mnist, "--checkpoint-dir", tmp_path, "--run-name", "run",
        "--epochs", 1, "--features", 2, 4, env=os.environ | variables,
    )  # fmt: skip
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert_same_run(tmp_path / "run", trained_run("--features", 2, 4, epochs=1, reported=False))


def test_a_current_folder_that_is_gone_is_told(started, tmp_path):
    gone = f"import os; os.chdir({str(tmp_path)!r}); os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')"
    code = f"{gone}; from cnn_jax.cli.commands import main; main(['train', '--epochs', '1'])"
    ended = started([sys.executable, "-c", code])
    assert (ended.returncode, ended.stdout) == (4, "")
    assert ended.stderr.endswith("; the current folder is gone: change to another\n")


def test_what_matplotlib_is_told_to_show_pictures_with_does_not_matter(started):
    code = (
        "import contextlib, sys; from cnn_jax.__main__ import program; sys.argv[1:] = ['--version']\n"
        "with contextlib.suppress(SystemExit): program()\n"
        "import cnn_jax.analysis.plots; print('drawn')"
    )
    ended = started([sys.executable, "-c", code], MPLBACKEND="no backend")
    assert ended.stdout.endswith("drawn\n"), ended.stderr


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", "--xla_gpu_deterministic_ops=true"),
        ("--xla_dump_to=x", "--xla_dump_to=x --xla_gpu_deterministic_ops=true"),
        ("--xla_gpu_deterministic_ops=false", "--xla_gpu_deterministic_ops=false"),
        ("--xla_gpu_enable_triton_gemm=true", "--xla_gpu_enable_triton_gemm=true --xla_gpu_deterministic_ops=true"),
    ],
)
def test_a_gpu_adds_in_a_fixed_order_unless_the_user_decides(flags, expected, monkeypatch):
    from cnn_jax.runtime import devices

    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr(devices, "_check_variables", lambda: None)
    monkeypatch.setattr(devices, "_GPU_FILES", ())
    devices.start_devices("cpu", keep_compiled=False)
    assert os.environ["XLA_FLAGS"] == flags
    monkeypatch.setattr(devices, "_GPU_FILES", (__file__,))
    devices.start_devices("cpu", keep_compiled=False)
    assert os.environ["XLA_FLAGS"] == expected


@pytest.mark.parametrize("added", [(), ("--xla_gpu_enable_triton_gemm=true",), ("--xla_gpu_deterministic_ops=false",)])
def test_for_a_gpu_that_is_not_here_the_products_are_cublass_unless_the_user_decides(added, monkeypatch):
    from cnn_jax.runtime import devices

    monkeypatch.setenv("XLA_FLAGS", " ".join(added))
    devices.fix_algorithms(attached=False)
    names = [flag.partition("=")[0] for flag in added]
    wanted = [devices.DETERMINISTIC, devices.CUBLAS]
    assert os.environ["XLA_FLAGS"].split() == [
        *added,
        *(flag for flag in wanted if flag.partition("=")[0] not in names),
    ]


def test_a_platform_whose_packages_are_installed_does_not_ask_for_them(monkeypatch):
    from cnn_jax.runtime import devices
    from cnn_jax.runtime.errors import UsageError

    def fail():
        raise AssertionError("its driver is missing\nand more")

    monkeypatch.setattr(devices.jax, "devices", fail)
    monkeypatch.setattr(devices.jax.config, "update", lambda *setting: None)
    monkeypatch.setattr(devices.warnings, "filterwarnings", lambda *filter: None)
    for installed in (None, object()):
        monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name, installed=installed: installed)
        with pytest.raises(UsageError, match=r"^--platform gpu: .*\(its driver is missing\); ") as refused:
            devices.start_devices("gpu")
        assert ("pip install" in str(refused.value)) == (installed is None)


def test_without_a_home_nothing_is_missing(started, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(NO_HOME)
    variables = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "HOME": None, "TFDS_DATA_DIR": None}
    variables |= {"JAX_COMPILATION_CACHE_DIR": None, "XDG_CACHE_HOME": None, "MPLCONFIGDIR": None}
    code = (
        "import os; from cnn_jax.cli.commands import main; "
        f"os.chdir({str(tmp_path)!r}); "
        f"main(['predict', {str(ROOT / 'docs' / 'four.jpg')!r}]); main(['train', '--dry-run']); "
        "from cnn_jax.data.loading import load_dataset; print(len(load_dataset('mnist', None, None).train_labels)); "
        "import cnn_jax.analysis.plots; "
        "main(['train', '--dataset', 'fashion_mnist'])"
    )
    ended = started([sys.executable, "-c", code], **variables)
    assert "60000\n" in ended.stdout
    assert "dry run: nothing was trained or written" in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("error: tfds cannot prepare fashion_mnist in ~/")
    assert "there is no home folder); give --data-dir" in ended.stderr
    assert ended.returncode == 4
    assert "matplotlib" not in ended.stderr
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("name", ["below", "x" * 300, "\udcff"])
def test_folders_of_conveniences_that_cannot_be_written_are_left_out_quietly(name, started, tmp_path):
    (tmp_path / "file").write_text("in the way")
    place = str(tmp_path / "file" / name)
    code = (
        "import cnn_jax.analysis.plots, jax; from cnn_jax.runtime.devices import start_devices; start_devices('cpu'); "
        "print(jax.jit(lambda x: x + 1)(1))"
    )
    ended = started(
        [sys.executable, "-c", code], XDG_CACHE_HOME=place, JAX_COMPILATION_CACHE_DIR=None, MPLCONFIGDIR=place
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "2\n", "")


@pytest.mark.parametrize("limit", ["-v 40000", "-v 1600000", "-v 3400000", "-d 40000", "-n 9", "-n 50"])
def test_a_limit_that_does_not_suffice_is_named(limit, started, tmp_path):
    command = f"ulimit {limit}; exec {sys.executable} train.py --epochs 0.01 --checkpoint-dir {tmp_path / 'runs'}"
    ended = started(["bash", "-c", command])
    assert ended.stderr.startswith("error: the limit of "), ended.stderr
    assert f"(ulimit {limit[:2]}) does not suffice; allow at least " in ended.stderr
    assert (ended.returncode, ended.stdout, len(ended.stderr.splitlines())) == (2, "", 1)


def test_as_many_files_may_be_open_as_the_machine_allows(started):
    code = "from cnn_jax.runtime.errors import require_environment as check; check(); import resource; "
    code += "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    ended = started(["bash", "-c", f"ulimit -Sn 20; ulimit -Hn 100; exec {sys.executable} -c '{code}'"])
    assert (ended.stdout, ended.stderr) == ("100\n", "")


def test_a_python_without_docstrings_is_refused(started):
    ended = started([sys.executable, "-OO", "train.py", "--help"])
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.endswith("do not use -OO\n")


def test_variables_of_jax_that_change_numbers_or_forbid_tracing_change_nothing(started, tmp_path):
    code = (
        "import jax; from cnn_jax.runtime.devices import start_devices; start_devices('cpu', keep_compiled=False); "
        "print(jax.jit(lambda x: x * 1.5)(jax.numpy.arange(2)).dtype)"
    )
    variables = {"JAX_ENABLE_X64": "1", "JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NO_TRACING": "1"}
    ended = started([sys.executable, "-c", code], **variables)
    assert (ended.returncode, ended.stdout) == (0, "float32\n"), ended.stderr


def everything_in(folder):
    """Every path below a folder, with its kind, size and time of change."""
    return {path: (path.lstat().st_mode, path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.mark.parametrize("dataset", ["mnist", "fashion_mnist"])
def test_a_dry_run_writes_and_downloads_nothing(dataset, started, tmp_path):
    for name in ("home", "temporary", "cache"):
        (tmp_path / name).mkdir()
    before = everything_in(tmp_path)
    places = {"HOME": tmp_path / "home", "TMPDIR": tmp_path / "temporary", "XDG_CACHE_HOME": tmp_path / "cache"}
    variables = {name: str(place) for name, place in places.items()} | {"PYTHONDONTWRITEBYTECODE": "1"}
    variables |= dict.fromkeys(["TFDS_DATA_DIR", "JAX_COMPILATION_CACHE_DIR", "MPLCONFIGDIR"])
    code = f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); os.chdir({str(tmp_path)!r}); "
    # A download would begin with a search for an address.
    code += "sys.addaudithook(lambda event, given: event == 'socket.getaddrinfo' and os._exit(99)); "
    code += f"from cnn_jax.cli.commands import main; main(['train', '--dry-run', '--dataset', {dataset!r}])"
    ended = started([sys.executable, "-c", code], **variables)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("dry run: nothing was ")
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize(
    ("chosen", "wheels", "files", "plugins", "expected"),
    [
        (None, ["libtpu", "jax_cuda13_plugin"], [], ["xla_cuda13"], True),
        (None, ["libtpu"], [], [], True),
        (None, [], [], [], False),  # JAX finds by itself that there is nothing to start
        (None, ["jax_cuda13_plugin"], ["/dev/nvidiactl"], ["xla_cuda13"], False),
        (None, ["jax_cuda13_plugin"], [], ["xla_cuda13", "abacus"], False),
        ("tpu,cpu", ["libtpu"], [], [], False),  # as JAX has it where there is a TPU
    ],
)
def test_accelerators_are_left_out_only_where_their_wheels_are_and_no_device_can_be(
    chosen, wheels, files, plugins, expected, monkeypatch
):
    from cnn_jax.runtime import devices

    monkeypatch.setattr(devices, "jax", SimpleNamespace(config=SimpleNamespace(jax_platforms=chosen)))
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: object() if name in wheels else None)
    monkeypatch.setattr(devices.os.path, "exists", lambda file: file in files)
    installed = [SimpleNamespace(name=name) for name in plugins]
    monkeypatch.setattr(devices, "entry_points", lambda group: installed)
    assert devices.has_only_cpu() is expected


def test_a_limit_of_the_size_of_files_leaves_no_module_cut_off(tmp_path):
    shutil.copytree(ROOT / "cnn_jax", tmp_path / "cnn_jax", ignore=shutil.ignore_patterns("__pycache__", "*.xz"))
    for limit in ("8", "unlimited"):  # blocks of 512 bytes
        started = subprocess.run(
            ["sh", "-c", f'ulimit -f {limit}; exec "$0" -m cnn_jax --version', sys.executable],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (started.returncode, started.stdout[:7]) == (0, "cnn-jax"), started.stderr
