"""Runs are compared by the test that their seeds allow, and no finding says more than its numbers."""

import base64
import io
import json
import math
import re
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from scipy import stats

import cnn_jax
from cnn_jax.analysis.diff import ComparedRun, compare_runs, make_tables, mcnemar, seeds_needed
from cnn_jax.data.loading import load_dataset
from tests.analysis.test_report import Page
from tests.helpers import damage_newest, write_small_mnist

pytestmark = pytest.mark.optax_promotes


@pytest.fixture
def diff(trained_run, command, tmp_path):
    """Compare runs, given by their names with the options they were trained with, or their folders."""

    def compare(*options, **runs):
        for name, run in runs.items():
            folder = trained_run(*run, epochs=2, reported=False) if isinstance(run, tuple) else run
            (tmp_path / name).symlink_to(folder)
        return command("diff", *runs, "--checkpoint-dir", tmp_path, *options)

    return compare


SMALL = ("--features", 8, 16)
SLOW, FAST = (*SMALL, "--seeds", 3), (*SMALL, "--seeds", 3, "--learning-rate", 0.01)
ONE, OTHER = SMALL, (*SMALL, "--seed", 5)


def results_of(run):
    """Each seed's test accuracy, as the training wrote it down."""
    return [seed["test_accuracy"] for seed in json.loads((run / "result.json").read_text())["seeds"]]


def row(text, name, table=-1):
    """The cells of a row, by default of the last table that has it."""
    cells = re.findall(rf"^│ {re.escape(name)} +│(.*)│$", text, re.MULTILINE)[table]
    return [cell.strip() for cell in cells.split("│")]


def test_runs_of_the_same_seeds_are_compared_seed_by_seed(diff, tmp_path):
    code, out, err = diff("--json", a=SLOW, b=FAST)
    assert code == 0, err
    (comparison,) = json.loads(out)["comparisons"]
    each = [b - a for a, b in zip(*map(results_of, (tmp_path / "a", tmp_path / "b")), strict=True)]
    assert comparison["by_seed"] == pytest.approx(dict(zip(("777", "778", "779"), each, strict=True)))
    # Student's, of two degrees of freedom: 4.302653 is its 97.5 % point, and it has a closed form.
    mean, error = sum(each) / 3, np.std(each, ddof=1) / math.sqrt(3)
    numbers = [comparison[name] for name in ("difference", "low", "high", "p_value")]
    p_value = 1 - mean / math.sqrt(2 * error**2 + mean**2)
    assert numbers == pytest.approx([mean, mean - 4.302653 * error, mean + 4.302653 * error, p_value], rel=1e-6)
    assert comparison["finding"].startswith(f"b minus a: test accuracy {mean:+.5f}, 95 % interval ")
    assert comparison["finding"].endswith(f"(paired t-test of 3 seeds; p = {p_value:.2g}): the accuracies differ")
    assert row(err, "difference") == [f"{mean:+.5f}"]
    assert row(err, "seeds to show half of it") == [f"{comparison['seeds_needed']} of each run"]


def test_the_accuracies_are_those_of_the_training_and_only_what_differs_is_listed(diff, tmp_path):
    code, out, err = diff("--json", a=SLOW, b=FAST)
    assert code == 0, err
    answer = json.loads(out)
    assert answer["differing"] == {"--learning-rate": ["0.001", "0.01"]}
    for run in answer["runs"]:
        result = json.loads((tmp_path / run["run"] / "result.json").read_text())
        assert run["spread"] == pytest.approx(result["spread"])
        assert [*run["test_accuracies"].values()] == pytest.approx(results_of(tmp_path / run["run"]))
    assert row(err, "--learning-rate") == ["0.001", "0.01"]
    assert row(err, "each seed") == [" ".join(f"{a:.4f}" for a in results_of(tmp_path / name)) for name in "ab"]
    spread = answer["runs"][0]["spread"]
    assert row(err, "95 % interval", table=0)[0] == f"{spread['low']:.4f} to {spread['high']:.4f}"


