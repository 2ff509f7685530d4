"""The memory benchmarks: largest cubes are the largest, ratios are to nnU-Net, results say where they come from."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.losses import DiceCELoss
from torch import nn

from pipeline.plan import Execution
from pipeline.planning.executions import execution_families
from pipeline.planning.meter import StepMemory
from pipeline.sizes import GIB

MODULES = ("memory", "gpu_memory", "rungs", "run_facts", "step", "peers.dynunet", "peers.nnunet")


@pytest.fixture(scope="module")
def load(project_root):
    """Imports a module of `scripts/benchmarks` as when it is run: with its folder on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(project_root / "scripts" / "benchmarks")
        yield importlib.import_module
        for name in (*MODULES, "peers"):
            sys.modules.pop(name, None)


@settings(deadline=None)
@given(
    slope=st.floats(1, 2000),
    offset=st.floats(0, 1e9),
    bend=st.floats(0.8, 1.2),
    budget=st.integers(10**8, 10**12),
    first=st.lists(st.sampled_from((128, 192, 256, 512)), unique=True),
)
def test_the_largest_cube_fits_and_the_next_one_does_not(load, slope, offset, bend, budget, first):
    memory = load("memory")
    peaks = {edge: round(offset + slope * edge ** (3 * bend)) for edge in range(64, memory.LARGEST_EDGE + 1, 32)}
    asked = []

    def peak_bytes(edge):
        asked.append(edge)
        return peaks[edge]

    found = memory.largest_cube(peak_bytes, budget, {edge: peaks[edge] for edge in first})
    fitting = [edge for edge, peak in peaks.items() if peak <= budget]
    assert len(set(asked) - set(first)) == len(asked)
    if not fitting:
        assert found is None
    else:
        assert found[0] == max(fitting)
        assert found[0] ** 3 <= found[1] <= (found[0] + 32) ** 3


def test_voxels_that_fill_a_budget_are_exact_where_memory_is_a_straight_line_in_the_voxels(load):
    edge, voxels = load("memory").largest_cube(lambda edge: 500 + 100 * edge**3, 500 + 100 * 300**3, {})
    assert edge == 288
    assert voxels == pytest.approx(300**3)


def make_row(memory, step, num_classes, voxels):
    row = memory.Row(step, num_classes)
    row.memory[128, 128, 128] = StepMemory(3 * GIB, {"working": 3 * GIB}, pinned_bytes=GIB)
    row.largest[8] = voxels and (round(voxels ** (1 / 3)), float(voxels))
    return row


def test_ratios_are_to_nnunet_of_as_many_classes(load):
    memory = load("memory")
    rows = [
        make_row(memory, memory.REFERENCE, 3, 100**3),
        make_row(memory, "voxfit", 3, 200**3),
        make_row(memory, "voxfit, leaner", 3, None),
        make_row(memory, memory.REFERENCE, 118, 50**3),
        make_row(memory, "voxfit", 118, 200**3),
    ]
    assert memory.ratios(rows)["voxfit", 3, 8] == 8
    assert memory.ratios(rows)["voxfit", 118, 8] == 64
    text = "\n".join(memory.tables(rows))
    assert "| voxfit | 200^3 (64.0x) |" in text
    assert "| voxfit, leaner | below 64 |" in text
    assert "| voxfit | 3.0 + 1.0 h |" in text
    assert not memory.ratios([row for row in rows if row.step == "voxfit"])


def test_kinds_of_step_have_names_of_their_own_and_are_all_that_a_plan_may_choose(load):
    rungs = load("rungs")
    kinds = rungs.step_kinds(rungs.make_plan())
    assert len({kind.name for kind in kinds}) == len(set(kinds)) == len(kinds)
    families = execution_families(rungs.make_plan(), may_offload=True)
    assert {kind.execution for kind in kinds} == {execution for family in families for execution in family}
    assert kinds[0] == rungs.StepKind()


def test_a_row_holds_what_the_meter_says_of_that_step(load):
    memory, rungs = load("memory"), load("rungs")
    kind = rungs.StepKind(execution=Execution(recompute_stages=6))
    row = memory.run_job(memory.Job(kind.name, kind, 5, ((64, 32, 96),), (), "cuda", None))
    assert row.memory == {(64, 32, 96): rungs.meter_kind(kind, (64, 32, 96), 5)}
    (found,) = memory.as_json([row])["memory"]
    assert found["peak_bytes"] == sum(found["parts"].values()) == row.memory[64, 32, 96].peak_bytes
    assert found["voxels"] == 64 * 32 * 96


