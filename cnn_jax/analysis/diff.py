"""The command `diff`: in what runs differ, and whether their test accuracies do."""

import itertools
import json
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy
from jaxtyping import Bool

from cnn_jax.analysis.layers import Picture
from cnn_jax.analysis.plots import plot_runs
from cnn_jax.analysis.report import render
from cnn_jax.core.sharding import of_seed
from cnn_jax.data.dataset import fingerprint
from cnn_jax.inference.logits import logits
from cnn_jax.runs.folder import EpochMetrics, RunFolder, in_words
from cnn_jax.runs.restore import restore_run
from cnn_jax.runs.settings import Platform, option_name
from cnn_jax.runs.summary import Difference, MeanInterval, difference_interval, mean_interval
from cnn_jax.runtime.devices import start_devices
from cnn_jax.runtime.display import Display, describe_values
from cnn_jax.runtime.files import write_atomically
from cnn_jax.runtime.streams import printable

UNKNOWN = "not recorded"
LEVEL, POWER = 0.05, 0.8  # of the tests that `seeds_needed` plans

Table = tuple[str, list[str], list[tuple[str, ...]]]  # its title, header and rows


class ComparedRun(NamedTuple):
    """A run, and how its networks do on its test images.

    Attributes:
      name: What the user calls it.
      facts: What its results depend on, by name, in words.
      seeds: Its seeds.
      right: Whether the network of each seed is right on each test image.
      test_set: The SHA-256 of the test images and labels.
      metrics: Those of its epochs.
      steps: How many it has behind it, and how many at its end.
    """

    name: str
    facts: dict[str, str]
    seeds: list[int]
    right: Bool[np.ndarray, "s m"]
    test_set: str
    metrics: list[EpochMetrics]
    steps: tuple[int, int]

    @property
    def accuracies(self) -> list[float]:
        """The test accuracy of each seed, in [0, 1]."""
        return self.right.mean(axis=1).tolist()

    @property
    def interval(self) -> MeanInterval | None:
        """That of the mean of its accuracies; None of one seed, which shows no spread."""
        return mean_interval(self.accuracies) if len(self.seeds) > 1 else None

    def counts(self, seeds: Sequence[int]) -> list[int]:
        """Return how many images seeds are right on: whole numbers, whose equal differences stay equal."""
        return [int(right.sum()) for seed, right in zip(self.seeds, self.right, strict=True) if seed in seeds]


class Comparison(NamedTuple):
    """A run against the first.

    Attributes:
      run: Its name.
      finding: What follows, in a sentence.
      test: Which test was made; None for none.
      difference: Its mean test accuracy minus that of the first.
      low: The lower end of the 95 % interval of that; None where nothing varies.
      high: The upper end.
      p_value: The test's.
      by_seed: The difference of each seed that both have, where the test pairs them.
      seeds_needed: How many seeds of each run would show half of the difference; None where nothing varies or differs.
    """

    run: str
    finding: str
    test: str | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    by_seed: dict[int, float] | None = None
    seeds_needed: int | None = None


def diff(
    runs: Mapping[str, Path],
    *,
    output: Path | None = None,
    as_json: bool = False,
    data_dir: Path | None = None,
    platform: Platform | None = None,
) -> None:
    """Test the newest checkpoints of runs, say in what the runs differ, and whether their accuracies do.

    Args:
      runs: The folders of at least two runs by the names that the user gave them; each is compared with the first.
      output: Where to write a page about it.
      as_json: Print a JSON object on stdout, in place of a sentence for each comparison.
      data_dir: Where tfds keeps its data sets; None for where the runs found them.
      platform: Where to compute.

    Raises:
      NoCheckpointError: there is no such run, or none of its checkpoints can be used.
    """
    display = Display()
    start_devices(platform)
    for folder in runs.values():
        RunFolder(folder).read_settings()  # what is mistyped is reported before any network is tested
    compared = [measure_run(name, RunFolder(folder), data_dir, display) for name, folder in runs.items()]
    comparisons = [compare_runs(compared[0], other) for other in compared[1:]]
    tables = make_tables(compared, comparisons)
    for title, header, rows in tables:
        display.table(title, rows, header)
    remarks = [
        f"{run.name} has not ended: it is tested after {run.steps[0]:,} of {run.steps[1]:,} steps"
        for run in compared
        if run.steps[0] < run.steps[1]
    ]
    if sum(comparison.test is not None for comparison in comparisons) > 1:
        remarks.append("each interval stands alone: where nothing differs, one in twenty excludes 0 all the same")
    display.say(*remarks)
    findings = [comparison.finding for comparison in comparisons]
    display.result(*([json.dumps(to_record(compared, comparisons, tables[0]))] if as_json else findings))
    if output is not None:
        write_page(output, compared, tables[::-1], findings + remarks)
        display.say(f"the page is {output}")


