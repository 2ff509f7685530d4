"""An untrained nnU-Net model folder of a given size, as `nnUNetv2_predict_from_modelfolder` takes it.

Runs in nnU-Net's own environment (nnunet_environment.sh): python nnunet_model.py FOLDER < request.json, where the
request has the keys patch_size, spacing, features, num_classes and file_ending. The network is built by nnU-Net's own
trainer class, with two convolutions in every stage of the decoder as ours has.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

CONFIGURATION = "3d_fullres"


def make_plans(request: dict[str, Any]) -> dict[str, Any]:
    """The plans of one configuration, with what prediction reads of them."""
    stages = len(request["features"])
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    linear = {**resampling, "order": 1}
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": request["features"],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * stages,
            "strides": [[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
            "n_conv_per_stage": [2] * stages,
            "n_conv_per_stage_decoder": [2] * (stages - 1),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": request["patch_size"],
        "median_image_size_in_voxels": request["patch_size"],
        "spacing": request["spacing"],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg_kwargs": {**linear, "is_seg": True},
        "resampling_fn_probabilities_kwargs": linear,
        "architecture": architecture,
        "batch_dice": False,
    }
    return {
        "dataset_name": "Dataset001_Benchmark",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": request["spacing"],
        "original_median_shape_after_transp": request["patch_size"],
        "image_reader_writer": "NibabelIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {CONFIGURATION: configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {}},
    }


def main() -> None:
    """Write dataset.json, plans.json and fold_0/checkpoint_final.pth."""
    request, folder = json.load(sys.stdin), Path(sys.argv[1])
    plans = make_plans(request)
    labels = {"background": 0, **{f"class_{index}": index for index in range(1, request["num_classes"])}}
    dataset = {"channel_names": {"0": "T1"}, "labels": labels, "numTraining": 1, "file_ending": request["file_ending"]}
    (folder / "fold_0").mkdir(parents=True, exist_ok=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    torch.manual_seed(0)
    manager = PlansManager(plans)
    network = nnUNetTrainer.build_network_architecture(
        manager, manager.get_configuration(CONFIGURATION), 1, len(labels), enable_deep_supervision=True
    )
    checkpoint = {
        "network_weights": network.state_dict(),
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": CONFIGURATION},
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")
    print(sum(each.numel() for each in network.parameters()))


if __name__ == "__main__":
    main()
