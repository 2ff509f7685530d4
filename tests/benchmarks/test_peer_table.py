"""The table and the figure against the peers say what the newest results hold, and what was not measured."""

from __future__ import annotations

import argparse
import json
import xml.etree.ElementTree as ElementTree

import pytest

GIB = 2**30


def make_cell(side, minutes, dice, *, mirrored=None, seed=0):
    predictions = {"none": {"dice": dice}} | ({"mirror": {"dice": mirrored}} if mirrored else {})
    times = {"minutes": minutes, "training_seconds": 57.0 * minutes}
    return {"side": side, "seed": seed, **times, "predictions": predictions}


CELLS = [
    *(make_cell("voxfit", 5, dice, mirrored=0.86, seed=seed) for seed, dice in enumerate((0.84, 0.85))),
    make_cell("voxfit", 10, 0.87),
    make_cell("nnunet", 5, 0.4, mirrored=0.41),
    make_cell("monai", 5, 0.3),
]


def took(wall, cpu, gib):
    return {"wall_seconds": wall, "cpu_seconds": cpu, "peak_bytes": gib * GIB}


def write(folder, name, date, **results):
    (folder / f"{name}-{date}.json").write_text(json.dumps({"date": date, **results}))


def test_nothing_measured_is_said_of_every_comparison(load, tmp_path):
    table = load("peers.table")
    lines = table.make_table(tmp_path)
    assert len(lines) == 2 + len(table.MAKERS)
    assert all(line.count("not measured") == 3 for line in lines[2:])
    assert not any(character.isdigit() for line in lines[2:] for character in line.split("|", 2)[2])


def test_dice_of_a_budget_is_the_mean_over_seeds_with_the_time_that_it_took(load, tmp_path):
    write(tmp_path, "accuracy", "2026-01-02", cells=CELLS)
    write(tmp_path, "accuracy", "2025-12-31", cells=[make_cell("voxfit", 5, 0.1)])
    lines = load("peers.table").make_table(tmp_path)
    source = "[2026-01-02](../scripts/benchmarks/results/accuracy-2026-01-02.json)"
    plain = "0.845 (0.840 to 0.850), took 4.8 min | 0.400, took 4.8 min | 0.300, took 4.8 min | +0.445"
    assert lines[2] == f"| Dice after 5 min of training | {plain} | {source} |"
    assert "| 0.410, took 4.8 min | not measured | +0.450 |" in lines[3]
    assert "| 0.870, took 9.5 min | not measured | not measured |  |" in lines[4]


def test_peers_trained_without_mirroring_have_rows_and_lines_of_their_own(load, tmp_path):
    cells = [*CELLS, make_cell("nnunet-unmirrored", 5, 0.5), make_cell("monai-unmirrored", 5, 0.6)]
    write(tmp_path, "accuracy", "2026-01-02", cells=cells)
    told = {line.split(" | ")[0]: line for line in load("peers.table").make_table(tmp_path)}
    row = told["| Dice after 5 min of training, peers trained without mirroring"]
    assert "0.845 (0.840 to 0.850), took 4.8 min | 0.500, took 4.8 min | 0.600, took 4.8 min | +0.345" in row
    assert "0.400, took 4.8 min | 0.300, took 4.8 min" in told["| Dice after 5 min of training"]
    figure = load("peers.figure")
    assert figure.points_of(cells, "monai-unmirrored") == [(4.75, 0.6)]
    assert set(figure.SIDES) == set(load("peers.accuracy").SIDES)
    assert set(load("peers.patches").SIDES) == set(load("peers.table").NAMES)


def test_the_recipe_for_long_trainings_stands_beside_the_same_peers_in_a_row_of_its_own(load, tmp_path):
    long, nnunet = make_cell("voxfit-long", 40, 0.9), make_cell("nnunet", 40, 0.7)
    usual = "| Dice after 40 min of training"
    longer = f"{usual}, voxfit by its recipe for long trainings"
    for cells, shown in (
        ([long, nnunet], {longer: ("0.900", "0.700")}),
        ([make_cell("voxfit", 40, 0.8), long, nnunet], {usual: ("0.800", "0.700"), longer: ("0.900", "0.700")}),
        ([nnunet], {usual: ("not measured", "0.700")}),
    ):
        write(tmp_path, "accuracy", "2026-01-02", cells=cells)
        lines = [line.split(" | ") for line in load("peers.table").make_table(tmp_path) if line.startswith(usual)]
        assert {line[0]: (line[1].split(",")[0], line[2].split(",")[0]) for line in lines} == shown