def measure_run(name: str, folder: RunFolder, data_dir: Path | None, display: Display) -> ComparedRun:
    """Test the networks of all seeds in a run's newest checkpoint."""
    trained, result = restore_run(folder, data_dir, display.say), folder.read_result()
    settings, known, dataset = trained.settings, trained.meta, trained.dataset
    facts = {option_name(setting): value for setting, value in known["settings"].items()}
    facts["--epochs"] = known.get("epochs", settings.epochs)
    facts |= {f"version of {package}": version for package, version in known["versions"].items()}
    facts |= {"data": known["data"][:8], "classes": list(dataset.class_names)}
    facts |= {condition: known.get(condition, UNKNOWN) for condition in ("device", "XLA_FLAGS")}
    facts["processor"] = result.machine if result is not None and result.step == trained.step else UNKNOWN
    with display.waiting(f"testing {name}"):
        variables = [of_seed(trained.states.eval_variables, i) for i in range(settings.seeds)]
        answers = [logits(trained.model, each, dataset.test_images).argmax(axis=1) for each in variables]
    return ComparedRun(
        name=name,
        facts={fact: in_words(value) for fact, value in facts.items()},
        seeds=[settings.seed + i for i in range(settings.seeds)],
        right=np.stack(answers) == dataset.test_labels,
        test_set=fingerprint(dataset, ["test"]),
        metrics=trained.metrics,
        steps=(trained.step, trained.program.last_step),
    )


def compare_runs(first: ComparedRun, other: ComparedRun) -> Comparison:
    """Compare the test accuracy of a run with that of the first, by the test that their seeds allow."""
    between, images = f"{other.name} minus {first.name}", len(other.right[0])
    if first.test_set != other.test_set:
        return Comparison(other.name, f"{between}: not tested, for their test images are not the same")
    alone = [run.name for run in (first, other) if len(run.seeds) == 1]
    if len(alone) == 1:
        return Comparison(other.name, f"{between}: not tested, for {alone[0]} has one seed, which shows no spread")
    by_seed, needed, what, limit = None, None, "the accuracies", ""
    if alone:
        only = int((other.right & ~first.right).sum()), int((first.right & ~other.right).sum())
        test = f"McNemar's exact test; {other.name} alone is right on {only[0]:,} images, {first.name} on {only[1]:,}"
        in_images = mcnemar(*only)
        what, limit = "these two networks", "; one seed shows nothing of a recipe"
    else:
        shared = [seed for seed in other.seeds if seed in first.seeds]
        paired = len(shared) > 1
        test = f"paired t-test of {len(shared)} seeds" if paired else "Welch's t-test, as the seeds are not the same"
        theirs, ours = (run.counts(shared if paired else run.seeds) for run in (other, first))
        differences = [count - of_first for count, of_first in zip(theirs, ours, strict=True)] if paired else []
        in_images = difference_interval(theirs, ours, paired=paired)
        variances = [statistics.variance(values) for values in ([differences] if paired else [theirs, ours])]
        needed = seeds_needed(in_images.mean / 2, variances)
        by_seed = {seed: count / images for seed, count in zip(shared, differences, strict=True)} if paired else None
    mean, low, high = (value / images for value in in_images[:3])
    told, p_value = f"{between}: test accuracy {mean:+.5f}", in_images.p_value
    if p_value is None:
        found = f"without any spread: {'no test can judge it' if mean else 'no difference is shown'}"
        return Comparison(other.name, f"{told}, {found}{limit}", test, mean, by_seed=by_seed)
    verdict = f"{what} differ" if low > 0 or high < 0 else "no difference is shown"
    found = f"95 % interval {low:+.5f} to {high:+.5f} ({test}; p = {p_value:.2g}): {verdict}"
    return Comparison(other.name, f"{told}, {found}{limit}", test, mean, low, high, p_value, by_seed, needed)


def mcnemar(only_left: int, only_right: int) -> Difference:
    """Return by how many images more the left of two networks is right, from the images that one alone gets right.

    The test is McNemar's (Psychometrika 12, 1947), exact by the binomial distribution, and so is the interval (Clopper
    and Pearson, Biometrika 26, 1934). Both take the number of such images as given.
    """
    both = only_left + only_right
    if both == 0:
        return Difference(0.0, 0.0, 0.0, None)
    test = scipy.stats.binomtest(only_left, both)
    low, high = ((2 * share - 1) * both for share in test.proportion_ci())
    return Difference(only_left - only_right, float(low), float(high), float(test.pvalue))


