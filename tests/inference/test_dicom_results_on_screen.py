"""What `voxfit predict` shows of DICOM cases: which series a result or a failure belongs to, and nobody's name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.cli import main
from pipeline.datasets.case import Case, SeriesOrigin
from pipeline.datasets.series_origin import say_origin, with_origins
from pipeline.errors import CasesFailedError, InputError
from pipeline.inference.case_files import predict_files
from pipeline.inference.dicom_inputs import find_dicom_inputs
from pipeline.inference.predictor import Predictor
from pipeline.plan import ChannelPlan, Plan
from pipeline.synthetic_dicom import PlantedIdentity
from pipeline.synthetic_dicom.faults import drop_slice

SPACING = (1.5, 1.25, 3.0)
CT = ChannelPlan(name="CT", scheme="zscore")


class NoNumbers(nn.Module):
    """A network that fails on every volume."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.full((len(x), 3, *x.shape[2:]), torch.nan)


@pytest.fixture
def run_dir(make_plan: Callable[..., Plan], make_run: Callable[..., Path]) -> Path:
    return make_run(make_plan(spacing=SPACING, channels=(CT,)))


def predict(run_dir: Path, given: Path, output: Path, *options: str) -> int:
    words = ["--run_dir", str(run_dir), "--input", str(given), "--output", str(output)]
    return main(["predict", *words, "--accelerator", "cpu", "--num_threads", "1", *options])


def lines_about_cases(text: str) -> list[str]:
    """Lines of the log that begin with a case, without the time of day, in order of what they say."""
    return sorted(re.findall(r"^(?:\d\d:\d\d:\d\d| ) (case_.*)$", text, re.MULTILINE), key=lambda line: line[14:])


def test_each_result_names_its_series_folder_and_slices_in_one_line_and_again_when_it_is_kept(
    tmp_path: Path, run_dir: Path, write_study: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path / "in" / "head" / "T1", names=(), series_number=3, series_description="T1 post")
    write_study(tmp_path / "in" / "chest", seed=1, names=(), enhanced=True, shape=(14, 16, 12))
    for _ in range(2):
        assert predict(run_dir, tmp_path / "in", tmp_path / "out", "--format", "both") == 0
        lines = lines_about_cases(capsys.readouterr().err)
        keys = [line[5:13] for line in lines]
        assert lines == [
            f'case_{keys[0]}: series 1 "thorax" (CT, {keys[0]}; 12 slices in chest/image): '
            f"case_{keys[0]}.nii.gz, case_{keys[0]}.dcm",
            f'case_{keys[1]}: series 3 "T1 post" (CT, {keys[1]}; 10 slices in head/T1/image): '
            f"case_{keys[1]}.nii.gz, case_{keys[1]}.dcm",
        ]
        assert all((tmp_path / "out" / name).is_file() for line in lines for name in line.split("): ")[1].split(", "))


