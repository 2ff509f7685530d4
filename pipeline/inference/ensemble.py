"""Several networks as one: the mean of their probabilities, plane by plane, none of them ever being there whole.

Every network sweeps the volume for itself, along the same axis. Planes that all of them have finished are handed on,
and the networks that are furthest behind go on. Windows may have different sizes, as long as all see the same prepared
image.

Mirrored passes of one network are a mean of its logits, as they are without an ensemble; networks are a mean of softmax
probabilities, since the logits of different networks have no common scale. The mean is made on the prepared grid,
before it is resampled to the native one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.geometry import Shape3
from pipeline.inference.native_scores import Stream, stream_block
from pipeline.inference.planes import Planes, Scores
from pipeline.inference.prediction_bytes import Sweep
from pipeline.inference.prediction_memory import Block, PredictionMemory
from pipeline.inference.windows import SlidingWindow


@dataclass(frozen=True, eq=False)
class Member:
    """A network of a prediction.

    Attributes:
        network: Takes (B, C, *window) and gives logits (B, K, *window).
        window: Size of its windows in voxels.
        tta_axes: Axes to mirror.
    """

    network: nn.Module
    window: Shape3
    tta_axes: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Ensemble:
    """The networks of a prediction and how they go over a volume.

    Attributes:
        members: One or several.
        sliding: What they have in common; window and mirrored axes are each network's own.
        with_variance: Give the variance over networks and mirrored passes as one more score behind the classes, for
            which the planes of every mirrored pass are gathered by themselves.
    """

    members: Sequence[Member]
    sliding: SlidingWindow
    with_variance: bool = False

    @property
    def gives_probabilities(self) -> bool:
        """Whether scores are probabilities; those of a single network are its logits."""
        return len(self.members) > 1

    @property
    def num_scores(self) -> int:
        """Scores of a voxel."""
        return self.sliding.num_classes + self.with_variance

    def sweeps(self) -> list[Sweep]:
        """What is gathered side by side."""
        return [Sweep(sliding, member.network) for member in self.members for sliding in self._passes_of(member)]

    def stream(self, image: Tensor, memory: PredictionMemory) -> Stream:
        """The finished planes of a block of an image (C, I, J, K), as `reduce_blocks` takes them.

        Raises:
            NotFiniteError: While it is read: a network gives values that are not finite.
        """
        if not self.gives_probabilities:
            (member,) = self.members
            return partial(stream_block, member.network, image, self._passes_of(member)[0], memory)
        return partial(self._stream_all, image, memory)

    def _stream_all(self, image: Tensor, memory: PredictionMemory, block: Block) -> Iterator[Scores]:
        streams = [
            [stream_block(member.network, image, sliding, memory, block) for sliding in self._passes_of(member)]
            for member in self.members
        ]
        return merge_streams(streams, keep=memory.keep, with_variance=self.with_variance)

    def _passes_of(self, member: Member) -> list[SlidingWindow]:
        own = self.sliding.for_network(member.window, member.tta_axes)
        return own.passes if self.with_variance else [own]


def merge_streams(
    streams: Sequence[Sequence[Iterator[Planes]]], *, keep: int, with_variance: bool = False
) -> Iterator[MeanProbabilities]:
    """Planes that all networks have finished, as the mean of their probabilities.

    Args:
        streams: By network its mirrored passes, or the one stream that is their mean.
        keep: Planes that each of the streams hands on again with the next.
        with_variance: See `MeanProbabilities`.

    Yields:
        Planes in order, the last `keep` of those before again with them; of use until the next are asked for.
    """
    # Each is asked for more only when its planes are used up, for it then takes their memory again.
    held = [[next(stream) for stream in passes] for passes in streams]
    done = 0
    while True:
        finished = min(planes.stop for passes in held for planes in passes)
        yield MeanProbabilities(max(0, done - keep), finished, held, with_variance=with_variance)
        done = finished
        for passes, waiting in zip(held, streams, strict=True):
            for index, stream in enumerate(waiting):
                if passes[index].stop == done:
                    following = next(stream, None)
                    if following is None:
                        return
                    passes[index] = following


@dataclass(eq=False)
class MeanProbabilities:
    """Planes of several networks as the mean of their softmax probabilities.

    Of all classes only as many are there at a time as are taken; what normalises them is computed once and kept.

    Attributes:
        start, stop: The planes.
        passes: Planes by network and mirrored pass, which reach at least from `start` to `stop`.
        with_variance: Whether the variance is a score behind the last class: over networks and mirrored passes, the
            mean over classes.
    """

    start: int
    stop: int
    passes: Sequence[Sequence[Planes]]
    with_variance: bool = False
    _networks: list[_Softmax] = field(default_factory=list, init=False)

    @property
    def axis(self) -> int:
        """Along which the planes follow each other."""
        return self.passes[0][0].axis

    @property
    def num_classes(self) -> int:
        """Scores of a voxel: those of the classes, and the variance."""
        return self._classes + self.with_variance

    @property
    def _classes(self) -> int:
        return self.passes[0][0].num_classes

    def narrow(self, start: int, stop: int) -> MeanProbabilities:
        """Some of the planes; nothing is computed before it is taken."""
        return MeanProbabilities(start, stop, self.passes, self.with_variance)

    @torch.inference_mode()
    def take(self, classes: slice) -> Tensor:
        """Probabilities (n, i, j, k) of some classes in float32, the variance among them where it is asked for."""
        step = max(1, classes.stop - classes.start)
        if not self._networks:
            narrowed = [[each.narrow(self.start, self.stop) for each in passes] for passes in self.passes]
            self._networks = [_Softmax(passes, step) for passes in narrowed]
        of_classes = slice(classes.start, min(classes.stop, self._classes))
        mean = self._networks[0].take(of_classes)
        for network in self._networks[1:]:
            mean += network.take(of_classes)
        mean /= len(self._networks)
        return mean if classes.stop <= self._classes else torch.cat([mean, self._variance(step)[None]])

    def _variance(self, step: int) -> Tensor:
        """(i, j, k): over all passes, the mean over classes."""
        apart = [_Softmax([planes], step) for network in self._networks for planes in network.passes]
        total = torch.zeros_like(apart[0].take(slice(0, 1))[0])
        for classes in _chunks(self._classes, step):
            mean, spread = torch.zeros_like(total), torch.zeros_like(total)
            for count, one in enumerate(apart, start=1):
                # Welford's way: differences of squares would be lost in rounding.
                probabilities = one.take(classes)
                difference = probabilities - mean
                mean = mean + difference / count
                spread = spread + difference * (probabilities - mean)
            total += spread.sum(0)
        return total / (len(apart) * self._classes)


class _Softmax:
    """Probabilities of one network, some classes at a time.

    Args:
        passes: Planes of its mirrored passes, all of the same range; their logits are averaged.
        step: Classes at a time while that is computed which normalises them.
    """

    def __init__(self, passes: Sequence[Planes], step: int) -> None:
        self.passes = passes
        self._log_sum: Tensor | None = None
        for classes in _chunks(passes[0].num_classes, step):
            of_chunk = torch.logsumexp(self._logits(classes), dim=0)
            self._log_sum = of_chunk if self._log_sum is None else torch.logaddexp(self._log_sum, of_chunk)

    def take(self, classes: slice) -> Tensor:
        """(n, i, j, k) in float32, the caller's own."""
        assert self._log_sum is not None
        return (self._logits(classes) - self._log_sum).exp_()

    def _logits(self, classes: slice) -> Tensor:
        first, *others = self.passes
        logits = first.take(classes)
        for each in others:
            logits = logits + each.take(classes)
        return logits / len(self.passes) if others else logits


def _chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
