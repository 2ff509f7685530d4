"""What windows take of a process on a CPU while they are in a network, and while they wait for their turn behind it.

Legend: a window has V voxels; C channels go into a network, and F features or scores come out of it.
"""

from __future__ import annotations

from math import prod

from pipeline.inference.sliding_window import WINDOWS_AHEAD
from pipeline.inference.window_outputs import Network, num_features
from pipeline.inference.windows import SlidingWindow
from pipeline.networks.convolution_workspace import CHANNELS_PER_BLOCK, LARGEST_KEPT_BYTES
from pipeline.networks.forward_memory import FLOAT_BYTES, estimate_forward_memory
from pipeline.networks.unet import UNet

# Code of torch, oneDNN and MKL that the first window has loaded from their files: 11 to 15 MiB (`RssFile` of
# /proc/self/status, torch 2.13).
CODE_BYTES = 14 << 20
# MKL's matrix products, which torch's own convolutions are, keep their buffers by thread: 7.4 MiB of a process
# (`RssAnon` after a first convolution, and next to nothing with MKL_DISABLE_FAST_MM).
PRODUCT_BYTES = 8 << 20
# Of networks of others the blocks are not known. Of what comes out, glibc keeps up to twice a block at the end of the
# heap (M_TRIM_THRESHOLD follows M_MMAP_THRESHOLD so), and what fits nothing else between others (2 of 6 runs went up
# to 5 % over their bound without the latter).
KEPT_BLOCKS = 3


def window_bytes(sliding: SlidingWindow, num_channels: int, network: Network | None) -> int:
    """Windows at once, in the network and through it, see `network_bytes` and `waiting_bytes`."""
    return network_bytes(sliding, num_channels, network) + waiting_bytes(sliding, network)


def network_bytes(sliding: SlidingWindow, num_channels: int, network: Network | None) -> int:
    """What a network has alive of the windows at once in float32, and what the C library keeps of it when freed.

    Args:
        sliding: The windows, in threads of their own or in one batch.
        num_channels: C.
        network: Of another than our U-Net what it does inside is not known, and the estimate is a low one: twice what
            goes in, and twice what comes out as oneDNN holds it, with channels filled up to whole blocks. None is one
            that gives scores.
    """
    if sliding.threads:
        return sliding.window_batch * _batch_bytes(sliding, num_channels, network, 1)
    # Single windows, to which a prediction goes down that ran out of memory, may take more than a batch: torch puts
    # these through other convolutions.
    return max(_batch_bytes(sliding, num_channels, network, size) for size in {1, sliding.window_batch})


def _batch_bytes(sliding: SlidingWindow, num_channels: int, network: Network | None, batch_size: int) -> int:
    voxels = FLOAT_BYTES * batch_size * prod(sliding.window)
    if isinstance(network, UNet):
        _, inside, kept = estimate_forward_memory(
            network, sliding.window, in_channels=num_channels, batch_size=batch_size
        )
    else:
        num_given = _given_channels(sliding, network)
        given, num_blocks = voxels * num_given, -(-num_given // CHANNELS_PER_BLOCK)
        inside = 2 * voxels * CHANNELS_PER_BLOCK * num_blocks
        kept = KEPT_BLOCKS * given if given < LARGEST_KEPT_BYTES else 0
    return 2 * num_channels * voxels + inside + kept


def waiting_bytes(sliding: SlidingWindow, network: Network | None) -> int:
    """Of windows that are through the network and wait for their turn, beside those that are in it."""
    if sliding.threads is None:
        return 0
    voxels = sliding.window_batch * prod(sliding.window)
    return FLOAT_BYTES * voxels * WINDOWS_AHEAD * _given_channels(sliding, network)


def library_bytes(sliding: SlidingWindow) -> int:
    """What libraries take for their first windows and keep; a process that has predicted before has it already."""
    return CODE_BYTES + PRODUCT_BYTES * (sliding.window_batch if sliding.threads else 1)


def _given_channels(sliding: SlidingWindow, network: Network | None) -> int:
    """F."""
    features = num_features(network) if network is not None else None
    return sliding.num_classes if features is None else features
