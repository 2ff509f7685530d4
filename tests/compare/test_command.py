"""`voxfit compare`: run folders as trainings leave them, whole, unfinished and damaged."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import wilcoxon

from pipeline.artifacts import read_artifact, write_artifact
from pipeline.cli import main
from pipeline.config import OptimConfig
from pipeline.durations import format_duration
from pipeline.errors import InputError
from pipeline.evaluation.comparison import MEAN_ROW, Comparison
from pipeline.plan import Rung
from pipeline.run_record import Counts, StepDown

CLASSES = ("outer", "inner")
CASES = tuple(f"case_{number:02}" for number in range(12))


# ---- what is found


def test_differences_are_paired_by_case_and_tested_as_scipy_does(write_run, make_dice, compare):
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


def test_more_runs_make_every_p_dearer(write_run, make_dice, compare):
    runs = [write_run(f"run_{n}", dice=make_dice(0.01 * n)) for n in range(4)]
    rows = [pair.metrics["dice"][0] for pair in compare(*runs).pairs]
    assert max(rows, key=lambda row: row.adjusted_p / row.p).adjusted_p == pytest.approx(3 * min(row.p for row in rows))
    alone = compare(runs[0], runs[1]).pairs[0].metrics["dice"][0]
    assert alone.p == rows[0].p
    assert alone.adjusted_p <= rows[0].adjusted_p


def test_patients_with_several_cases_count_once(write_run, make_dice, compare):
    cases = tuple(f"p{number // 2}_{number % 2}" for number in range(12))
    first, second = make_dice(cases=cases), make_dice(0.05, cases=cases)
    runs = [write_run(f"r{n}", dice=d, patient_pattern=r"(p\d+)") for n, d in enumerate((first, second))]
    pair = compare(*runs).pairs[0]
    assert pair.intervals is not None
    assert (pair.intervals.unit, pair.intervals.num_units) == ("patient", 6)
    assert pair.metrics["dice"][0].num_units == 6
    assert pair.metrics["dice"][0].p >= 2.0 ** (1 - 6)


@pytest.mark.parametrize("num_cases", [1, 2, 5, 6, 12])
def test_cases_too_few_to_decide_are_said_to_be_on_the_page_and_on_the_terminal(
    num_cases, write_run, make_dice, tmp_path, capsys
):
    runs = [write_run(name, dice=make_dice(shift, cases=CASES[:num_cases])) for name, shift in (("a", 0.0), ("b", 0.2))]
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "c.html")]) == 0
    # All of them differ one way, which is the most that so many can say.
    can_decide = wilcoxon(np.arange(1, num_cases + 1)).pvalue < 0.05
    said = f"Mind: {num_cases} {'case is' if num_cases == 1 else 'cases are'} too few to decide anything: "
    for text in (capsys.readouterr().out, (tmp_path / "c.html").read_text()):
        shown = " ".join(text.split())
        assert ("to decide anything" in shown, said in shown) == (not can_decide, not can_decide)
        assert (f"p cannot fall below {2.0 ** (1 - num_cases):.2g}" in shown) is not can_decide
        assert shown.count("too narrow") == (1 if 1 < num_cases < 6 or text.startswith("<") else 0)


def test_cases_without_a_difference_count_nothing_towards_a_decision(write_run, make_dice, compare, compare_to_page):
    first = make_dice()
    second = {case: dict(each) for case, each in first.items()}
    for case in CASES[:5]:
        second[case]["outer"] += 0.1
    runs = [write_run("a", dice=first), write_run("b", dice=second)]
    few = "too few of the 12 cases differ to decide anything: p cannot fall below 0.062"
    found, page = compare_to_page(*runs)
    assert found.pairs[0].doubt == few
    assert few in page
    second[CASES[5]]["outer"] += 0.1
    assert compare(runs[0], write_run("c", dice=second)).pairs[0].doubt == ""


def test_patients_are_what_must_be_enough_to_decide(write_run, make_dice, compare):
    cases = tuple(f"p{number // 3}_{number % 3}" for number in range(12))
    runs = [write_run(n, dice=make_dice(s, cases=cases), patient_pattern=r"(p\d+)") for n, s in (("a", 0), ("b", 0.2))]
    assert compare(*runs).pairs[0].doubt.startswith("4 patients are too few to decide anything")


def test_runs_of_other_folds_pair_the_cases_of_both_or_none(write_run, make_dice, compare):
    first = write_run("a", dice=make_dice(cases=CASES[:6]))
    overlapping = write_run("b", dice=make_dice(cases=CASES[4:]), fold=1)
    apart = write_run("c", dice=make_dice(cases=CASES[6:]), fold=2)
    some, none = compare(first, overlapping, apart).pairs
    assert (some.num_common, some.num_only_first, some.num_only_second) == (2, 4, 6)
    assert none.not_paired == "no case was scored by both (folds 0 and 2)"
    assert not none.metrics


def test_runs_of_other_datasets_show_curves_only_though_their_cases_have_the_same_names(
    write_run, make_dice, make_plan, compare
):
    other = make_plan(dataset_name="blocks")
    found = compare(write_run("a", dice=make_dice()), write_run("b", dice=make_dice(), plan=other))
    assert "other datasets (ellipsoids, blocks)" in found.pairs[0].not_paired
    assert not found.pairs[0].metrics
    assert len(found.runs[1].curves["train_loss"]) == 3


def test_the_same_name_for_data_that_was_measured_differently_is_warned_of(write_run, make_dice, make_plan, compare):
    other = make_plan(fingerprint_hash="1" * 16)
    found = compare(write_run("a", dice=make_dice()), write_run("b", dice=make_dice(), plan=other))
    assert "cases pair by name alone" in found.pairs[0].warning


def test_what_is_to_be_minded_of_a_pairing_is_said_on_the_terminal_as_well(
    write_run, make_dice, make_plan, tmp_path, capsys
):
    other = make_plan(fingerprint_hash="1" * 16)
    runs = [write_run("a", dice=make_dice()), write_run("b", dice=make_dice(), plan=other)]
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "c.html")]) == 0
    assert "Mind: their plans were made from different measurements" in " ".join(capsys.readouterr().out.split())


def test_runs_without_validation_and_unfinished_ones_are_shown_as_what_they_are(write_run, make_dice, compare_to_page):
    whole = write_run("whole", fold="all")
    begun = write_run("begun", is_finished=False, epochs=0)
    midway = write_run("midway", is_finished=False, epochs=2)
    found, page = compare_to_page(write_run("a", dice=make_dice()), whole, begun, midway)
    assert [run.state for run in found.runs] == ["finished", "finished", "not started", "not started"]
    assert [run.epoch for run in found.runs] == [3, 3, 0, 2]
    assert [pair.not_paired for pair in found.pairs] == [
        f"no scored cases in {n}" for n in ("whole", "begun", "midway")
    ]
    assert "2 runs are not finished" in page
    assert re.search(r"<b>midway</b>: not started, 2 of 3\s+epochs done", page)


def test_one_run_alone_is_shown_without_pairs(write_run, make_dice, compare):
    found = compare(write_run("a", dice=make_dice()))
    assert not found.pairs
    assert not found.different_settings
    assert found.means["a"]["dice"].num_cases == 12


def test_final_scores_are_taken_where_every_run_has_them_and_never_mixed_with_those_of_the_training(
    write_run, make_dice, write_final_scores, compare
):
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
    with pytest.raises(InputError, match=r"no final scores \(metrics\.json\): c"):
        compare(*runs, scores="final")


def test_nsd_at_two_tolerances_is_not_compared_and_said_to_be_two(write_run, make_dice, write_final_scores, compare):
    runs = [write_run(name, dice=make_dice()) for name in ("a", "b", "c")]
    for run, tolerance in zip(runs, (1.0, 2.5, 1.0), strict=True):
        write_final_scores(run, make_dice(), tolerance_mm=tolerance)
    found = compare(*runs)
    other, same = found.pairs
    assert set(other.metrics) == {"dice", "hd95_mm"}
    assert other.warning == "NSD is not compared, it was scored at 2.5 mm and 1 mm"
    assert set(same.metrics) == {"dice", "nsd", "hd95_mm"}
    assert same.warning == ""
    assert found.source_note.endswith("; NSD at 1 mm in a, 2.5 mm in b, 1 mm in c")
    # What was scored in training has no NSD to mind.
    assert compare(*runs[:2], scores="training").pairs[0].warning == ""


def test_only_settings_that_differ_are_listed_and_paths_are_none(write_run, make_plan, compare):
    wider = make_plan(network=replace(make_plan().network, features_per_stage=(8, 16)))
    first = write_run("a", optim=OptimConfig(lr=0.01))
    second = write_run("b", optim=OptimConfig(lr=0.02), plan=wider, record={"num_threads": 4})
    assert compare(first, second).different_settings == {
        "option.optim.lr": ("0.01", "0.02"),
        "plan.network.features_per_stage": ("[4, 8]", "[8, 16]"),
        "run.num_threads": ("1", "4"),
    }


def test_samples_count_the_first_batch_and_all_processes_and_hours_the_validations(write_run, compare):
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


def test_wall_time_is_the_record_s_and_is_said_to_be_unknown_where_it_was_not_counted(write_run, compare_to_page):
    runs = [write_run("a", record={"wall_seconds": 7384.0}), write_run("b")]
    found, page = compare_to_page(*runs)
    assert [run.wall_seconds for run in found.runs] == [7384.0, None]
    assert f'<td data-value="7384.0">{format_duration(7384.0)}</td>' in page


def test_runs_of_one_name_are_told_apart_by_the_shortest_end_of_their_paths(write_run, compare):
    runs = [write_run(f"{name}/fold_0") for name in ("big", "small")]
    assert [run.name for run in compare(*runs).runs] == ["big/fold_0", "small/fold_0"]


# ---- files


def test_json_beside_the_page_says_the_same_and_is_read_back(write_run, make_dice, tmp_path, capsys):
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
def test_a_folder_that_is_no_run_or_is_damaged_is_one_clear_line(
    write_run, make_dice, tmp_path, capsys, spoil, message
):
    runs = [write_run(name, dice=make_dice()) for name in ("a", "b")]
    spoil(runs[1])
    out = tmp_path / "c.html"
    kept = "<title>a page of before · voxfit compare</title>"
    out.write_text(kept)
    assert main(["compare", *map(str, runs), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert out.read_text() == kept


def test_a_run_given_twice_and_a_page_among_the_files_of_a_run_are_refused(
    write_run, make_dice, tmp_path, capsys, monkeypatch
):
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


def test_values_that_are_no_numbers_leave_gaps_and_never_break_the_json(
    write_run, make_dice, compare_to_page, tmp_path
):
    run = write_run("a", dice=make_dice())
    with (run / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    rows[1] |= {"train_loss": "inf", "lr": "?", "peak_ram_bytes": ""}
    with (run / "metrics.csv").open("w") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    compare_to_page(run, json=True)
    (found,) = read_artifact(tmp_path / "page" / "compare.json", Comparison).runs
    assert np.isnan([found.curves[key][1] for key in ("train_loss", "lr", "peak_ram_bytes")]).all()
    assert found.peak_ram_bytes == 2**30 + 3


def test_a_comparison_does_not_wait_for_torch(write_run, make_dice, tmp_path):
    run = write_run("a", dice=make_dice())
    code = (
        "import sys\nfrom pipeline.cli import main\n"
        f"code = main(['compare', {str(run)!r}, '--out', {str(tmp_path / 'c.html')!r}])\n"
        "print(code, sorted({'torch', 'monai', 'pytorch_lightning'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()[-1] == "0 []"


def test_neither_the_scores_of_a_run_nor_other_json_is_lost_to_a_comparison_of_its_name(
    write_run, make_dice, write_final_scores, tmp_path, capsys
):
    run = write_run("a", dice=make_dice())
    write_final_scores(run, make_dice())
    scores, plan = run / "validation" / "metrics.json", tmp_path / "plan.json"
    plan.write_bytes((run / "plan.json").read_bytes())
    before = {path: path.read_bytes() for path in (scores, plan)}
    assert main(["compare", str(run), "--out", str(scores.with_suffix(".html")), "--json"]) == 2
    assert "lies in a run folder" in capsys.readouterr().err
    assert main(["compare", str(run), "--out", str(plan.with_suffix(".html")), "--json"]) == 2
    assert "plan.json: is there already and is no comparison" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before
    assert not list(tmp_path.rglob("*.html"))
    # Without JSON nothing of that name is written, and what is a comparison gives way to the next.
    assert main(["compare", str(run), "--out", str(plan.with_suffix(".html"))]) == 0
    for _ in range(2):
        assert main(["compare", str(run), "--out", str(tmp_path / "c.html"), "--json"]) == 0