def test_versions_machines_and_data_that_differ_are_listed(diff, command, small_mnist, tmp_path):
    versions = {"cnn-jax": "0.0.9", "jax": "0.9.0", "jaxlib": "0.9.0", "flax": "1", "optax": "1"}
    data = tmp_path / "data"
    data.mkdir()
    write_small_mnist(data, train=1020)
    where = ("--dataset-dir", data, "--checkpoint-dir", tmp_path, "--run-name", "own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cnn_jax.runs.restore.versions", lambda *names: versions)
        patch.setattr("cnn_jax.runs.summary.describe_machine", lambda: "an abacus")
        patch.setattr("cnn_jax.analysis.report.write_report", lambda *arguments: None)
        assert command("train", *where, *SMALL, "--epochs", 2)[0] == 0
    code, out, err = diff("--json", a=ONE, b=tmp_path / "own")
    assert code == 0, err
    differing = json.loads(out)["differing"]
    assert differing["version of jax"] == [jax.__version__, "0.9.0"]
    assert differing["processor"][1] == "an abacus"
    assert differing["--dataset-dir"] == [str(small_mnist), str(data)]
    assert len({*differing["data"]}) == 2
    assert not {"device", "XLA_FLAGS", "classes", "--seed"} & differing.keys()
    assert "McNemar" not in out


def test_runs_of_different_seeds_are_compared_by_welchs_test_and_it_says_so(diff, tmp_path):
    _, out, err = diff("--json", a=SLOW, c=(*SLOW, "--seed", 1))
    (comparison,) = json.loads(out)["comparisons"]
    left, right = (np.array(results_of(tmp_path / name)) for name in "ca")
    parts = [values.var(ddof=1) / 3 for values in (left, right)]
    half = stats.t.ppf(0.975, sum(parts) ** 2 / sum(part**2 / 2 for part in parts)) * math.sqrt(sum(parts))
    mean = left.mean() - right.mean()
    numbers = [comparison[name] for name in ("difference", "low", "high")]
    assert numbers == pytest.approx([mean, mean - half, mean + half])
    assert comparison["by_seed"] is None
    assert row(err, "test") == ["Welch's t-test, as the seeds are not the same"]


def test_networks_of_one_seed_are_compared_by_mcnemars_test_on_the_images(diff, small_mnist, tmp_path):
    code, out, err = diff(a=ONE, b=OTHER)
    assert code == 0, err
    dataset = load_dataset("mnist", small_mnist, None)
    a, b = (
        cnn_jax.load(tmp_path / name).logits(dataset.test_images).argmax(axis=1) == dataset.test_labels for name in "ab"
    )
    only_b, only_a = int((b & ~a).sum()), int((a & ~b).sum())
    p_value = mcnemar(only_b, only_a).p_value
    assert f"{b.mean() - a.mean():+.5f}, 95 % interval " in out
    assert f"(McNemar's exact test; b alone is right on {only_b} images, a on {only_a}; p = {p_value:.2g})" in out
    assert out.endswith("; one seed shows nothing of a recipe\n")
    assert "none, of one seed" in err
    assert row(err, "seeds to show half of it") == [""]


@pytest.mark.parametrize("options", [SLOW, ONE])
def test_a_run_and_its_copy_differ_in_nothing_and_nothing_is_divided_by_zero(options, diff, trained_run, tmp_path):
    run = trained_run(*options, epochs=2, reported=False)
    code, out, err = diff("--output", tmp_path / "page.html", a=run, b=shutil.copytree(run, tmp_path / "copy"))
    assert code == 0, err
    assert out.startswith("b minus a: test accuracy +0.00000, without any spread: no difference is shown")
    assert row(err, "nothing") == ["", ""]
    assert row(err, "95 % interval") == ["none"]
    assert "nan" not in out + err + Page((tmp_path / "page.html").read_text()).text


