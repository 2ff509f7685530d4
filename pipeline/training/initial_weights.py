"""A training that begins with the weights of another run: matched by name and shape, listed, and partly frozen.

Taken is what has a name and a shape in both networks. Two things may be others and then begin anew: the heads, with
another number of classes or of deep-supervision levels, and the convolution that reads the image, with another number
of channels. Everything else that does not fit is an error: a network that is half another's learns from neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from pipeline.config import TrainOptions
from pipeline.errors import InputError
from pipeline.log import get_logger
from pipeline.networks.unet import UNet
from pipeline.plan import Plan
from pipeline.run_record import InitialWeights
from pipeline.training.initial_source import (
    Source,
    describe_differences,
    network_differences,
    planning_advice,
    read_source,
)
from pipeline.training.run_folder import RunFolder

logger = get_logger("train")
HEADS = "heads."
ENCODER = "encoder."
# Of the plan's U-Net, with plain or residual blocks.
READS_IMAGE = ("encoder.0.0.conv.", "encoder.0.0.first.conv.", "encoder.0.0.shortcut.")
MOST_LISTED = 8


@dataclass(frozen=True)
class Match:
    """What of some weights fits a network.

    Attributes:
        taken: By key.
        new: Keys of the network that begin anew, with the shapes there and here.
        left_out: Keys of the weights that have no place.
    """

    taken: dict[str, Tensor]
    new: dict[str, str]
    left_out: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """How a training begins.

    Attributes:
        plan: Its plan.
        config: Its options.
        validation: Its validation cases.
        has_own_network: Whether its network is not the plan's.
    """

    plan: Plan
    config: TrainOptions
    validation: Sequence[str]
    has_own_network: bool

    def check(self, network: nn.Module) -> None:
        """Find out whether the training could begin so, without changing the network, whose tensors may be on "meta".

        Raises:
            InputError: It could not.
        """
        self._check_freeze(network)
        if self.config.init_from:
            self._match(read_source(self.config.init_from), network)

    def load(self, network: nn.Module) -> InitialWeights | None:
        """Put the weights into the network; what was taken and what is otherwise, or None without any.

        Raises:
            InputError: They do not fit.
        """
        if not self.config.init_from:
            return None
        source = read_source(self.config.init_from)
        match = self._match(source, network)
        network.load_state_dict(match.taken, strict=False)
        return InitialWeights(
            checkpoint=str(source.checkpoint),
            weights_hash=source.weights_hash,
            epoch=source.epoch,
            averaged=source.averaged,
            num_tensors=len(match.taken),
            new=tuple(f"{key} {shapes}" for key, shapes in match.new.items()),
            left_out=match.left_out,
            differences=tuple(describe_differences(source, self.plan, self.validation)),
        )

    def freeze(self, network: nn.Module) -> None:
        """Take what is to stay as it is out of the training."""
        self._check_freeze(network)
        if self.config.freeze == "encoder" and isinstance(network, UNet):
            network.freeze_encoder()
            sizes = [(each.numel() / 1e6, each.requires_grad) for each in network.parameters()]
            millions = (sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes))
            logger.info("the encoder stays as it is: %.2f of %.2f million parameters are trained", *millions)

    def _check_freeze(self, network: nn.Module) -> None:
        if self.config.freeze != "none" and not isinstance(network, UNet):
            raise InputError(
                "is for the plan's U-Net",
                where=f"freeze {self.config.freeze}",
                fix="Set requires_grad of your network's parameters to False yourself, before you hand it in",
            )

    def _match(self, source: Source, network: nn.Module) -> Match:
        own = network.state_dict()
        match = match_weights(source.weights, own)
        problems = [key for key in match.new if not self._may_begin_anew(key, source, own, network)]
        surplus = [key for key in match.left_out if not (isinstance(network, UNet) and _is_loose(key))]
        shapes = []
        if source.plan is not None and not self.has_own_network:
            shapes = network_differences(source.plan.network, self.plan.network)
        if problems or surplus or shapes or not match.taken:
            listed = [*(f"{key} {match.new[key]}" for key in problems), *(f"{key} (not here)" for key in surplus)]
            _refuse(source, match, listed, shapes)
        frozen = [key for key in match.new if key.startswith(ENCODER)] if self.config.freeze == "encoder" else []
        if frozen:
            what = f"{', '.join(frozen)} would begin anew and never be trained"
            raise InputError(what, where="freeze encoder", fix="Leave freeze out")
        return match

    def _may_begin_anew(self, key: str, source: Source, own: Mapping[str, Tensor], network: nn.Module) -> bool:
        if isinstance(network, UNet):
            return _is_loose(key)
        # Of a network of one's own the head is known by its number of classes alone.
        if key not in source.weights or source.plan is None:
            return False
        classes = (source.plan.num_classes, self.plan.num_classes)
        (*there,), (*here,) = source.weights[key].shape, own[key].shape
        return classes[0] != classes[1] and (*there[:1], *here[:1]) == classes and there[1:] == here[1:]


def check_beginning(folder: RunFolder, plan: Plan, config: TrainOptions, network: nn.Module | None) -> None:
    """Find out whether a training that has not begun could begin as its options say.

    Args:
        folder: Of the run.
        plan: Of the training.
        config: Its options; of `init_from` and `freeze`.
        network: Of the user's own, or None for the plan's.

    Raises:
        InputError: It could not.
    """
    if folder.has_checkpoint or not (config.init_from or config.freeze != "none"):
        return
    beginning = Beginning(plan=plan, config=config, validation=(), has_own_network=network is not None)
    if network is None:
        with torch.device("meta"):
            network = UNet(plan.num_channels, plan.num_classes, plan.network)
    beginning.check(network)


def match_weights(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Match:
    """Sort tensors by whether they have a name and a shape in both.

    Args:
        weights: What there is.
        own: State dict of the network that is to begin with them.
    """
    fits = {key: value for key, value in weights.items() if key in own and value.shape == own[key].shape}
    return Match(
        taken=fits,
        new=dict(_described(weights, own, fits)),
        left_out=tuple(key for key in weights if key not in own),
    )


def _described(
    weights: Mapping[str, Tensor], own: Mapping[str, Tensor], fits: Mapping[str, Tensor]
) -> Iterator[tuple[str, str]]:
    for key, value in own.items():
        if key not in fits:
            there = f"there {list(weights[key].shape)}, here" if key in weights else "not there, here"
            yield key, f"({there} {list(value.shape)})"


def _refuse(source: Source, match: Match, listed: list[str], shapes: list[str]) -> NoReturn:
    if not match.taken and not shapes:
        what = "none of its tensors has the name and the shape of one here"
    else:
        parts = [f"the networks differ in {', '.join(shapes)}"] if shapes else []
        parts += [f"{len(listed)} tensor(s) do not fit: {_shortened(listed)}"] if listed else []
        what = "; ".join(parts)
    # Shapes were compared where there is a plan to compare with.
    advice = planning_advice(source.plan) if source.plan is not None and shapes else ""
    raise InputError(
        f"these weights are of another network: {what}",
        where=f"init_from {source.checkpoint}",
        fix=advice or "Give weights of the same network",
    )


def _is_loose(key: str) -> bool:
    """Whether a tensor of the plan's U-Net follows from classes or channels."""
    return key.startswith((HEADS, *READS_IMAGE))


def _shortened(items: Sequence[str]) -> str:
    more = len(items) - MOST_LISTED
    return ", ".join(items[:MOST_LISTED]) + (f" and {more} more" if more > 0 else "")


def say_what_was_taken(found: InitialWeights) -> None:
    """Tell it in a line, and what is otherwise in another."""
    kind = "averaged weights" if found.averaged else "weights"
    which, total = f"{kind} of {found.checkpoint}, epoch {found.epoch}", found.num_tensors + len(found.new)
    logger.info("beginning with the %s: %d of %d tensors are taken", which, found.num_tensors, total)
    parts = [f"new: {_shortened(found.new)}"] if found.new else []
    parts += [f"left out: {_shortened(found.left_out)}"] if found.left_out else []
    if parts or found.differences:
        logger.warning("init_from: %s", "; ".join([*parts, *found.differences]))
