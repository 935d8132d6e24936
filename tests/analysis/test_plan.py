"""Training is compiled for GPUs and TPUs that are not here, and what it would start there is counted and little."""

import functools
import json
import math
import os
import re
import time
import warnings

import jax
import numpy as np
import pytest
import yaml

from cnn_jax.analysis import plan as plan_module
from cnn_jax.analysis.hlo import Step
from cnn_jax.analysis.plan import Plan, chunk_shapes, make_plan
from cnn_jax.analysis.targets import GPUS, find_target
from cnn_jax.core.input_pipeline import streamed
from cnn_jax.core.sharding import make_mesh
from cnn_jax.data.loading import load_dataset, read_sizes
from cnn_jax.runs.program import Memory, Sizes, make_program
from cnn_jax.runs.settings import TrainSettings
from cnn_jax.runtime.errors import UsageError
from tests.helpers import ROOT, start_python
from tests.test_docs import settings_of

pytestmark = pytest.mark.optax_promotes

slow = pytest.mark.slow
GPU_PACKAGE, TPU_PACKAGE = "jax_cuda13_plugin", "libtpu"
# XLA's own float32 convolutions for one TPU take two minutes or more; products take 15 to 50 s, on a loaded machine.
MOST_CPU_SECONDS = 100
# Settings with more than one claim to each compilation.
BFLOAT16 = {"precision": "bfloat16"}
ACCURATE = {"recipe": "accurate", **BFLOAT16}


