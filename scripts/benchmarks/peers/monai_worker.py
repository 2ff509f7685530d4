"""MONAI's side: a training as in its DynUNet tutorial, or predictions; runs in the peers' environment.

    python monai_worker.py train < request.json
    python monai_worker.py predict < request.json

DynUNet with deep supervision and instance norm, Dice and cross entropy, SGD with Nesterov momentum and a polynomial
learning rate (or AdamW with a cosine), sliding windows with half a window of overlap and Gaussian weights, float32.
`monai_side.py` makes the requests.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai import transforms as mt
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.networks.nets import DynUNet
from monai.utils import set_determinism
from torch import Tensor, nn

from peers.monai_data import make_preparation, make_training_batches, make_validation_cases


def make_network(request: dict[str, Any]) -> DynUNet:
    """DynUNet of the given stages."""
    return DynUNet(
        spatial_dims=3,
        in_channels=request["in_channels"],
        out_channels=request["num_classes"],
        kernel_size=request["kernel_sizes"],
        strides=request["strides"],
        upsample_kernel_size=request["strides"][1:],
        filters=request["features"],
        norm_name="instance",
        deep_supervision=True,
        deep_supr_num=max(1, len(request["features"]) - 3),
    )


def make_optimizer(request: dict[str, Any], network: nn.Module) -> torch.optim.Optimizer:
    """SGD as in the tutorial, or AdamW."""
    if request["optimizer"] == "adamw":
        return torch.optim.AdamW(network.parameters(), lr=request["lr"], weight_decay=1e-5)
    return torch.optim.SGD(network.parameters(), lr=request["lr"], momentum=0.99, weight_decay=3e-5, nesterov=True)


def rate_factor(done: float, optimizer: str) -> float:
    """What the learning rate is multiplied with after a share of the training."""
    return 0.5 * (1 + math.cos(math.pi * done)) if optimizer == "adamw" else (1 - done) ** 0.9


def train(request: dict[str, Any]) -> dict[str, Any]:
    """Train, save the last weights, and say what it took from the first iteration to the end of the last epoch."""
    begun = time.perf_counter()
    batches, cases = make_training_batches(request), make_validation_cases(request)
    network = make_network(request)
    loss = DiceCELoss(to_onehot_y=True, softmax=True)
    optimizer = make_optimizer(request, network)
    # The workers of the loader start here.
    batch = next(batches)
    prepared, times, validations = time.perf_counter() - begun, [], []
    total, started = request["epochs"] * request["iterations_per_epoch"], time.perf_counter()
    for epoch in range(1, request["epochs"] + 1):
        network.train()
        before = time.perf_counter()
        for index in range(request["iterations_per_epoch"]):
            done = ((epoch - 1) * request["iterations_per_epoch"] + index) / total
            for group in optimizer.param_groups:
                group["lr"] = request["lr"] * rate_factor(done, request["optimizer"])
            optimizer.zero_grad(set_to_none=True)
            heads = network(batch["image"]).unbind(1)
            value = sum(0.5**level * loss(head, batch["label"]) for level, head in enumerate(heads))
            value.backward()
            optimizer.step()
            batch = next(batches)
            times.append(time.perf_counter() - before)
            before = time.perf_counter()
        if epoch % request["validate_every"] == 0 or epoch == request["epochs"]:
            validations.append(validate(request, network, cases))
            print(f"epoch {epoch}: loss {float(value):.3f}, Dice {validations[-1]['dice']:.4f}", flush=True)
    seconds = time.perf_counter() - started
    torch.save(network.state_dict(), request["weights"])
    return {
        "training_seconds": seconds,
        "iteration_seconds": statistics.mean(times[1:] or times),
        "validation_seconds": statistics.mean(each["seconds"] for each in validations),
        "iterations": len(times),
        "preparation_seconds": prepared,
        "num_parameters": sum(each.numel() for each in network.parameters()),
    }


def infer(request: dict[str, Any], network: nn.Module, image: Tensor) -> Tensor:
    """Scores of a whole image (1, C, I, J, K)."""
    with torch.no_grad():
        return sliding_window_inference(image, request["patch_size"], 4, network, overlap=0.5, mode="gaussian")


def validate(request: dict[str, Any], network: nn.Module, cases: Any) -> dict[str, float]:
    """Mean Dice of the foreground classes over the validation cases."""
    started = time.perf_counter()
    network.eval()
    dice = DiceMetric(include_background=False, num_classes=request["num_classes"])
    for case in cases:
        classes = infer(request, network, case["image"][None]).argmax(1, keepdim=True)
        dice(y_pred=classes, y=case["label"][None].long())
    return {"dice": float(dice.aggregate()), "seconds": time.perf_counter() - started}


def predict(request: dict[str, Any]) -> dict[str, Any]:
    """Write a label file per case on its own grid."""
    network = make_network(request)
    network.load_state_dict(torch.load(request["weights"]))
    network.eval()
    preparation = make_preparation(request, ["image"])
    back = mt.Invertd("pred", transform=preparation, orig_keys="image", nearest_interp=False, to_tensor=True)
    for case in request["cases"]:
        item = preparation({"image": case["image"]})
        item["pred"] = infer(request, network, item["image"][None])[0]
        classes = back(item)["pred"].argmax(0).numpy().astype(np.uint8)
        first = nib.load(case["image"][0])
        nib.save(nib.Nifti1Image(classes, first.affine), Path(request["predictions"], f"{case['case_id']}.nii.gz"))
    return {"cases": len(request["cases"])}


def main() -> None:
    """Do what was asked, and write what it came to into the file that the request names."""
    request = json.load(sys.stdin)
    torch.set_num_threads(request["num_threads"])
    set_determinism(request["seed"])
    result = {"train": train, "predict": predict}[sys.argv[1]](request)
    Path(request["out"]).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
