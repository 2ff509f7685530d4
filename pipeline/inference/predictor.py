"""A trained network as a function from volumes to class values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.allocation import allotted_cpus
from pipeline.errors import InputError
from pipeline.inference.attempts import Attempt, PlanMemory, plan_host_memory, run_attempts
from pipeline.inference.case_context import current_case
from pipeline.inference.loading import (
    as_trained,
    find_checkpoint,
    load_weights,
    read_mirror_axes,
    read_plan,
    read_precision,
)
from pipeline.inference.native_scores import reduce_blocks, stream_block
from pipeline.inference.prediction_memory import PredictionMemory, plan_prediction_memory
from pipeline.inference.window_outputs import num_features
from pipeline.inference.window_threads import WindowThreads
from pipeline.inference.windows import SlidingWindow
from pipeline.io.volume import Volume
from pipeline.log import get_logger
from pipeline.networks.precision import DeviceType, autocast, choose_device_type, choose_precision, free_vram_bytes
from pipeline.networks.unet import UNet
from pipeline.networks.weights import read_weights
from pipeline.plan import Plan, Precision
from pipeline.preprocessing.preprocess import PreparedImage, prepare_image
from pipeline.preprocessing.restore import LabelReducer, NativeScores, Reducer, ScoreReducer
from pipeline.preprocessing.score_resampling import ScoreResampling

# The scores of a whole volume may take this share of a GPU's free memory; beyond it they are gathered on the host.
SCORES_SHARE = 0.5

AnyReducer = TypeVar("AnyReducer", bound=Reducer)


class Predictor:
    """Segments volumes as a plan says; load it once and use it for many.

    Args:
        network: Takes (B, C, *patch_size) and gives logits (B, K, *patch_size) in evaluation mode, which it is put in.
        plan: How images are prepared, and what the classes mean. The window is the plan's patch.
        device_type: Where the network runs.
        precision: What it computes in.
        overlap: Least share of a window that its neighbour covers as well.
        tta_axes: Axes to mirror; logits are averaged.
        window_batch: Windows that go through the network at once.
        max_ram: Most bytes that the process may hold in host memory while it predicts; None takes a share of the
            memory that the job was allotted.

    Attributes:
        threads: That compute windows side by side, see `set_window_batch`.
        num_threads: Of everything else that is done side by side.
        skip_air, count_seams: See `SlidingWindow`.
    """

    threads: WindowThreads | None = None
    num_threads = 1
    skip_air = False
    count_seams = False
    _said = ""

    def __init__(
        self,
        network: nn.Module,
        plan: Plan,
        *,
        device_type: DeviceType = "cpu",
        precision: Precision = "32-true",
        overlap: float = 0.5,
        tta_axes: Sequence[int] = (),
        window_batch: int = 1,
        max_ram: int | None = None,
    ) -> None:
        self.network = network.eval().to(device_type)
        self.plan, self.device_type, self.precision = plan, device_type, precision
        self.overlap, self.tta_axes = overlap, tuple(tta_axes)
        self.window_batch, self.max_ram = window_batch, max_ram

    @classmethod
    def from_run(
        cls,
        run_dir: Path,
        *,
        checkpoint: Literal["best", "last"] = "best",
        accelerator: Literal["auto", "cpu", "gpu"] = "auto",
        num_threads: int | Literal["auto"] = "auto",
        overlap: float = 0.5,
        tta: Literal["none", "mirror"] = "none",
        network: nn.Module | None = None,
        max_ram: int | None = None,
    ) -> Predictor:
        """Load a trained run.

        Args:
            run_dir: The run folder: `plan.json`, `checkpoints/`, and for mirroring `config.yaml`.
            checkpoint: Which weights; averaged (EMA) ones where the checkpoint has them.
            accelerator: "auto" takes a GPU where there is one.
            num_threads: Of the network on a CPU, for the whole process; "auto" takes the allotted CPUs.
            overlap: Least share of a window that its neighbour covers as well.
            tta: "mirror" averages over all combinations of the axes that training mirrored.
            network: A network of one's own that the run was trained with; None builds the plan's U-Net.
            max_ram: Most bytes that the process may hold in host memory; None takes a share of the allotted memory.

        Raises:
            InputError: The run has no plan or no such checkpoint, the weights are another network's, there is no GPU,
                or mirroring is asked of a run that was trained without.
        """
        plan = as_trained(read_plan(run_dir), run_dir)
        weights = read_weights(find_checkpoint(run_dir, checkpoint))
        device_type = choose_device_type(accelerator)
        network = network if network is not None else _make_network(plan)
        load_weights(network, weights, where=run_dir)
        choice = choose_precision(read_precision(run_dir) or plan.precision, device_type=device_type)
        if device_type == "cpu":
            torch.set_num_threads(allotted_cpus() if num_threads == "auto" else num_threads)
        get_logger("predict").info("network on %s in %s (%s)", device_type, *choice)
        axes = read_mirror_axes(run_dir) if tta == "mirror" else ()
        return cls(
            network,
            plan,
            device_type=device_type,
            precision=choice.precision,
            overlap=overlap,
            tta_axes=axes,
            max_ram=max_ram,
        )

    def predict(self, volume: Volume) -> Volume:
        """Segment one volume.

        Args:
            volume: (C, I, J, K) intensities in RAS order, as read; the plan's preparation is applied here.

        Returns:
            (1, I, J, K) class values on the volume's own grid, with its source.

        Raises:
            InputError: The number of channels is not the plan's, or the network gives no finite values.
        """
        return Volume(self.segment(self.prepare(volume))[None], volume.grid, volume.source)

    def prepare(self, volume: Volume) -> PreparedImage:
        """The volume as the network takes it.

        Raises:
            InputError: The number of channels is not the plan's, or voxels are not finite.
        """
        if volume.num_channels != self.plan.num_channels:
            names = ", ".join(channel.name for channel in self.plan.channels)
            raise InputError(
                f"has {volume.num_channels} channel(s), the network takes {self.plan.num_channels} ({names})",
                where=volume.source.path if volume.source else "",
                fix="Give one file per channel (_0000, _0001, ...) or one file with all of them as fourth axis",
            )
        return prepare_image(volume, self.plan)

    def segment(self, prepared: PreparedImage) -> NDArray[Any]:
        """Class values (I, J, K) of a prepared image on its native grid.

        Raises:
            InputError: The network gives no finite values, or `max_ram` is not enough.
        """
        return self.reduce(prepared, lambda: LabelReducer(prepared.native_grid.shape, self.plan)).label

    def reduce(self, prepared: PreparedImage, make_reducer: Callable[[], AnyReducer]) -> AnyReducer:
        """Give the scores of a prepared image on its native grid, piece by piece, to a reducer.

        Where 16 bits overflow, or where memory runs out, the volume is computed once more, which the log says.

        Args:
            prepared: The image.
            make_reducer: Makes what takes the scores, once for every beginning.

        Returns:
            The reducer that took all of them.

        Raises:
            InputError: The logits are not finite in float32 either, or `max_ram` is not enough.
        """
        native = NativeScores.of(prepared, self.plan, num_threads=self.num_threads)
        return self._reduce(torch.from_numpy(prepared.array), native, make_reducer)

    def plan_memory(
        self, resampling: ScoreResampling, window_batch: int | None = None, max_bytes: int | None = None
    ) -> PredictionMemory:
        """How a volume is predicted; without a bound the way that computes the fewest windows."""
        return plan_prediction_memory(
            resampling,
            self.sliding(window_batch or self.window_batch),
            num_channels=self.plan.num_channels,
            num_features=num_features(self.network),
            max_bytes=max_bytes,
        )

    def _reduce(self, image: Tensor, native: NativeScores, make_reducer: Callable[[], AnyReducer]) -> AnyReducer:
        plan_memory = partial(self.plan_memory, native.resampling)

        def run(attempt: Attempt) -> AnyReducer:
            reducer = make_reducer()
            current_case().begin(attempt.memory.num_windows)
            placed, sliding = image.to(attempt.scores_device), self.sliding(attempt.window_batch)
            stream = partial(stream_block, self.network, placed, sliding, attempt.memory)
            with autocast(attempt.precision, self.device_type):
                reduce_blocks(stream, native, attempt.memory, [reducer])
            return reducer

        return run_attempts(self._first_attempt(plan_memory, image, make_reducer().num_bytes), run, plan_memory)

    def predict_scores(self, image: Tensor) -> Tensor:
        """Logits (num_classes, I, J, K) in float32 on the CPU of a prepared image (C, I, J, K), all of them at once.

        Where 16 bits overflow, the volume is computed once more in float32, which the log says.

        Raises:
            InputError: The logits are not finite in float32 either.
        """
        shape, num_classes = (image.shape[1], image.shape[2], image.shape[3]), self.plan.num_classes
        unchanged = NativeScores(ScoreResampling(shape, shape), (0, 0, 0), num_classes)
        reduced = self._reduce(image, unchanged, lambda: ScoreReducer(shape, num_classes))
        return torch.from_numpy(reduced.scores)

    def sliding(self, window_batch: int) -> SlidingWindow:
        """The windows, so many of them at once."""
        return SlidingWindow(
            window=self.plan.patch_size,
            num_classes=self.plan.num_classes,
            overlap=self.overlap,
            tta_axes=self.tta_axes,
            window_batch=window_batch,
            device=self.device_type,
            threads=self.threads,
            skip_air=self.skip_air,
            count_seams=self.count_seams,
        )

    def _first_attempt(self, plan_memory: PlanMemory, image: Tensor, result_bytes: int) -> Attempt:
        """Scores are gathered on the GPU while that takes no more windows and a share of its free memory."""
        memory, device = plan_memory(self.window_batch, None), "cpu"
        image_bytes = 4 * image.numel()
        if self.device_type == "cuda" and memory.num_bytes + image_bytes < SCORES_SHARE * free_vram_bytes():
            device = "cuda"
        else:
            memory = plan_host_memory(
                plan_memory, window_batch=self.window_batch, max_ram=self.max_ram, result_bytes=result_bytes
            )
        self._say(f"on {device}, {memory.describe()}")
        return Attempt(precision=self.precision, scores_device=device, window_batch=self.window_batch, memory=memory)

    def _say(self, how: str) -> None:
        """Log how a volume is computed, unless the last one was as well."""
        if how != self._said:
            self._said = how
            get_logger("predict").info("%s", how)


def _make_network(plan: Plan) -> UNet:
    """The plan's U-Net; windows of the size of its patch fit where the training step did."""
    return UNet(
        plan.num_channels,
        plan.num_classes,
        plan.network,
        slab_stages=plan.slab_stages,
        offload_stages=plan.offload_stages,
    )
