"""The command line: every option from the dataclasses, every mistake one short message with exit code 2."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from pipeline import config as options
from pipeline.cli import COMMANDS, main, option_names, parse

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "configs").rglob("*.yaml"))
PREPROCESS = ["preprocess", "--dataset", "d", "--plan", "p", "--store", "s"]
TRAIN = ["train", "--plan", "p", "--store", "s", "--run_dir", "r"]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a command line that ends with code 2."""
    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code
    assert code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan"], "required: --dataset"),
        (["plan", "--dataset", "d", "--batch_sizes", "2"], "unknown option --batch_sizes (did you mean batch_size?)"),
        ([*TRAIN, "--optim.lrr", "3"], "unknown option --optim.lrr (did you mean optim.lr?)"),
        (["plan", "--dataset", "d", "--batch_size", "x"], "batch_size: expected int or 'auto', got x"),
        (["plan", "--dataset", "d", "--precision", "fp16"], "expected one of 'auto', 'bf16-mixed'"),
        (["plan", "--dataset", "d", "--patch_size", "8", "8"], "patch_size: expected three values of int or 'auto'"),
        ([*TRAIN, "--optim.lr", "-1"], "optim.lr: must be positive, got -1"),
        ([*TRAIN, "--fold", "7"], "fold: must be 0 to 4"),
        ([*PREPROCESS, "--shard", "4/3"], "shard: must be as in 3/16, counted from 1, got 4/3"),
        ([*PREPROCESS, "--shard", "third"], "shard: must be as in 3/16"),
        ([*PREPROCESS, "--shard", "1/2", "--verify"], "verify: looks at the whole store"),
        ([*TRAIN, "--max_time", "3x"], 'max_time: "3x" is no span of time'),
        ([*TRAIN, "--max_epochs", "auto"], "max_epochs: auto needs a max_time"),
        (["rum"], "invalid choice: 'rum'"),
        (["plan", "--dataset", "d", "--vram", "24GBs"], 'vram: "24GBs" is no amount of memory'),
        (["run", "--status"], "unknown option --status (there is a command `voxfit status`)"),
    ],
)
def test_a_wrong_option_is_one_short_message(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    text = refused(capsys, *arguments)
    assert message in text
    assert text.count("\n") <= 2


@pytest.mark.parametrize("joined", [False, True])
def test_a_flag_overrides_a_file_on_whichever_side_of_it_it_stands(tmp_path: Path, joined: bool) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("max_epochs: 12\nfold: 3\n")
    file = [f"--config={path}"] if joined else ["--config", str(path)]
    flags, needed = ["--max_epochs", "1"], ["--dataset", "d", "--work_dir", "w"]
    for arguments in ([*flags, *file, *needed], [*file, *needed, *flags], [*needed, *flags, *file]):
        config = parse(["run", *arguments])[1]
        assert (config.max_epochs, config.fold) == (1, 3)


def test_of_several_files_the_last_one_counts(tmp_path: Path) -> None:
    paths = [tmp_path / f"{epochs}.yaml" for epochs in (3, 5)]
    for path in paths:
        path.write_text(f"max_epochs: {path.stem}\n")
    words = [word for path in paths for word in ("--config", str(path), "--fold", "1")]
    assert parse(["run", "--dataset", "d", "--work_dir", "w", *words])[1].max_epochs == 5


def test_all_wrong_values_are_reported_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(capsys, "plan", "--dataset", "d", "--batch_size", "0", "--max_features", "4")
    assert "batch_size: must be at least 1" in text
    assert "max_features: 4 is below base_features 32" in text


def test_misspelt_yaml_keys_are_all_named_with_their_dotted_path(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("max_epoch: 3\ntrain:\n  optim:\n    lrr: 1.0\n")
    text = refused(capsys, "run", "--dataset", "d", "--work_dir", "w", "--config", str(path))
    assert "max_epoch (did you mean max_epochs?)" in text
    assert "train.optim.lrr (did you mean train.optim.lr?)" in text


def test_broken_yaml_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("a: [1,\n")
    assert "is not valid YAML" in refused(capsys, "run", "--dataset", "d", "--work_dir", "w", "--config", str(path))


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("max_epochs: 3\niterations_per_epoch: 7\noptim:\n  name: adamw\n")
    _, config = parse([*TRAIN, "--config", str(path), "--max_epochs", "5"])
    assert (config.max_epochs, config.iterations_per_epoch, config.optim.name) == (5, 7, "adamw")
    assert config.seed == 0


def test_switches_and_number_lists_are_typed_as_people_type_them() -> None:
    _, config = parse(["plan", "--dataset", "d", "--patch_size", "8", "16", "24", "--skip_bad_cases"])
    assert config.patch_size == (8, 16, 24)
    assert config.skip_bad_cases is True
    _, config = parse(["plan", "--dataset", "d", "--target_spacing", "1,1.5,3", "--skip_bad_cases", "false"])
    assert config.target_spacing == (1.0, 1.5, 3.0)
    assert config.skip_bad_cases is False


def test_epochs_may_follow_from_the_time() -> None:
    _, config = parse([*TRAIN, "--max_epochs", "auto", "--max_time", "2-03:00:00"])
    assert (config.max_epochs, config.max_time) == ("auto", "2-03:00:00")
    _, config = parse(["run", "--dataset", "d", "--work_dir", "w", "--max_epochs", "auto", "--train.max_time", "90"])
    assert (config.max_epochs, config.train.max_time) == ("auto", "90")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_is_loaded_by_the_command_in_its_header(path: Path) -> None:
    header = path.read_text().split("\n\n")[0]
    lines = [line.lstrip("# ").split() for line in header.splitlines() if f"--config configs/{path.name}" in line]
    assert lines, "the launch line is missing"
    words = lines[0][1:]
    words[words.index("--config") + 1] = str(path)
    name, config = parse(words)
    for key in yaml.safe_load(path.read_text()):
        assert key in {item.name for item in fields(config)}
    assert name in COMMANDS


def test_the_default_config_lists_every_option_at_its_default() -> None:
    path = next(path for path in CONFIGS if path.name == "train_default.yaml")
    _, from_yaml = parse([*TRAIN, "--config", str(path)])
    _, default = parse(TRAIN)
    assert from_yaml == default
    listed = set(yaml.safe_load(path.read_text())) | {"plan", "store", "run_dir"}
    assert listed == {item.name for item in fields(options.TrainConfig)}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for option in option_names(COMMANDS[name].config):
        assert option in text


def test_help_is_given_without_loading_torch() -> None:
    code = (
        "import sys\nfrom pipeline.cli import main\ntry:\n    main(['train', '--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'monai', 'pytorch_lightning', 'scipy', 'nibabel'} & set(sys.modules)))"
    )
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert output.strip().endswith("[]")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--run_dir", "R"], "R"),
        (["--run_dir", "R", "R 2", "it's: [3]"], ("R", "R 2", "it's: [3]")),
        (["--run_dir=R"], "R"),
        (["--run_dir", "12"], "12"),
        (["--run_dir", "1", "2", "c"], ("1", "2", "c")),
        (["--run_dir", "07", "1.50"], ("07", "1.50")),
        (["--run_dir", '["a", "b"]'], ("a", "b")),
    ],
)
def test_one_or_several_folders_are_typed_as_people_type_them(
    words: list[str], expected: str | tuple[str, ...], tmp_path: Path
) -> None:
    for arguments in (["--input", "i", *words, "--output", "o"], [*words, "--input", "i", "--output", "o"]):
        assert parse(["predict", *arguments])[1].run_dir == expected
    path = tmp_path / "a.yaml"
    path.write_text("run_dir: [fold_0, fold_1]\ntta_axes: [1]\ntta: mirror\n")
    config = parse(["predict", "--config", str(path), "--input", "i", "--output", "o"])[1]
    assert (config.run_dirs, config.tta_axes) == (("fold_0", "fold_1"), (1,))
    assert parse(["predict", "--config", str(path), *words, "--input", "i", "--output", "o"])[1].run_dir == expected


@pytest.mark.parametrize(
    ("words", "axes"), [(["0"], (0,)), (["0", "2"], (0, 2)), (["1,2"], (1, 2)), (["auto"], "auto")]
)
def test_axes_are_one_or_several_numbers(words: list[str], axes: tuple[int, ...] | str) -> None:
    paths = ["predict", "--run_dir", "r", "--input", "i", "--output", "o"]
    assert parse([*paths, "--tta", "mirror", "--tta_axes", *words])[1].tta_axes == axes
    assert parse([*TRAIN, "--augmentation.mirror_axes", *words])[1].augmentation.mirror_axes == axes