def test_the_series_of_all_channels_are_named(
    tmp_path: Path, make_plan: Any, make_run: Any, write_study: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = make_run(make_plan(spacing=SPACING, channels=(CT, ChannelPlan(name="PET", scheme="zscore"))))
    write_study(tmp_path / "in" / "a", names=())
    pet = {"modality": "PT", "is_signed": False, "shape": (9, 8, 10), "patient": "FAKE-0000"}
    write_study(tmp_path / "in" / "b", seed=50, study_seed=0, names=(), series_number=2, **pet)
    assert predict(run_dir, tmp_path / "in", tmp_path / "out") == 0
    line, _ = sorted(lines_about_cases(capsys.readouterr().err), key=lambda line: "resampled" in line)
    assert re.search(
        r'series 1 "thorax" \(CT, \w+; 10 slices in a/image\), series 2 "thorax" \(PT, \w+; \d+ slices', line
    )


def test_a_refused_series_is_named_with_its_folder_and_files(
    tmp_path: Path, run_dir: Path, write_study: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path / "in" / "a", names=())
    gap = write_study(tmp_path / "in" / "b", seed=1, names=(), series_number=5)
    drop_slice(gap.series.paths[0][4])
    assert predict(run_dir, tmp_path / "in", tmp_path / "out") == 3
    failed = next(line for line in lines_about_cases(capsys.readouterr().err) if "missing" in line)
    assert re.match(r'(case_(\w+)): series 5 "thorax" \(CT, \2; 9 files in b/image\): .*1 slice is missing', failed)
    assert failed.count("series 5") == 1
    assert predict(run_dir, tmp_path / "in" / "b", tmp_path / "alone") == 2
    assert re.search(r'error: series 5 "thorax" \(CT, \w+; 9 files in image\): .*missing', capsys.readouterr().err)


def test_what_fails_in_the_network_is_named_by_its_series_as_well(
    tmp_path: Path, make_plan: Callable[..., Plan], write_study: Any
) -> None:
    for seed, folder in enumerate("ab"):
        write_study(tmp_path / "in" / folder, seed=seed, names=(), series_number=seed + 1)
    cases = find_dicom_inputs(tmp_path / "in", tmp_path / "r", ["CT"])
    predictor = Predictor(NoNumbers(), make_plan(spacing=SPACING))
    with pytest.raises(CasesFailedError) as found:
        predict_files(predictor, cases, tmp_path / "out")
    for case in cases:
        folder = "ab"[int(found.value.failures[case.case_id][7]) - 1]
        assert f"10 slices in {folder}/image): " in found.value.failures[case.case_id]
        assert "finite" in found.value.failures[case.case_id]
    with pytest.raises(InputError, match=r'^series \d "thorax" \(CT, \w+; 10 slices in ./image\): .*finite'):
        predict_files(predictor, cases[:1], tmp_path / "out")


def test_cases_of_a_dataset_made_of_dicom_are_named_by_what_its_files_say(
    tmp_path: Path, run_dir: Path, write_study: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path / "in" / "head", series_number=3)
    dataset = tmp_path / "set" / "d.json"
    assert main(["inspect", str(tmp_path / "in"), "--write_dataset", str(dataset), "--num_workers", "1"]) == 0
    capsys.readouterr()
    assert predict(run_dir, dataset, tmp_path / "out") == 0
    (line,) = lines_about_cases(capsys.readouterr().err)
    assert re.fullmatch(r'(case_(\w+)): series 3 "thorax" \(CT, \2; 10 files in image\): \1\.nii\.gz', line)


def test_nothing_that_tells_the_patient_is_shown_of_description_and_folder(
    tmp_path: Path, run_dir: Path, write_study: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    eva = PlantedIdentity(patient_name="Müller^Eva", patient_id="P-99817")
    other = PlantedIdentity(patient_name="Zörbiger^Tom", patient_id="Q-55123")
    write_study(tmp_path / "in" / "Mueller_Eva" / "T1", names=(), identity=eva, series_description="T1 Eva MÜLLER")
    # Named after a patient whom only the other series tells.
    options = {"identity": other, "series_description": "as Müller"}
    write_study(tmp_path / "in" / "like Müller" / "Q55123", seed=1, names=(), **options)
    assert predict(run_dir, tmp_path / "in", tmp_path / "out") == 0
    text = capsys.readouterr().err.casefold()
    assert '"t1 *** ***" (ct' in text
    assert '"as ***" (ct' in text
    assert "slices in ***/t1/image" in text
    assert "slices in like ***/***/image" in text
    assert [word for word in ("müller", "mueller", "eva", "99817", "zörbiger", "55123") if word in text] == []


def test_of_nifti_files_nothing_is_said_beyond_their_names(
    tmp_path: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    nib.save(nib.Nifti1Image(np.zeros((12, 16, 8), np.float32), np.eye(4)), tmp_path / "in" / "case_a.nii.gz")
    assert predict(run_dir, tmp_path / "in", tmp_path / "out") == 0
    assert lines_about_cases(capsys.readouterr().err) == []


def test_a_message_without_a_series_gets_it_and_one_with_it_gets_the_rest() -> None:
    origin = SeriesOrigin(name='series 3 "T1" (MR, 4f2a)', place="9 slices in head")
    full = 'series 3 "T1" (MR, 4f2a; 9 slices in head)'
    assert say_origin("has no voxels", [origin]) == f"{full}: has no voxels"
    assert say_origin('series 3 "T1" (MR, 4f2a) holds 2 phases', [origin]) == f"{full} holds 2 phases"
    assert say_origin("has no voxels", []) == "has no voxels"


def test_cases_of_a_dataset_hide_whom_any_of_its_cases_shows(tmp_path: Path, write_study: Any) -> None:
    paths = []
    for seed, (name, number) in enumerate((("Müller^Eva", "P-99817"), ("Zörbiger^Tom", "Q-55123"))):
        identity = PlantedIdentity(patient_name=name, patient_id=number)
        options = {"identity": identity, "series_description": "as Müller 99817", "enhanced": True}
        paths.append(write_study(tmp_path / str(seed), seed=seed, names=(), **options).series.folder)
    paths[1] = paths[1].rename(paths[1].with_name("like P99817"))
    cases = [Case(case_id=str(number), images=(path,), label=None) for number, path in enumerate(paths)]
    (found,) = with_origins(cases[1:], cases)
    assert re.fullmatch(r'series 1 "as \*\*\* \*\*\*" \(CT, \w+; 1 file in like \*\*\*\)', str(found.origins[0]))
    assert "99817" in str(with_origins(cases[1:], cases[1:])[0].origins)


def test_a_series_whose_files_are_gone_has_no_name_and_raises_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.series.json").write_text('{"schema_version": 1, "files": ["gone.dcm"]}')
    (tmp_path / "empty").mkdir()
    paths = (tmp_path / "a.series.json", tmp_path / "empty", tmp_path / "b.series.json", tmp_path / "c.nii.gz")
    cases = [Case(case_id="a", images=paths, label=None)]
    assert with_origins(cases, cases) == tuple(cases)
