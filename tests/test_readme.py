"""The numbers on the pages are those of the committed results, made from their JSON and typed by nobody."""

import json
import re

import numpy as np
import pytest

from tests.helpers import ROOT

pytest.importorskip("torch", reason="needs the extra torch")

BENCHMARKS = ROOT / "benchmarks"
COMPARISON = json.loads((BENCHMARKS / "comparison" / "report.json").read_text())


def test_every_table_is_on_one_page_and_made_from_the_committed_results():
    from benchmarks.readme import PAGES, TABLES, fill_tables

    pages = [page.read_text() for page in PAGES]
    for name in TABLES:
        assert sum(page.count(f"<!-- {name} -->\n|") for page in pages) == 1
    for path, page in zip(PAGES, pages, strict=True):
        assert fill_tables(page) == page, path.name


def test_what_the_readme_says_that_training_prints_is_what_it_printed():
    (run,) = (run for run in COMPARISON["frameworks"]["cnn-jax"]["runs"] if run["seed"] == 777)
    printed = [f"[Epoch: {epoch:>4}] cost = {cost:>.9}" for epoch, cost in enumerate(run["costs"], start=1)]
    printed.append(f"Accuracy: {run['accuracy']:.4f}")
    assert "```\n" + "\n".join(printed[-5:]) + "\n```" in (ROOT / "README.md").read_text()
    output = (ROOT / "docs" / "output-and-exit-codes.md").read_text()
    assert set(re.findall(r"^\[Epoch.*$|^Accuracy.*$", output, re.MULTILINE)) <= set(printed)


def milliseconds(name):
    """The median milliseconds of each variant of a step in a recorded benchmark."""
    variants = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())["variants"]
    return {variant: values["milliseconds"] for variant, values in variants.items()}


def test_the_recorded_stream_stays_small_and_takes_no_longer_per_image_of_a_larger_set():
    recorded = json.loads((BENCHMARKS / "runs" / "feed" / "more_than_memory.json").read_text())
    resident, smaller, larger, _ = recorded["cases"]
    assert (larger["images"], recorded["same_bits"]) == (2_000_000, True)
    assert 0 < recorded["killed_after_step"] < recorded["steps"] == 400
    assert all(one["resident_bytes"] < 1.5e9 for one in larger["rounds"])
    times = [[one["step_milliseconds"] for one in case["rounds"]] for case in (resident, smaller, larger)]
    assert all(np.median(np.divide(others, times[-1])) >= 0.95 for others in times)


def test_the_comparisons_prose_gives_the_numbers_of_the_results():
    prose = " ".join((ROOT / "docs" / "comparison.md").read_text().split())
    epyc, slowed = milliseconds("amd-epyc-2-cores-2026-11-25"), milliseconds("amd-epyc-2-cores-2026-11-24-slowed-down")
    xeon = milliseconds("intel-r-xeon-r-processor-2-cores-2026-11-26")
    ours, out_of_the_box, best = "cnn-jax, float32", "PyTorch, channels_last", "PyTorch, channels_last, memory kept"
    interval, agreement = COMPARISON["accuracy_difference"], COMPARISON["agreement"]
    for words in (
        f"the 95 % interval of their difference is {interval['low']:+.4f} to {interval['high']:+.4f}",
        f"ahead of cnn-jax: {xeon['TensorFlow, tf.function']:.1f} ms against {xeon[ours]:.1f} ms",
        f"Then cnn-jax is {xeon[best] / xeon[ours]:.2f} times as fast",
        f"and without them {xeon[out_of_the_box] / xeon[ours]:.2f} times",
        f"{xeon['PyTorch, bfloat16 autocast, memory kept']:.1f} ms against {xeon['cnn-jax, bfloat16']:.1f} ms",
        f"cnn-jax is {epyc[best] / epyc[ours]:.2f} times as fast as PyTorch's fastest float32 variant",
        f"{epyc['PyTorch, bfloat16 autocast']:.1f} ms against {epyc['cnn-jax, bfloat16']:.1f} ms",
        f"[{slowed[best] / slowed[ours]:.2f} times as fast](",
        f"the logits agree within {agreement['logits']:.0e}, and every gradient within {agreement['gradients']:.0e}",
        f"agree within {max(agreement['float64_costs']):.0e} in float64",
        f"In float32 they agree within {max(agreement['costs'][:100]):.0e}",
        f"itself by up to {max(agreement['pytorch_costs'][:100]):.0e}",
    ):
        assert words in prose
    assert interval["low"] < 0 < interval["high"]  # the accuracies do not differ measurably
    assert xeon["cnn-jax, bfloat16"] > 0.95 * xeon[ours]  # it hardly pays