def seeds_needed(difference: float, variances: Sequence[float]) -> int | None:
    """Return how many seeds show a difference with the power `POWER`; None where it is 0 or nothing varies.

    The power is the t-test's, by the noncentral t distribution (Johnson and Welch, Biometrika 31, 1940).

    Args:
      difference: The true one of the means.
      variances: That of paired seeds' differences, or those of two runs, which have as many seeds each.
    """
    total = sum(variances)
    if not difference or not total:
        return None
    shares = sum((variance / total) ** 2 for variance in variances)
    # As many as if the variances were known, which is too few.
    known = sum(scipy.stats.norm.ppf([1 - LEVEL / 2, POWER])) ** 2 * total / difference**2

    def misses(seeds: int) -> float:
        freedom = (seeds - 1) / shares  # Welch's; of pairs, one less than there are
        critical, shift = scipy.stats.t.ppf(1 - LEVEL / 2, freedom), abs(difference) * math.sqrt(seeds / total)
        return scipy.stats.nct.cdf(critical, freedom, shift)

    return next(seeds for seeds in itertools.count(max(2, math.ceil(known))) if not misses(seeds) > 1 - POWER)


def make_tables(runs: Sequence[ComparedRun], comparisons: Sequence[Comparison]) -> list[Table]:
    """Return the tables of what the results depend on and differs, of the accuracies, and of their differences."""
    names = ["", *(run.name for run in runs)]
    facts = dict.fromkeys(fact for run in runs for fact in run.facts)
    missing = {fact: "not given" if fact.startswith("--") else UNKNOWN for fact in facts}
    rows = [(fact, *(run.facts.get(fact, missing[fact]) for run in runs)) for fact in facts]
    differing = [row for row in rows if len({*row[1:]}) > 1] or [("nothing", *[""] * len(runs))]
    of_runs, of_comparisons = [*map(_run_rows, runs)], [*map(_comparison_rows, comparisons)]
    return [
        ("What differs", names, differing),
        ("Test accuracy", names, [(key, *(each[key] for each in of_runs)) for key in of_runs[0]]),
        (
            f"Difference from {names[1]}",
            ["", *names[2:]],
            [(key, *(each[key] for each in of_comparisons)) for key in of_comparisons[0]],
        ),
    ]


def _run_rows(run: ComparedRun) -> dict[str, str]:
    accuracies, (step, last) = run.accuracies, run.steps
    interval = run.interval
    return {
        "test accuracy": describe_values(accuracies),
        "95 % interval": f"{interval.low:.4f} to {interval.high:.4f}" if interval else "none, of one seed",
        "seeds": " ".join(map(str, run.seeds)),
        "each seed": " ".join(f"{accuracy:.4f}" for accuracy in accuracies),
        "test images": f"{len(run.right[0]):,}",
        "steps": f"{step:,}" if step == last else f"{step:,} of {last:,}",
    }


def _comparison_rows(comparison: Comparison) -> dict[str, str]:
    _, _, test, difference, low, high, p_value, by_seed, needed = comparison
    return {
        "difference": "" if difference is None else f"{difference:+.5f}",
        "95 % interval": "none" if low is None else f"{low:+.5f} to {high:+.5f}",
        "p": "" if p_value is None else f"{p_value:.2g}",
        "test": test or "none",
        "of each seed": " ".join(f"{value:+.5f}" for value in (by_seed or {}).values()),
        "seeds to show half of it": "" if needed is None else f"{needed:,} of each run",
    }


def to_record(runs: Sequence[ComparedRun], comparisons: Sequence[Comparison], differing: Table) -> dict[str, Any]:
    """Return what `--json` prints."""
    records = []
    for run in runs:
        accuracies, (step, last_step) = run.accuracies, run.steps
        record = {"run": run.name, "step": step, "last_step": last_step, "test_images": len(run.right[0])}
        record |= {"test_set": run.test_set, "test_accuracies": dict(zip(run.seeds, accuracies, strict=True))}
        records.append(record | {"spread": run.interval and run.interval._asdict()})
    facts = {fact: values for fact, *values in differing[2] if any(values)}
    return {"runs": records, "differing": facts, "comparisons": [comparison._asdict() for comparison in comparisons]}


def write_page(file: Path, runs: Sequence[ComparedRun], tables: Sequence[Table], lines: Sequence[str]) -> None:
    """Write the page: sentences, tables, and the curves of the runs laid over each other."""
    drawn = [run for run in runs if run.metrics]
    kinds = sorted({run.metrics[-1].tested_on for run in drawn})
    names = [run.name + f" ({run.metrics[-1].tested_on})" * (len(kinds) > 1) for run in drawn]
    curves = {printable(name): run.metrics for name, run in zip(names, drawn, strict=True)}
    with tempfile.TemporaryDirectory() as place:
        pictures = []
        for field, label in {"cost": "cost", "accuracy": f"{' or '.join(kinds)} accuracy"}.items() if curves else ():
            file_of = Path(place) / f"{field}.png"
            plot_runs(curves, field, label, file_of)
            pictures.append(Picture(file_of, f"The {label} of each epoch: every seed, and the mean of each run."))
        page = render(
            "diff.html",
            title=", ".join(run.name for run in runs),
            subtitle=f"{len(runs)} runs compared{', each with the first' * (len(runs) > 2)}",
            lines=lines,
            tables=tables,
            pictures=pictures,
        )
    write_atomically(file, page)