def test_results_on_a_second_dataset_have_rows_that_name_it(load, tmp_path):
    table, arguments = load("peers.table"), load("peers.arguments")
    name = arguments.results_name("accuracy", argparse.Namespace(tag="sts"))
    write(tmp_path, name, "2026-01-02", cells=[make_cell("voxfit", 10, 0.6)])
    lines = table.make_table(tmp_path)
    assert lines[2].startswith("| Dice at equal training time | not measured")
    assert lines[-1].startswith("| Sarcoma CT: Dice after 10 min of training | 0.600, took 9.5 min | not measured")
    assert arguments.results_name("accuracy", argparse.Namespace(tag="")) == "accuracy"


def test_ratios_are_medians_of_ratios_within_rounds(load, tmp_path):
    rounds = [
        {"voxfit": took(4, 6, 0.5), "nnunet": took(8, 24, 1.0)},
        {"voxfit": took(10, 6, 0.5), "nnunet": took(100, 24, 2.0)},
        {"voxfit": took(6, 6, 0.5), "nnunet": took(8, 24, 1.0)},
    ]
    ratios = load("peers.ratios").ratios_of(rounds)
    assert ratios["wall_seconds"] == {"median": 0.5, "range": [0.1, 0.75]}
    write(tmp_path, "preprocess", "2026-01-02", num_cases=195, ratios=ratios, rounds=rounds)
    text = "\n".join(load("peers.table").make_table(tmp_path))
    assert "| Plan and preprocess 195 cases, wall | 6.0 s | 8.0 s | not measured | 0.50 |" in text
    assert "| Plan and preprocess 195 cases, memory | 0.50 GiB | 1.00 GiB | not measured | 0.50 |" in text


def test_patches_and_memory_have_a_row_for_every_number_of_cases(load, tmp_path):
    made = {"voxfit": 300, "nnunet": 60, "monai": 90}
    rounds = [{side: {"cpu": 1.0, "wall": 2.0, "patches": patches} for side, patches in made.items()}]
    found = load("peers.patches").summarise(rounds, "cpu")
    assert found["patches_per_second"] == made
    assert found["times"]["nnunet"] == {"median": 5.0, "range": [5.0, 5.0]}
    memory = {side: {"now_bytes": size * GIB} for side, size in (("voxfit", 0.5), ("nnunet", 1), ("monai", 2))}
    write(tmp_path, "data-path", "2026-01-02", clock="cpu", rows=[{"num_cases": 50, "memory": memory, **found}])
    text = "\n".join(load("peers.table").make_table(tmp_path))
    assert "| Augmented patches per CPU second, one thread, 50 cases | 300 | 60 | 90 | 5.00 |" in text
    assert "| Memory of that process, 50 cases | 0.50 GiB | 1.00 GiB | 2.00 GiB | 0.50 |" in text


def test_a_step_and_a_prediction_have_their_rows(load, tmp_path):
    speeds = {"voxfit, plain": (200_000, 0.4), "nnU-Net": (80_000, 1.0), "MONAI DynUNet float32": (90_000, 0.9)}
    steps = [{"variant": name, "voxels_per_second": speed, "ratio": ratio} for name, (speed, ratio) in speeds.items()]
    write(tmp_path, "peers-step-batch7", "2026-01-02", settings={"batch_size": 7}, steps=steps)
    rounds = [{"voxfit": took(2, 1, 0.25), "nnunet": took(8, 10, 1)}]
    part = {"ratios": load("peers.ratios").ratios_of(rounds), "rounds": rounds}
    write(tmp_path, "predict", "2026-01-02", cases=65, mirrorings={"mirror": part})
    text = "\n".join(load("peers.table").make_table(tmp_path))
    assert "batch 7 (voxfit bf16, others float32) | 200 | 80 | 90 | 2.50 |" in text
    assert "| Predict 65 cases, mirrored, CPU | 1.0 s | 10.0 s | not measured | 0.10 |" in text


def test_the_step_command_asks_for_variants_that_there_are(load, tmp_path):
    training_step, step = load("peers.training_step"), load("step")
    plan = step.make_plan((4, 8, 12), "group", "plain")
    own = {variant.name for variant in step.make_variants(plan, ("rungs", "peers"))}
    assert set(training_step.VARIANTS) - own == {"nnU-Net", "nnU-Net, bf16"}


def test_the_figure_has_a_line_for_every_side_and_stays_small(load, tmp_path):
    figure = load("peers.figure")
    assert figure.points_of(CELLS, "voxfit") == [(pytest.approx(4.75), pytest.approx(0.86)), (9.5, 0.87)]
    assert figure.points_of(CELLS, "nnunet") == [(4.75, 0.41)]
    figure.draw_accuracy(CELLS, tmp_path / "accuracy.svg")
    figure.draw_accuracy(CELLS, tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.svg").stat().st_size < 100_000
    assert (tmp_path / "accuracy.png").stat().st_size < 100_000
    words = {
        text.text for text in ElementTree.parse(tmp_path / "accuracy.svg").iter("{http://www.w3.org/2000/svg}text")
    }
    assert {"voxfit", "nnU-Net", "MONAI"} <= words