def test_three_runs_are_each_compared_with_the_first(diff):
    code, out, err = diff(a=SLOW, b=FAST, c=(*SLOW, "--seed", 778))
    assert code == 0, err
    assert [line.partition(":")[0] for line in out.splitlines()] == ["b minus a", "c minus a"]
    assert row(err, "--seed") == ["777", "777", "778"]
    assert row(err, "test")[1].startswith("paired")  # of the two seeds that both have
    assert len(row(err, "of each seed")[0].split()) >= 2
    assert "each interval stands alone: where nothing differs, one in twenty excludes 0 all the same" in err


def test_one_seed_is_not_tested_against_several(diff):
    code, out, err = diff(a=SLOW, b=ONE)
    assert (code, out) == (0, "b minus a: not tested, for b has one seed, which shows no spread\n")
    assert row(err, "test accuracy")[1]
    assert row(err, "test") == row(err, "95 % interval") == ["none"]


def test_runs_of_other_test_images_are_shown_and_not_tested(diff, trained_run, tmp_path):
    data = tmp_path / "other"
    data.mkdir()
    write_small_mnist(data, test=250)
    code, out, err = diff(a=ONE, b=trained_run(*SMALL, epochs=1, data=data, reported=False))
    assert (code, out) == (0, "b minus a: not tested, for their test images are not the same\n")
    assert row(err, "test images") == ["260", "250"]
    assert all(row(err, "test accuracy"))


def test_a_run_that_has_not_ended_is_tested_as_far_as_it_has_come(diff, trained_run, tmp_path):
    run = shutil.copytree(trained_run(*SLOW, epochs=2, reported=False), tmp_path / "stopped")
    (run / "result.json").unlink()
    damage_newest(run / "steps")
    code, out, err = diff(a=SLOW, b=run)
    assert code == 0, err
    assert "b has not ended: it is tested after 10 of 20 steps" in err
    assert "the checkpoint of step 20 is damaged" in err
    assert row(err, "steps") == ["20", "10 of 20"]
    assert row(err, "processor")[1] == "not recorded"
    assert "95 % interval" in out


def test_a_page_has_all_of_it_and_names_are_text(diff, tmp_path):
    names = ("_<img src=x onerror=alert(1)>", "$x_{{7*7}} & \x1b\u202e")
    code, out, err = diff("--output", tmp_path / "page.html", **dict(zip(names, (SLOW, FAST), strict=True)))
    assert (code, out.count("\n")) == (0, 1), err
    assert err.splitlines()[-1] == f"the page is {tmp_path / 'page.html'}"
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert " ".join(out.split()) in page.text
    for cell in ("--learning-rate 0.001 0.01", *row(err, "of each seed"), "_<img src=x onerror=alert(1)>"):
        assert cell in page.text
    assert "$x_{{7*7}} & \\x1b\\u202e" in page.text
    assert not {"script", "iframe", "object"} & {*page.elements}
    images = [value for tag, name, value in page.named if (tag, name) == ("img", "src")]
    assert len(images) == page.elements.count("img") == 2
    pixels = [Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2]))) for image in images]
    assert {image.format for image in pixels} == {"PNG"}
    assert "//" not in re.sub(r'src="data:[^"]*"', "", text)


