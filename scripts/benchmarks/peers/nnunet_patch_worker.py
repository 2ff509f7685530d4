"""Training patches as nnU-Net's trainer has them made, on request, in nnU-Net's environment, in this one process.

    nnUNet_n_proc_DA=0 python nnunet_patch_worker.py FOLD

Loader, transforms, probabilities and batch are the trainer's own; FOLD is one of its split file.
"""

from __future__ import annotations

import sys

import torch
from nnunetv2.run.run_training import get_trainer_from_args

from peers.json_worker import answer_requests, answers_stream
from peers.patch_blocks import measure_memory, take_block


def main() -> None:
    """Answer requests until standard input ends."""
    answers = answers_stream()
    torch.set_num_threads(1)
    trainer = get_trainer_from_args("1", "3d_fullres", int(sys.argv[1]), device=torch.device("cpu"))
    trainer.initialize()
    # Only the loader is wanted: the network's memory is not.
    trainer.network = trainer.optimizer = trainer.lr_scheduler = None
    batches, _ = trainer.get_dataloaders()

    def make() -> int:
        return len(next(batches)["data"])

    answer_requests(answers, {"block": lambda num: take_block(make, num), "memory": measure_memory})


if __name__ == "__main__":
    main()