def test_monais_network_is_nnunets_in_size_and_its_loss_is_the_mean_over_its_outputs(load):
    dynunet = load("peers.dynunet")
    network = dynunet.make_dynunet(3, (4, 8, 12, 16, 20), deep_supervision=True)
    stack = network(torch.randn(1, 1, 16, 32, 48))
    # As many heads as ours has for five stages.
    assert stack.shape == (1, 3, 3, 16, 32, 48)
    assert sum(isinstance(module, nn.Conv3d) and module.kernel_size == (3, 3, 3) for module in network.modules()) == 18
    target = torch.randint(0, 3, (1, 16, 32, 48))
    one = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
    values = [one(stack[:, head], target[:, None]) for head in range(3)]
    expected = (values[0] + values[1] / 2 + values[2] / 4) / 1.75
    torch.testing.assert_close(dynunet.DynUNetLoss()(stack, target), expected)
    torch.testing.assert_close(dynunet.DynUNetLoss()(stack[:, 0], target), values[0])


def test_a_folder_that_is_no_environment_is_named(load, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"peers_environment\.sh"):
        load("peers.nnunet").NnunetWorker(tmp_path)


def test_an_environment_without_nnunet_ends_with_an_error(load, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    with load("peers.nnunet").NnunetWorker(tmp_path) as worker, pytest.raises(RuntimeError, match="worker ended"):
        worker.ask("versions")


def test_results_say_day_commit_versions_and_command(load, tmp_path):
    facts = load("run_facts")
    path = facts.write_results(tmp_path / "new", "memory", {"memory": [1]})
    found = json.loads(path.read_text())
    assert path.name == f"memory-{found['date']}.json"
    assert found["versions"]["torch"] == torch.__version__
    assert found["memory"] == [1]
    assert {"command", "commit", "machine"} <= set(found)
    assert facts.write_results(tmp_path / "here.json", "memory", {}) == tmp_path / "here.json"


def test_results_hold_the_command_without_folders_of_this_machine(load, tmp_path, monkeypatch):
    arguments = ["--peers", str(tmp_path / "peers"), "--quick", f"--out={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["scripts/benchmarks/memory.py", *arguments])
    command = load("run_facts").run_facts()["command"]
    assert command == "python scripts/benchmarks/memory.py --peers PEERS --quick --out=RESULTS"


def test_the_gpu_benchmark_says_that_it_needs_a_gpu(load, monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(sys, "argv", ["gpu_memory.py"])
    with pytest.raises(SystemExit) as ended:
        load("gpu_memory").main()
    assert ended.value.code == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_the_gpu_benchmark_compares_at_least_thirty_configurations_and_counts_low_predictions(load):
    gpu_memory = load("gpu_memory")
    assert len(set(gpu_memory.configurations())) >= 30
    common = {"fits": True, "metered_bytes": 10 * GIB, "predicted_bytes": 12 * GIB, "outside_bytes": GIB // 2}
    rows = [
        common | {"allocated_bytes": 10 * GIB, "reserved_bytes": 11 * GIB},
        common | {"allocated_bytes": 11 * GIB, "reserved_bytes": 12 * GIB},
        common | {"fits": False},
    ]
    found = gpu_memory.summarise(rows)
    assert (found["num_run"], found["num_out_of_memory"], found["num_predicted_too_low"]) == (2, 1, 1)
    assert found["reserved_to_metered"] == {"least": 1.1, "median": pytest.approx(1.15), "most": 1.2}
    assert gpu_memory.summarise(rows[2:]) == {"num_run": 0, "num_out_of_memory": 1}


@pytest.mark.parametrize("folder", ["peers", "scripts/../peers", None])
def test_the_peers_environment_is_never_made_in_the_checkout(project_root, folder):
    script = project_root / "scripts" / "benchmarks" / "peers_environment.sh"
    arguments = [] if folder is None else [project_root / folder]
    done = subprocess.run(["bash", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage" in done.stderr if folder is None else "lies in the checkout" in done.stderr
    assert not Path(project_root, "peers").exists()