def test_the_curves_of_runs_lie_over_each_other(diff, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(
        "cnn_jax.analysis.plots._save", lambda figure, file: drawn.append(figure) or file.write_bytes(b"")
    )
    assert diff("--output", tmp_path / "page.html", _a=SLOW, **{"$b$": (*FAST, "--validation", 100)})[0] == 0
    for figure, field in zip(drawn, ("cost", "accuracy"), strict=True):
        (axes,) = figure.axes
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["_a (test)", "$b$ (validation)"]
        lines = [json.loads(line) for line in (tmp_path / "_a" / "metrics.jsonl").read_text().splitlines()]
        means = [line.get_ydata().tolist() for line in axes.lines if line.get_marker() == "o"]
        key = field if field == "cost" else "test_accuracy"
        assert means[0] == pytest.approx([line[key] for line in lines])
        assert len(means) == 2
        assert len(axes.lines) == 2 * (3 + 1)
    assert drawn[1].axes[0].get_ylabel() == "test or validation accuracy"


@pytest.mark.parametrize(
    ("words", "expected", "complaint"),
    [
        ("a", 2, "RUN... a: it must be at least two runs, each of them once"),
        ("a a", 2, "RUN... a a: it must be at least two runs, each of them once"),
        ("a link", 2, "RUN... a link: it must be at least two runs, each of them once"),
        ("a b", 3, "{folder}/b is not a run (it has no config.json); there are a, copy, link"),
        ("a copy/", 3, "{folder}/copy/steps holds no checkpoint; train the run first"),
        ("a copy --output no/such/page.html", 4, "cannot write no/such/page.html ("),
        ("a copy --output {folder}/copy/config.json", 4, "cannot write {folder}/copy/config.json ("),
    ],
)
def test_runs_that_cannot_be_compared_are_refused_in_one_line(
    words, expected, complaint, trained_run, command, tmp_path
):
    (tmp_path / "a").symlink_to(trained_run(*SMALL, epochs=2, reported=False))
    (tmp_path / "link").symlink_to("a")
    shutil.copytree(tmp_path / "a", tmp_path / "copy", ignore=shutil.ignore_patterns("steps"))
    code, out, err = command("diff", *words.format(folder=tmp_path).split(), "--checkpoint-dir", tmp_path)
    assert (code, out, err.count("\n")) == (expected, "", 1), err
    assert err.startswith(f"error: {complaint.format(folder=tmp_path)}")


@pytest.mark.parametrize("name", ["config.json", "result.json"])
def test_a_run_whose_files_were_edited_is_named(name, diff, trained_run, tmp_path):
    run = shutil.copytree(trained_run(*SMALL, epochs=2, reported=False), tmp_path / "copy")
    (run / name).write_text("{}")
    code, out, err = diff(a=ONE, b=run)
    assert (code, out, err.count("\n")) == (65, "", 1)
    assert err.startswith(f"error: {tmp_path / 'b' / name} is damaged or was edited (")


def of_counts(name, counts, seed=0, images=1000):
    """A run whose seeds are right on the first so many images."""
    right = np.arange(images) < np.array(counts)[:, np.newaxis]
    return ComparedRun(name, {}, [*range(seed, seed + len(counts))], right, "the test images", [], (1, 1))


@pytest.mark.parametrize(
    ("first", "other", "verdict"),
    [
        ([900, 910, 905], [912, 921, 917], "the accuracies differ"),
        ([912, 921, 917], [900, 910, 905], "the accuracies differ"),
        ([900, 910, 905], [912, 903, 917], "no difference is shown"),
        ([900, 910, 905], [901, 911, 906], "+0.00100, without any spread: no test can judge it"),
        ([900, 910, 905], [900, 910, 905], "+0.00000, without any spread: no difference is shown"),
        ([0, 0], [1000, 1000], "+1.00000, without any spread: no test can judge it"),
        ([900], [920], "these two networks differ; one seed shows nothing of a recipe"),
        ([900], [905], "no difference is shown; one seed shows nothing of a recipe"),
        ([0], [0], "+0.00000, without any spread: no difference is shown; one seed shows nothing of a recipe"),
    ],
)
def test_runs_are_said_to_differ_only_where_the_interval_excludes_0(first, other, verdict):
    comparison = compare_runs(of_counts("a", first), of_counts("b", other))
    assert comparison.finding.endswith(verdict)
    assert (comparison.low is None) == ("without any spread" in comparison.finding)
    if comparison.low is not None:
        excludes = comparison.low > 0 or comparison.high < 0
        assert excludes == (comparison.p_value < 0.05) == ("differ" in verdict.replace("no difference", ""))


def test_runs_that_share_some_seeds_are_paired_over_those():
    comparison = compare_runs(of_counts("a", [900, 910, 905]), of_counts("b", [912, 921, 917, 916], seed=1))
    assert comparison.by_seed == pytest.approx({1: 0.002, 2: 0.016})
    assert comparison.difference == pytest.approx(0.009)
    assert comparison.test == "paired t-test of 2 seeds"
    alone = compare_runs(of_counts("a", [900, 910, 905]), of_counts("b", [912, 921, 917], seed=2))
    assert alone.test.startswith("Welch")  # one pair has no spread


def test_the_seeds_needed_are_those_that_show_half_of_the_difference():
    # Differences of 10, 20 and 30 images: half of their mean is one of their standard deviations.
    comparison = compare_runs(of_counts("a", [900, 900, 900]), of_counts("b", [910, 920, 930]))
    assert comparison.seeds_needed == seeds_needed(1, [1])


def test_mcnemars_test_is_the_binomial_distributions():
    # Of 12 images, 2 or fewer, or 10 or more: 2 (1 + 12 + 66) / 2^12.
    difference = mcnemar(10, 2)
    assert (difference.mean, difference.p_value) == (8, pytest.approx(158 / 4096))
    # At the interval's ends, as many images or more, or as few or fewer, come with 2.5 %.
    low, high = ((end / 12 + 1) / 2 for end in (difference.low, difference.high))
    assert sum(math.comb(12, k) * low**k * (1 - low) ** (12 - k) for k in range(10, 13)) == pytest.approx(0.025)
    assert sum(math.comb(12, k) * high**k * (1 - high) ** (12 - k) for k in range(11)) == pytest.approx(0.025)
    assert mcnemar(0, 5).p_value == pytest.approx(2 / 32)
    assert mcnemar(0, 5).high > 0
    assert mcnemar(0, 0) == (0, 0, 0, None)


def test_the_number_of_seeds_needed_is_that_of_the_published_tables():
    # Cohen, Statistical Power Analysis for the Behavioral Sciences, 1988, table 2.4.1: 64 and 26 in each of two groups
    # for differences of 0.5 and 0.8 standard deviations, two-sided, 5 %, power 0.8.
    assert [seeds_needed(effect, [1, 1]) for effect in (0.5, 0.8)] == [64, 26]
    assert [seeds_needed(effect, [4, 4]) for effect in (-1, 1.6)] == [64, 26]
    assert seeds_needed(0.5, [1]) == seeds_needed(0.5, [1, 0]) == 34
    assert seeds_needed(1e6, [1]) == 2
    assert 7.8e12 < seeds_needed(1e-6, [1]) < 7.9e12
    assert seeds_needed(0, [1]) is seeds_needed(1, [0, 0]) is None


def test_so_many_seeds_have_the_power_and_one_less_has_not():
    differences = np.random.default_rng(0).normal(1, 1, (200_000, 10))
    needed = seeds_needed(1, [1])
    found = [stats.ttest_1samp(differences[:, :seeds], 0, axis=1).pvalue < 0.05 for seeds in (needed - 1, needed)]
    assert needed == 10
    assert found[0].mean() < 0.8 < found[1].mean()


def test_an_earlier_programs_run_that_recorded_less_is_shown_so():
    of_a, of_b = {"x": "1"}, {"y": "none", "--model": "Idea"}
    a, b = (of_counts(name, [900])._replace(facts=facts) for name, facts in (("a", of_a), ("b", of_b)))
    assert make_tables([a, b], [compare_runs(a, b)])[0][2] == [
        ("x", "1", "not recorded"),
        ("y", "not recorded", "none"),
        ("--model", "not given", "Idea"),
    ]