@pytest.fixture(autouse=True)
def own_xla_flags(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")


@functools.cache
def compiled(target, **settings):
    """The plan of a training, and the processor's seconds that it took to make, once for all tests."""
    pytest.importorskip(TPU_PACKAGE if target.startswith("v") else GPU_PACKAGE, reason="needs the extra plan")
    chosen = TrainSettings.of(**settings)
    with jax.numpy_dtype_promotion("standard"), warnings.catch_warnings():
        # The tests keep compiled code, and JAX cannot read again what is for devices that are not here.
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
        begin = time.process_time()
        planned = make_plan(find_target(target), chosen, read_sizes(chosen.dataset, None, None))
    return planned, time.process_time() - begin


def plan(target, **settings):
    return compiled(target, **settings)[0]


@pytest.mark.parametrize(
    ("target", "settings"),
    [
        ("h100", {}),
        pytest.param("h100:8", {}, marks=slow),
        pytest.param("h100", ACCURATE, marks=slow),
        pytest.param("h100", {"recipe": "fast"}, marks=slow),
    ],
)
def test_on_gpus_no_step_waits_for_the_host_and_no_convolution_is_grouped(target, settings):
    planned = plan(target, **settings)
    step = planned.step
    assert step.grouped_convolutions == 0
    assert step.host_transfers == 0
    assert step.known_trip_count
    assert planned.fits
    assert planned.seeds_at_once == max(1, settings.get("seeds", 1) // planned.devices)


def test_a_step_of_one_seed_starts_few_kernels():
    step = plan("h100").step
    assert step.launches <= 26
    assert (step.matmuls, step.convolutions) == (3, 0)  # block 2's: all else is sums that have a launch in common


@slow
def test_more_seeds_than_fit_are_trained_in_groups():
    planned = plan("h100", seeds=512)
    step = planned.step
    assert 256 <= planned.seeds_at_once <= 512
    assert planned.fits
    assert (step.grouped_convolutions, step.known_trip_count) == (0, True)


@slow
@pytest.mark.parametrize(
    ("target", "settings", "exchanges"),
    [
        ("h100:8", {}, 1),
        ("v5e:1x1", {}, 0),
        ("v5e:2x2", BFLOAT16, 1),
    ],
)
def test_devices_exchange_one_sum_per_step_and_one_alone_none(target, settings, exchanges):
    step = plan(target, **settings).step
    assert step.collectives == exchanges


@slow
@pytest.mark.parametrize(
    ("target", "settings"),
    [
        ("v5e:1x1", {}),
        ("v5e:2x2", BFLOAT16),
    ],
)
def test_for_tpus_it_compiles_soon_and_says_what_xla_estimates(target, settings):
    planned, cpu_seconds = compiled(target, **settings)
    step = planned.step
    assert cpu_seconds <= MOST_CPU_SECONDS
    assert planned.fits
    assert planned.memory.temporaries > 0
    assert step.grouped_convolutions == step.host_transfers == 0
    assert set(planned.estimate) == {"flops", "bytes", "estimated_milliseconds"}
    assert all(value > 0 for value in planned.estimate.values())


@pytest.mark.parametrize("target", ["h100", *(pytest.param(target, marks=slow) for target in ("h100:8", "v5e:1x1"))])
def test_products_of_float32_are_computed_in_full(target):
    products = re.findall(r"^.* (?:dot|convolution)\(.*$|^.*__cu(?:dnn|blas).*$", plan(target).hlo, re.MULTILINE)
    in_full = re.compile(r'operand_precision(=\{highest,highest\}|":\["HIGHEST","HIGHEST"\])')
    assert products
    assert [line for line in products if not in_full.search(line)] == []


@slow
@pytest.mark.parametrize(("target", "settings"), [("h100", ACCURATE), ("v5e:2x2", BFLOAT16)])
def test_in_bfloat16_the_second_block_multiplies_bfloat16(target, settings):
    text = plan(target, **settings).hlo
    types = dict(re.findall(r"%([\w.\-]+) = (\w+)\[", text))
    operands = r"\((?:\w+\[\S*\] )?%([\w.\-]+), (?:\w+\[\S*\] )?%([\w.\-]+)\)"
    products = re.findall(rf" (?:dot|convolution){operands}", text)
    products += re.findall(rf" custom-call{operands}, custom_call_target=\"__cublas", text)
    of_operands = [{types[operand] for operand in operands} for operands in products]
    assert of_operands.count({"bf16"}) >= 3  # forward, and the gradients of the kernel and of the images


def cluster_jobs():
    """The trainings that the jobs in docs/cluster/ start, each with the GPUs that it starts on."""
    script = (ROOT / "docs" / "cluster" / "slurm.sh").read_text()
    nodes, gpus = (int(re.search(rf"^#SBATCH --{name}=(\d+)$", script, re.M)[1]) for name in ("nodes", "gpus-per-node"))
    (example,) = re.findall(r"(--seeds \d+)`", script)
    (line,) = re.findall(r"^srun .*$", script, re.MULTILINE)
    yield nodes * gpus, settings_of(f"{line} {example}")
    _, job = yaml.safe_load_all((ROOT / "docs" / "cluster" / "kubernetes.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    command = " ".join(container["command"]).replace("$(JOB_COMPLETION_INDEX)", "0")
    yield job["spec"]["completions"] * container["resources"]["limits"]["nvidia.com/gpu"], settings_of(command)


@slow
@pytest.mark.parametrize("job", [0, 1], ids=["slurm", "kubernetes"])
def test_what_the_jobs_for_clusters_start_compiles_and_fits_and_exchanges_nothing(job):
    gpus, settings = list(cluster_jobs())[job]
    planned = plan(f"h100:{gpus}", seeds=settings.seeds, recipe=settings.recipe, precision=settings.precision)
    step = planned.step
    assert planned.devices == gpus > 1
    assert planned.fits
    assert (step.collectives, step.grouped_convolutions, step.host_transfers) == (0, 0, 0)
    assert step.known_trip_count
    assert planned.seeds_at_once == settings.seeds // gpus > 1


@pytest.mark.parametrize(
    ("target", "meant"),
    [
        ("h100x8", "perhaps you meant h100"),
        ("H100", "perhaps you meant h100"),
        ("h100:0", "it takes h100, h100:8 and the like"),
        ("h100:", "it takes h100, h100:8 and the like"),
        ("v5e", "it takes v5e:1x1, v5e:2x2 and the like"),
        ("v5e:3x3", "it takes v5e:1x1, v5e:2x2 and the like"),
        ("v5e:18x2", "it takes v5e:1x1, v5e:2x2 and the like"),
        ("v5e:2x2x1", "it takes v5e:1x1, v5e:2x2 and the like"),
        ("v4:2x2", "it takes v4:1x1x1, v4:2x2x1 and the like"),
        ("abacus", "there are a100, a100:8, h100, h100:8, h200,"),
    ],
)
def test_a_wrong_target_is_answered_with_the_right_ones(target, meant, command):
    code, out, err = command("plan", target)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith(f"error: TARGET {target}: there is no such accelerator; {meant}")


@pytest.mark.parametrize("target", ["h100", "v5e:1x1"])
def test_without_the_extra_one_line_names_it(target, command, monkeypatch):
    from cnn_jax.cli import commands

    monkeypatch.setattr(commands.importlib.util, "find_spec", lambda name: None)
    code, out, err = command("plan", target)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.endswith("which is not installed: pip install 'cnn-jax[plan]'\n")


def test_the_program_is_not_written_over_the_users_code(command, tmp_path):
    for package in TPU_PACKAGE, GPU_PACKAGE:
        pytest.importorskip(package, reason="needs the extra plan")
    (tmp_path / "mine.py").write_text("class Mine: pass")
    code, out, err = command("plan", "h100", "--model", tmp_path / "mine.py:Mine", "--hlo", tmp_path / "mine.py")
    assert (code, out) == (4, "")
    assert err == f"error: cannot write {tmp_path}/mine.py (it is what is read); give another --hlo\n"


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        *(("h100", 1), ("h100:8", 8), ("h100:16", 16), ("h100:12", 12), ("a100", 1), ("h200", 1), ("b200:2", 2)),
        *(("v4:1x1x1", 1), ("v4:2x2x2", 8), ("v5e:1x1", 1), ("v5e:4x4", 16), ("v5p:2x2x1", 4), ("v6e:2x4", 8)),
    ],
)
def test_every_kind_of_accelerator_has_as_many_devices_as_its_name_says(name, devices):
    from cnn_jax.analysis.targets import compile_only_devices

    target = find_target(name)
    pytest.importorskip(TPU_PACKAGE if target.platform == "tpu" else GPU_PACKAGE, reason="needs the extra plan")
    found = compile_only_devices(target)
    assert len(found) == devices
    if target.platform == "cuda":
        assert found[0].device_kind == GPUS[name.partition(":")[0]].name


@pytest.mark.parametrize("name", ["v6e:4x4", "v5e:4x4", "v4:2x2x4", "h100:16"])
@pytest.mark.parametrize("seeds", [1, 2, 8, 16, 48])
def test_any_number_of_seeds_is_laid_out_over_all_devices(name, seeds):
    from cnn_jax.analysis.targets import compile_only_devices

    target = find_target(name)
    pytest.importorskip(TPU_PACKAGE if target.platform == "tpu" else GPU_PACKAGE, reason="needs the extra plan")
    mesh = make_mesh(seeds, compile_only_devices(target))
    assert mesh.devices.shape == (math.gcd(seeds, 16), 16 // math.gcd(seeds, 16))
    assert len({*mesh.devices.flat}) == 16


def test_two_processes_compile_for_tpus_at_once(tmp_path):
    pytest.importorskip(TPU_PACKAGE, reason="needs the extra plan")
    code = (
        "import jax; jax.config.update('jax_platforms', 'cpu'); from cnn_jax.analysis import targets; "
        "print(len(targets.compile_only_devices(targets.find_target('v5e:2x2'))), flush=True); input()"
    )
    processes = [start_python("-c", code, stdin=-1) for _ in range(2)]
    try:
        assert [process.stdout.readline() for process in processes] == ["4\n", "4\n"]  # both are there now
        assert [process.communicate("\n")[1] for process in processes] == ["", ""]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


EXAMPLE = Plan(
    target=find_target("h100"),
    settings=TrainSettings.of(seeds=32),
    devices=1,
    seeds_at_once=32,
    compile_seconds=5.0,
    memory=Memory(2**30, 2**31, 2**20),
    resident=2**20,
    step=Step(26, 5, 0, 3, 0, 0, True),
    estimate={},
    hlo="HloModule example",
)


@pytest.fixture
def planning(monkeypatch, command):
    """Run the command with a plan that was made before."""

    def run(planned, *options):
        monkeypatch.setattr(plan_module, "make_plan", lambda target, settings, sizes: planned)
        monkeypatch.setattr("cnn_jax.cli.commands.need", lambda *packages, extra: None)
        return command("plan", planned.target.name, *options)

    return run


def test_the_figures_are_a_table_on_stderr_and_one_object_on_stdout(planning, tmp_path):
    code, out, err = planning(EXAMPLE)
    assert (code, out) == (0, "")
    assert "26 kernels and copies" in err
    code, out, err = planning(EXAMPLE, "--json", "--hlo", tmp_path / "program.hlo")
    assert code == 0
    assert json.loads(out) == {
        "target": "h100",
        "devices": 1,
        "seeds": 32,
        "seeds_at_once": 32,
        "precision": "float32",
        "recipe": "tutorial",
        "compile_seconds": 5.0,
        "memory": {
            "arguments": 2**30,
            "temporaries": 2**31,
            "output": 2**20,
            "device": EXAMPLE.target.device_bytes,
            "fits": True,
        },
        "step": {
            "launches": 26,
            "convolutions": 5,
            "grouped_convolutions": 0,
            "matmuls": 3,
            "collectives": 0,
            "host_transfers": 0,
            "known_trip_count": True,
        },
    }
    assert (tmp_path / "program.hlo").read_text() == EXAMPLE.hlo


def test_of_a_tpu_the_figures_have_xlas_estimate(planning):
    estimate = {"flops": 2e9, "bytes": 3e8, "estimated_milliseconds": 0.5}
    code, out, err = planning(EXAMPLE._replace(target=find_target("v5e:1x1"), estimate=estimate), "--json")
    assert code == 0
    assert json.loads(out)["step"].items() >= estimate.items()
    assert "0.50 ms per step" in err


@pytest.mark.parametrize(
    ("needed", "settings", "remedy"),
    [
        (200 * 2**30, {"seeds": 32}, "about --seeds 8 would fit"),
        (200 * 2**30, {}, "about --batch-size 25 would fit"),
        (200 * 2**40, {}, "a network with fewer --features may fit"),
    ],
)
def test_what_does_not_fit_ends_with_2_and_what_would_after_the_figures(needed, settings, remedy, planning):
    too_large = EXAMPLE._replace(memory=Memory(needed, 0, 0), settings=TrainSettings.of(**settings))
    code, out, err = planning(too_large, "--json")
    assert code == 2
    assert not json.loads(out)["memory"]["fits"]
    line = err.splitlines()[-1]
    assert line.startswith("error: TARGET h100: this needs ")
    assert line.endswith(remedy) or remedy in line


def test_what_cannot_fit_is_refused_before_it_is_compiled():
    pytest.importorskip(GPU_PACKAGE, reason="needs the extra plan")
    with pytest.raises(UsageError, match=r"^--features 30000 30000 .* there are 59\.3; make them smaller$"):
        plan("h100", features=(30_000, 30_000))


def test_the_sizes_of_data_are_known_without_loading_their_images(small_mnist, tfds_folder, command):
    assert read_sizes("mnist", None, None) == (60_000, 10_000, (28, 28, 1), 10)
    assert read_sizes("mnist", small_mnist, None) == (1030, 260, (28, 28, 1), 10)
    with pytest.raises(UsageError, match="it is not prepared here, so its sizes are not known"):
        read_sizes("fashion_mnist", None, tfds_folder)


@pytest.mark.parametrize("seeds", [1, 3])
def test_streamed_images_have_the_shapes_that_they_are_compiled_for(seeds, small_mnist):
    dataset = load_dataset("mnist", small_mnist, None)
    settings, devices = TrainSettings.of(seeds=seeds, batch_size=64), jax.devices()[:1]
    sizes = Sizes.of(dataset, settings)
    program = make_program(settings, sizes, make_mesh(seeds, devices), streams=True)
    shapes = chunk_shapes(program, sizes)
    chunk = next(streamed(dataset, program.mesh)(program.epoch(np.int32(0)), 0))
    assert jax.tree.map(np.shape, chunk[:3]) == jax.tree.map(np.shape, shapes[:3])
    assert chunk[3:] == shapes[3:]


def test_a_long_compilation_shows_that_it_is_alive(monkeypatch, capsys):
    from cnn_jax.runtime import display

    monkeypatch.setattr(display, "REMIND_SECONDS", 0.01)
    with display.Display().waiting("compiling for h100"):
        time.sleep(0.1)
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert all(re.fullmatch(r"compiling for h100: 0\.\d s so far", line) for line in lines)


def test_where_there_is_no_accelerator_none_is_looked_for_aloud(program):
    if any(os.path.exists(file) for file in ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0")):
        pytest.skip("here there is one")
    code = """
from cnn_jax.runtime import devices, errors
for platform in (None, "gpu", "tpu"):
    try:
        devices.start_devices(platform, keep_compiled=False)
    except errors.UsageError as error:
        print(str(error).partition(",")[0])
    else:
        print(devices.jax.devices()[0].platform)
    devices.jax.extend.backend.clear_backends()
    devices.jax.config.update("jax_platforms", None)
"""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    out, err = program("-c", f"import jax.extend.backend{code}", env=environment).communicate(timeout=200)
    assert err == ""
    not_here = "JAX finds no such device here"
    assert out.splitlines() == ["cpu", f"--platform gpu: {not_here}", f"--platform tpu: {not_here}"]
