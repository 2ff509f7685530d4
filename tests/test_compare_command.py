"""`voxfit compare`: run folders as trainings leave them, whole, unfinished and damaged, and the page in a browser."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from scipy.stats import wilcoxon

from pipeline import api
from pipeline.artifacts import read_artifact, write_artifact
from pipeline.cli import main
from pipeline.compare_config import CompareConfig
from pipeline.config import TrainConfig
from pipeline.datasets.splits import Fold, Splits
from pipeline.durations import format_duration
from pipeline.errors import InputError
from pipeline.evaluation.comparison import MEAN_ROW, Comparison
from pipeline.evaluation.metrics import ClassScores
from pipeline.evaluation.summary import CaseScores, make_metrics, write_metrics
from pipeline.option_groups import OptimConfig
from pipeline.plan import ChannelPlan, MemoryPlan, NetworkPlan, Plan, Rung
from pipeline.training.metrics_table import MetricsTable
from pipeline.training.run_folder import Counts, RunFolder, RunRecord, StepDown

CLASSES = ("outer", "inner")
RNG = np.random.default_rng(7)
WriteRun = Callable[..., Path]
CHROMIUM = shutil.which("chromium")
CASES = tuple(f"case_{number:02}" for number in range(12))


def make_plan(**changes: Any) -> Plan:
    plan = Plan(
        dataset_name="ellipsoids",
        fingerprint_hash="0" * 16,
        channels=(ChannelPlan(name="T1", scheme="zscore"),),
        labels={"background": 0, "outer": 1, "inner": 2},
        target_spacing=(1.0, 1.0, 1.5),
        median_shape=(20, 14, 16),
        patch_size=(16, 8, 12),
        batch_size=2,
        accumulate_grad_batches=2,
        network=NetworkPlan(
            features_per_stage=(4, 8),
            strides=((1, 1, 1), (2, 2, 2)),
            kernel_sizes=((3, 3, 3), (3, 3, 3)),
            num_blocks_per_stage=(1, 1),
            num_groups=2,
        ),
        memory=MemoryPlan(budget_bytes=2**30, peak_bytes=1, overhead_bytes=0, parts={}),
    )
    return replace(plan, **changes)


def make_dice(shift: float = 0.0, cases: tuple[str, ...] = CASES, spread: float = 0.02) -> dict[str, dict[str, float]]:
    """Dice by case and class: a run that is better by `shift`, with noise of its own."""
    return {
        case: {name: 0.7 + 0.01 * n + shift + float(RNG.normal(0, spread)) for name in CLASSES}
        for n, case in enumerate(cases)
    }


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Write a run folder with the classes that trainings write theirs with."""

    def write(
        name: str,
        *,
        dice: Mapping[str, Mapping[str, float | None]] | None = None,
        plan: Plan | None = None,
        epochs: int = 3,
        loss: float = 1.0,
        is_finished: bool = True,
        record: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Path:
        folder, plan = RunFolder(tmp_path / name), plan or make_plan()
        config = TrainConfig(plan="p", store="s", run_dir=str(folder.path), **options)
        splits = Splits(seed=0, folds=(Fold(train=("x",), validation=CASES),))
        folder.begin(plan, splits, config)
        table = MetricsTable(folder.metrics, class_names=CLASSES)
        for epoch in range(1, epochs + 1):
            table.append(
                {
                    **{"epoch": epoch, "iteration": 10 * epoch, "optimizer_step": 5 * epoch, "seconds": 60.0},
                    **{
                        "data_wait_share": 0.1,
                        "peak_vram_bytes": 0,
                        "peak_ram_bytes": 2**30 + epoch,
                        "lr": 0.01 / epoch,
                    },
                    **{"train_loss": loss / epoch, "val_dice_mean": 0.2 * epoch if epoch % 2 else None},
                    **{f"val_dice_{name}": 0.2 * epoch if epoch % 2 else None for name in CLASSES},
                    **{"validation_seconds": 30.0 if epoch % 2 else None, "noise_scale": 3.0 * epoch},
                }
            )
        facts: dict[str, Any] = {
            **{"fold": options.get("fold", 0), "max_epochs": 3, "versions": {"torch": "2"}, "device": "cpu"},
            **{"precision": "32-true", "precision_reason": "", "num_threads": 1, "num_workers": 0, "batch_size": 2},
            **{"accumulate_grad_batches": 2, "num_parameters": 5, "status": "finished" if is_finished else "running"},
        }
        write_artifact(folder.record, RunRecord(**{**facts, "validation": dice or {}, **(record or {})}))
        return folder.path

    return write


def write_final_scores(run: Path, dice: Mapping[str, Mapping[str, float]]) -> None:
    rest = dict.fromkeys(("iou", "nsd", "assd_mm", "volume_error_ml", "relative_volume_error"), 0.5)
    volumes = {"prediction_ml": 1.0, "reference_ml": 1.0}
    scores = [
        CaseScores(
            case_id=case,
            classes={
                name: ClassScores(dice=value, hd95_mm=9 * (1 - value), **rest, **volumes)
                for name, value in each.items()
            },
        )
        for case, each in dice.items()
    ]
    labels = {name: index for index, name in enumerate(CLASSES, start=1)}
    write_metrics(run / "validation" / "metrics.json", make_metrics(scores, labels=labels, tolerance_mm=1, failures={}))


def compare(*runs: Path, **options: Any) -> Comparison:
    out = runs[0].parent / "page" / "compare.html"
    return api.compare(CompareConfig(runs=tuple(map(str, runs)), out=str(out), **options))


# ---- what is found


def test_differences_are_paired_by_case_and_tested_as_scipy_does(write_run):
    dice = [make_dice(), make_dice(0.03)]
    # A case that only one has, and a class that one case lacks.
    dice[0]["extra"] = {"outer": 0.1, "inner": 0.1}
    dice[1]["case_03"]["inner"] = None
    found = compare(write_run("a", dice=dice[0]), write_run("b", dice=dice[1]))
    (pair,) = found.pairs
    assert (pair.num_common, pair.num_only_first, pair.num_only_second) == (12, 1, 0)
    mean, outer, inner = pair.metrics["dice"]
    assert (mean.name, outer.name, inner.name) == (MEAN_ROW, *CLASSES)
    assert (mean.num_cases, outer.num_cases, inner.num_cases) == (12, 12, 11)
    changes = np.array([dice[1][case]["outer"] - dice[0][case]["outer"] for case in CASES])
    assert outer.difference == pytest.approx(changes.mean())
    assert outer.p == pytest.approx(wilcoxon(changes).pvalue)
    assert (outer.num_higher, outer.num_lower, outer.num_equal) == ((changes > 0).sum(), (changes < 0).sum(), 0)
    assert outer.interval.low < outer.difference < outer.interval.high
    averages = [
        np.nanmean([dice[1][c][k] - dice[0][c][k] for k in CLASSES if dice[1][c][k] is not None]) for c in CASES
    ]
    assert mean.difference == pytest.approx(np.mean(averages))
    # One mean row: nothing to pay for. Two classes: both pay.
    assert mean.adjusted_p == mean.p
    assert min(outer.adjusted_p, inner.adjusted_p) == pytest.approx(2 * min(outer.p, inner.p))


def test_more_runs_make_every_p_dearer(write_run):
    runs = [write_run(f"run_{n}", dice=make_dice(0.01 * n)) for n in range(4)]
    rows = [pair.metrics["dice"][0] for pair in compare(*runs).pairs]
    assert max(rows, key=lambda row: row.adjusted_p / row.p).adjusted_p == pytest.approx(3 * min(row.p for row in rows))
    alone = compare(runs[0], runs[1]).pairs[0].metrics["dice"][0]
    assert alone.p == rows[0].p
    assert alone.adjusted_p <= rows[0].adjusted_p


def test_patients_with_several_cases_count_once(write_run):
    cases = tuple(f"p{number // 2}_{number % 2}" for number in range(12))
    first, second = make_dice(cases=cases), make_dice(0.05, cases=cases)
    runs = [write_run(f"r{n}", dice=d, patient_pattern=r"(p\d+)") for n, d in enumerate((first, second))]
    pair = compare(*runs).pairs[0]
    assert pair.intervals is not None
    assert (pair.intervals.unit, pair.intervals.num_units) == ("patient", 6)
    assert pair.metrics["dice"][0].num_units == 6
    assert pair.metrics["dice"][0].p >= 2.0 ** (1 - 6)


def test_runs_of_other_folds_pair_the_cases_of_both_or_none(write_run):
    first = write_run("a", dice=make_dice(cases=CASES[:6]))
    overlapping = write_run("b", dice=make_dice(cases=CASES[4:]), fold=1)
    apart = write_run("c", dice=make_dice(cases=CASES[6:]), fold=2)
    some, none = compare(first, overlapping, apart).pairs
    assert (some.num_common, some.num_only_first, some.num_only_second) == (2, 4, 6)
    assert none.not_paired == "no case was scored by both (folds 0 and 2)"
    assert not none.metrics


def test_runs_of_other_datasets_show_curves_only_though_their_cases_have_the_same_names(write_run):
    other = make_plan(dataset_name="blocks")
    found = compare(write_run("a", dice=make_dice()), write_run("b", dice=make_dice(), plan=other))
    assert "other datasets (ellipsoids, blocks)" in found.pairs[0].not_paired
    assert not found.pairs[0].metrics
    assert len(found.runs[1].curves["train_loss"]) == 3


def test_the_same_name_for_data_that_was_measured_differently_is_warned_of(write_run):
    other = make_plan(fingerprint_hash="1" * 16)
    found = compare(write_run("a", dice=make_dice()), write_run("b", dice=make_dice(), plan=other))
    assert "cases pair by name alone" in found.pairs[0].warning


def test_runs_without_validation_and_unfinished_ones_are_shown_as_what_they_are(write_run):
    whole = write_run("whole", fold="all")
    begun = write_run("begun", is_finished=False, epochs=0)
    midway = write_run("midway", is_finished=False, epochs=2)
    found = compare(write_run("a", dice=make_dice()), whole, begun, midway)
    assert [run.state for run in found.runs] == ["finished", "finished", "not started", "not started"]
    assert [run.epoch for run in found.runs] == [3, 3, 0, 2]
    assert [pair.not_paired for pair in found.pairs] == [
        f"no scored cases in {n}" for n in ("whole", "begun", "midway")
    ]
    page = (midway.parent / "page" / "compare.html").read_text()
    assert "2 runs are not finished" in page
    assert re.search(r"<b>midway</b>: not started, 2 of 3\s+epochs done", page)


def test_one_run_alone_is_shown_without_pairs(write_run):
    found = compare(write_run("a", dice=make_dice()))
    assert not found.pairs
    assert not found.different_settings
    assert found.means["a"]["dice"].num_cases == 12


def test_final_scores_are_taken_where_every_run_has_them_and_never_mixed_with_those_of_the_training(write_run):
    runs = [write_run(name, dice=make_dice()) for name in ("a", "b", "c")]
    final = [make_dice(0.1), make_dice(0.2)]
    for run, dice in zip(runs, final, strict=False):
        write_final_scores(run, dice)
    found = compare(*runs[:2])
    assert found.source == "final"
    assert set(found.pairs[0].metrics) == {"dice", "nsd", "hd95_mm"}
    assert found.means["b"]["dice"].means["outer"] == pytest.approx(np.mean([d["outer"] for d in final[1].values()]))
    found = compare(*runs)
    assert found.source == "training"
    assert "final scores are missing in c" in found.source_note
    assert compare(*runs[:2], scores="training").source == "training"
    with pytest.raises(InputError, match=r"no validation/metrics\.json: c"):
        compare(*runs, scores="final")


def test_only_settings_that_differ_are_listed_and_paths_are_none(write_run):
    wider = make_plan(network=replace(make_plan().network, features_per_stage=(8, 16)))
    first = write_run("a", optim=OptimConfig(lr=0.01))
    second = write_run("b", optim=OptimConfig(lr=0.02), plan=wider, record={"num_threads": 4})
    assert compare(first, second).different_settings == {
        "option.optim.lr": ("0.01", "0.02"),
        "plan.network.features_per_stage": ("[4, 8]", "[8, 16]"),
        "run.num_threads": ("1", "4"),
    }


def test_samples_count_the_first_batch_and_all_processes_and_hours_the_validations(write_run):
    rung = Rung(patch_size=(16, 8, 12), batch_size=4, accumulate_grad_batches=1)
    lower = replace(rung, batch_size=2, accumulate_grad_batches=2)
    step = StepDown(
        **{"where": "backward", "counts": Counts(optimizer_step=7), "continued_from": Counts(), "fallback": 1},
        **{"from_rung": rung, "to_rung": lower},
    )
    run = write_run("a", record={"num_ranks": 3, "step_downs": (step,), "predicted_bytes": 10, "measured_bytes": 12})
    (found,) = compare(run).runs
    assert found.curves["samples"] == (120.0, 240.0, 360.0)
    assert found.curves["hours"] == pytest.approx((90 / 3600, 150 / 3600, 240 / 3600))
    assert (found.train_seconds, found.validation_seconds) == (180.0, 60.0)
    assert (found.peak_vram_bytes, found.peak_ram_bytes) == (None, 2**30 + 3)
    assert found.step_downs == ("in backward after optimiser step 7: batch size 4 to 2",)
    assert (found.best_epoch, found.best_dice) == (3, pytest.approx(0.6))


def test_wall_time_is_the_record_s_and_is_said_to_be_unknown_where_it_was_not_counted(write_run):
    runs = [write_run("a", record={"wall_seconds": 7384.0}), write_run("b")]
    assert [run.wall_seconds for run in compare(*runs).runs] == [7384.0, None]
    page = (runs[0].parent / "page" / "compare.html").read_text()
    assert f'<td data-value="7384.0">{format_duration(7384.0)}</td>' in page


def test_runs_of_one_name_are_told_apart_by_the_shortest_end_of_their_paths(write_run):
    runs = [write_run(f"{name}/fold_0") for name in ("big", "small")]
    assert [run.name for run in compare(*runs).runs] == ["big/fold_0", "small/fold_0"]


# ---- files


def test_json_beside_the_page_says_the_same_and_is_read_back(write_run, tmp_path, capsys):
    runs = [write_run(name, dice=make_dice()) for name in ("a", "b")]
    before = {path: path.read_bytes() for run in runs for path in run.rglob("*") if path.is_file()}
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "c.html"), "--json"]) == 0
    told = read_artifact(tmp_path / "c.json", Comparison)
    assert told.pairs[0].metrics["dice"][0].num_cases == 12
    assert json.loads((tmp_path / "c.json").read_text())["schema_version"] == 1
    assert "b against a: 12 common cases" in " ".join(capsys.readouterr().out.split())
    assert {path: path.read_bytes() for run in runs for path in run.rglob("*") if path.is_file()} == before
    again = tmp_path / "again.html"
    main(["compare", *map(str, runs), "--out", str(again)])
    assert again.read_bytes() == (tmp_path / "c.html").read_bytes()
    assert not again.with_suffix(".json").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: shutil.rmtree(run), "holds no run"),
        (lambda run: (run / "run.json").unlink(), "holds no run"),
        (lambda run: (run / "run.json").write_text("{"), "run.json: is not valid JSON"),
        (lambda run: (run / "plan.json").unlink(), "plan.json: cannot be read"),
        (lambda run: (run / "config.yaml").write_text("[1,"), "config.yaml: cannot be read"),
        (lambda run: (run / "config.yaml").write_text("words"), "config.yaml: holds no options"),
        (lambda run: (run / "metrics.csv").write_bytes(b"\xff\xfe\x00"), "metrics.csv: cannot be read"),
        (lambda run: (run / "metrics.csv").write_text("a,b\n1,2\n"), "metrics.csv: has no column `epoch`"),
        (lambda run: write_artifact(run / "validation" / "metrics.json", {"schema_version": 9}), "schema version 9"),
    ],
)
def test_a_folder_that_is_no_run_or_is_damaged_is_one_clear_line(write_run, tmp_path, capsys, spoil, message):
    runs = [write_run(name, dice=make_dice()) for name in ("a", "b")]
    spoil(runs[1])
    out = tmp_path / "c.html"
    out.write_text("kept")
    assert main(["compare", *map(str, runs), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert out.read_text() == "kept"


def test_a_run_given_twice_and_a_page_among_the_files_of_a_run_are_refused(write_run, tmp_path, capsys, monkeypatch):
    run = write_run("a", dice=make_dice())
    monkeypatch.chdir(tmp_path)
    assert main(["compare", str(run), "a/../a", "--out", "c.html"]) == 2
    assert "is given twice" in capsys.readouterr().err
    record = (run / "run.json").read_bytes()
    assert main(["compare", str(run), "--out", str(run / "run.html"), "--json"]) == 2
    assert "lies in a run folder" in capsys.readouterr().err
    assert (run / "run.json").read_bytes() == record
    assert main(["compare", str(run), "--out", "c.json"]) == 2
    assert "out: must end in .html" in capsys.readouterr().err


def test_values_that_are_no_numbers_leave_gaps_and_never_break_the_json(write_run, tmp_path):
    run = write_run("a", dice=make_dice())
    with (run / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    rows[1] |= {"train_loss": "inf", "lr": "?", "peak_ram_bytes": ""}
    with (run / "metrics.csv").open("w") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    compare(run, json=True)
    (found,) = read_artifact(tmp_path / "page" / "compare.json", Comparison).runs
    assert np.isnan([found.curves[key][1] for key in ("train_loss", "lr", "peak_ram_bytes")]).all()
    assert found.peak_ram_bytes == 2**30 + 3


def test_a_comparison_does_not_wait_for_torch(write_run, tmp_path):
    run = write_run("a", dice=make_dice())
    code = (
        "import sys\nfrom pipeline.cli import main\n"
        f"code = main(['compare', {str(run)!r}, '--out', {str(tmp_path / 'c.html')!r}])\n"
        "print(code, sorted({'torch', 'monai', 'pytorch_lightning'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()[-1] == "0 []"


# ---- the page


class Addresses(HTMLParser):
    """What a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("link", "iframe", "object", "embed")
        self.found += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "action")]


@pytest.fixture
def page(write_run, tmp_path) -> Path:
    """Three runs, one of which never finished, with a name that a page must escape."""
    runs = [write_run("<b>first", dice=make_dice(), loss=2.0), write_run("second", dice=make_dice(0.05))]
    for run, shift in zip(runs, (0.0, 0.05), strict=True):
        write_final_scores(run, make_dice(shift))
    third = write_run("third", is_finished=False, epochs=2, loss=0.5)
    out = tmp_path / "compare.html"
    api.compare(CompareConfig(runs=tuple(map(str, [*runs, third])), out=str(out)))
    return out


def test_the_page_fetches_nothing_and_escapes_names(page):
    addresses = Addresses()
    addresses.feed(page.read_text())
    assert len(addresses.found) >= 5
    assert all(address.startswith("data:image/svg+xml;base64,") for address in addresses.found)
    assert "<b>first" not in page.read_text()
    assert "&lt;b&gt;first" in page.read_text()


PROBE = """<script>
const shown = (node) => node.getClientRects().length > 0;
const press = (text, root) => [...root.querySelectorAll("button")].find((b) => b.textContent === text).click();
const rows = (id) => [...document.getElementById(id).tBodies[0].rows];
const column = (id, index) => rows(id).map((row) => row.cells[index].textContent.trim());
const runColours = [...document.querySelectorAll("#runs .swatch")].map(
  (swatch) => getComputedStyle(swatch).backgroundColor.match(/\\d+/g).map(Number));
// How many pixels of a picture have the colour of each run, more or less.
const colours = (image) => {
  const [width, height] = [image.naturalWidth, image.naturalHeight];
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, width, height).data, counts = runColours.map(() => 0);
  for (let i = 0; i < pixels.length; i += 4) {
    runColours.forEach((rgb, run) => {
      counts[run] += pixels[i + 3] > 128 && rgb.every((value, k) => Math.abs(value - pixels[i + k]) < 12);
    });
  }
  return counts;
};
addEventListener("load", () => {
  const told = { errors: window.faults, axes: [], pictures: [], before: column("cases", 2) };
  for (const name of ["epochs", "optimiser steps", "samples", "time"]) {
    press(name, document.querySelector("[data-group=axis]"));
    const images = [...document.querySelectorAll("img[data-group=axis]")].filter(shown);
    told.axes.push(images.map((image) => image.dataset.name));
    told.pictures.push(...images.map(colours));
  }
  told.differences = [...document.querySelectorAll("figure img")].filter(shown).map(colours);
  press("second", document.getElementById("cases"));
  told.rising = column("cases", 3);
  press("second", document.getElementById("cases"));
  told.falling = column("cases", 3);
  press("run", document.getElementById("runs"));
  told.runs = column("runs", 0);
  document.body.insertAdjacentHTML("beforeend", "<pre id=told></pre>");
  document.getElementById("told").textContent = JSON.stringify(told);
});
</script></body>"""
LISTEN = """<head><script>window.faults = [];
addEventListener("error", (event) => window.faults.push(event.message));
document.addEventListener("securitypolicyviolation", (event) => window.faults.push(event.violatedDirective));
</script>"""


def browse(page: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a page in a browser without a screen, that logs what the page's console says."""
    assert CHROMIUM is not None
    common = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [CHROMIUM, *common, profile, "--virtual-time-budget=5000", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
def test_a_browser_shows_plots_sorts_tables_and_reports_no_error(page, tmp_path):
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("<head>", LISTEN, 1).replace("</body>", PROBE, 1))
    done = browse(probed, tmp_path, "--dump-dom")
    assert "CONSOLE" not in done.stderr, done.stderr
    told = json.loads(unescape(re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)[1]))
    assert told["errors"] == []
    assert told["axes"] == [["epoch"], ["optimizer_step"], ["samples"], ["hours"]]
    # The third run's curves are short: it has two epochs.
    assert (np.min(told["pictures"], axis=0) > [100, 100, 40]).all(), told["pictures"]
    assert np.shape(told["pictures"]) == (4, 3)
    ((none, points, other),) = told["differences"]
    assert points > 20
    assert (none, other) == (0, 0)
    values = [float(text) for text in told["rising"] if text != "–"]
    assert values == sorted(values) != [float(text) for text in told["before"] if text != "–"]
    assert told["falling"] == told["rising"][::-1]
    assert told["runs"] == ["<b>first", "second", "third"]


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
def test_the_picture_of_the_page_has_the_colours_of_all_runs(page, tmp_path):
    shot = tmp_path / "page.png"
    done = browse(page, tmp_path, "--window-size=1280,2400", f"--screenshot={shot}")
    assert "CONSOLE" not in done.stderr, done.stderr
    picture = (255 * imread(shot)[..., :3]).round().astype(int)
    assert picture.shape[:2] == (2400, 1280)
    curves = picture[500:1500].reshape(-1, 3)
    for color in ("#56b4e9", "#e69f00", "#009e73"):
        rgb = [int(color[index : index + 2], 16) for index in (1, 3, 5)]
        assert (np.abs(curves - rgb).max(axis=1) < 8).sum() > 50, color
