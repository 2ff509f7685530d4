"""A trained network, or several, as a function from volumes to class values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from pipeline.config import PredictOptions
from pipeline.errors import InputError
from pipeline.geometry import Grid
from pipeline.inference.attempts import Attempt, PlanMemory, plan_host_memory, run_attempts
from pipeline.inference.case_context import current_case
from pipeline.inference.ensemble import Ensemble, Member
from pipeline.inference.export_formats import OutputFormat
from pipeline.inference.native_scores import reduce_blocks
from pipeline.inference.outputs import LABEL_ONLY, OutputReducer, OutputRequest, Prediction
from pipeline.inference.postprocess import Step
from pipeline.inference.prediction_memory import PredictionMemory, plan_sweeps
from pipeline.inference.runs import load_runs
from pipeline.inference.window_threads import WindowThreads
from pipeline.inference.windows import SlidingWindow
from pipeline.io.volume import SourceGrid, Volume
from pipeline.log import get_logger
from pipeline.networks.precision import DeviceType, autocast, free_vram_bytes
from pipeline.plan import Plan, Precision
from pipeline.preprocessing.preprocess import PreparedImage, prepare_image
from pipeline.preprocessing.restore import NativeScores, Reducer, ScoreReducer
from pipeline.preprocessing.score_resampling import ScoreResampling

# The scores of a whole volume may take this share of a GPU's free memory; beyond it they are gathered on the host.
SCORES_SHARE = 0.5

AnyReducer = TypeVar("AnyReducer", bound=Reducer)


class Predictor:
    """Segments volumes as a plan says; load it once and use it for many, from several threads if need be.

    Of a single network logits are brought to the native grid, of several the mean of their probabilities. Several
    threads get the results of one; each plans its memory as if it were alone.

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
        members: The networks, each with its own window and mirrored axes; `from_runs` loads several.
        postprocessing: What is done to every segmentation.
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
        self.members: tuple[Member, ...] = (Member(self.network, plan.patch_size, self.tta_axes),)
        self.postprocessing: tuple[Step, ...] = ()

    @classmethod
    def from_runs(
        cls, run_dirs: Sequence[Path], options: PredictOptions | None = None, *, network: nn.Module | None = None
    ) -> Predictor:
        """Load one trained run, or several that are asked as one: the probabilities of their networks are averaged.

        Args:
            run_dirs: Run folders.
            options: How they are asked; None for the defaults, post-processing that was chosen for them included.
            network: A network of one's own that the runs were trained with; None builds the plans' U-Nets.

        Raises:
            InputError: See `load_runs`.
        """
        options = options or PredictOptions()
        runs = load_runs(run_dirs, options, network=network)
        predictor = cls(
            runs.members[0].network,
            runs.plan,
            device_type=runs.device_type,
            precision=runs.precision,
            overlap=options.overlap,
            tta_axes=runs.members[0].tta_axes,
            max_ram=options.max_ram_bytes,
        )
        predictor.members, predictor.postprocessing = runs.members, runs.postprocessing
        return predictor

    def predict(self, volume: Volume) -> Volume:
        """Segment one volume.

        Args:
            volume: (C, I, J, K) intensities in RAS order, as read; the plan's preparation is applied here.

        Returns:
            (1, I, J, K) class values on the volume's own grid, with its source.

        Raises:
            InputError: The number of channels is not the plan's, or the network gives no finite values.
        """
        return self.segment(self.prepare(volume), volume.grid, volume.source).label

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

    def segment(
        self,
        prepared: PreparedImage,
        grid: Grid,
        source: SourceGrid | None,
        files: Mapping[OutputFormat, Path] | None = None,
    ) -> Prediction:
        """The segmentation of a prepared image, post-processed, with whatever else is to be written of it.

        Args:
            prepared: The image.
            grid: Of the volume that it was made from.
            source: Of that volume.
            files: By format, as `write_outputs` takes them; None for the segmentation alone.

        Raises:
            InputError: The network gives no finite values, `max_ram` is not enough, the variance is asked of a single
                network, or the disk is full.
        """
        request = self.request_of(files or {})
        reduced = self.reduce(
            prepared, lambda: OutputReducer(prepared.native_grid.shape, self.plan, request), request=request
        )
        return reduced.finish(grid, source, self.postprocessing)

    def request_of(self, files: Mapping[OutputFormat, Path]) -> OutputRequest:
        """What is to be made of the scores for files by format."""
        return OutputRequest.of(files, gives_probabilities=len(self.members) > 1)

    def reduce(
        self,
        prepared: PreparedImage,
        make_reducer: Callable[[], AnyReducer],
        *,
        request: OutputRequest = LABEL_ONLY,
    ) -> AnyReducer:
        """Give the scores of a prepared image on its native grid, piece by piece, to a reducer.

        Where 16 bits overflow, or where memory runs out, the volume is computed once more, which the log says.

        Args:
            prepared: The image.
            make_reducer: Makes what takes the scores, once for every beginning.
            request: What the reducer makes of them beside the segmentation: for a variance it is given that as one
                more score behind the classes.

        Returns:
            The reducer that took all of them.

        Raises:
            InputError: The scores are not finite in float32 either, or `max_ram` is not enough.
        """
        native = NativeScores.of(
            prepared, self.plan, num_scores=self.plan.num_classes + request.variance, num_threads=self.num_threads
        )
        return self._reduce(torch.from_numpy(prepared.array), native, make_reducer, request)

    def plan_memory(
        self,
        resampling: ScoreResampling,
        window_batch: int | None = None,
        max_bytes: int | None = None,
        *,
        request: OutputRequest = LABEL_ONLY,
    ) -> PredictionMemory:
        """How a volume is predicted; without a bound the way that computes the fewest windows."""
        return plan_sweeps(
            resampling,
            self._ensemble(window_batch or self.window_batch, request).sweeps(),
            num_channels=self.plan.num_channels,
            num_buffered=request.num_buffered(self.plan.num_classes),
            max_bytes=max_bytes,
        )

    def _ensemble(self, window_batch: int, request: OutputRequest) -> Ensemble:
        return Ensemble(self.members, self.sliding(window_batch), with_variance=request.variance)

    def _reduce(
        self,
        image: Tensor,
        native: NativeScores,
        make_reducer: Callable[[], AnyReducer],
        request: OutputRequest = LABEL_ONLY,
    ) -> AnyReducer:
        plan_memory = partial(self.plan_memory, native.resampling, request=request)

        def run(attempt: Attempt) -> AnyReducer:
            reducer = make_reducer()
            current_case().begin(attempt.memory.num_windows)
            ensemble = self._ensemble(attempt.window_batch, request)
            stream = ensemble.stream(image.to(attempt.scores_device), attempt.memory)
            with autocast(attempt.precision, self.device_type):
                reduce_blocks(stream, native, attempt.memory, [reducer])
            return reducer

        return run_attempts(self._first_attempt(plan_memory, image, make_reducer().num_bytes), run, plan_memory)

    def predict_scores(self, image: Tensor) -> Tensor:
        """Scores (num_classes, I, J, K) in float32 on the CPU of a prepared image (C, I, J, K), all of them at once.

        They are logits of a single network, and the mean of the probabilities of several.

        Where 16 bits overflow, the volume is computed once more in float32, which the log says.

        Raises:
            InputError: The scores are not finite in float32 either.
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
