"""A volume as one multi-frame file: what all frames share, and what each has of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from pipeline.synthetic_dicom.layout import Layout, decimal
from pipeline.synthetic_dicom.modules import DATE, ENHANCED_SOP_CLASSES, TIME, add_frame_of_reference, make_dataset
from pipeline.synthetic_dicom.options import Modality, SeriesOptions, make_uid
from pipeline.synthetic_dicom.pixels import set_pixel_data
from pipeline.synthetic_dicom.stored import StoredValues

FRAME_TYPES: dict[Modality, str] = {
    "CT": "CTImageFrameTypeSequence",
    "MR": "MRImageFrameTypeSequence",
    "PT": "PETFrameTypeSequence",
}
# The phase keywords of classic files, and where a multi-frame file says the same: functional group and attribute.
PHASE_GROUPS = {
    "TemporalPositionIdentifier": ("FrameContentSequence", "TemporalPositionIndex"),
    "EchoTime": ("MREchoSequence", "EffectiveEchoTime"),
    "DiffusionBValue": ("MRDiffusionSequence", "DiffusionBValue"),
    "TriggerTime": ("CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime"),
    "AcquisitionNumber": ("FrameContentSequence", "FrameAcquisitionNumber"),
    "InversionTime": ("MRModifierSequence", "InversionTimes"),
}
WHOLE_NUMBERS = {"TemporalPositionIndex", "FrameAcquisitionNumber"}


def make_enhanced(
    stored: StoredValues,
    layout: Layout,
    options: SeriesOptions,
    phases: tuple[float, ...],
    frame_numbers: NDArray[np.int64],
) -> Dataset:
    """The Enhanced CT, MR or PET image of all slices.

    Args:
        stored: (C, slices, rows, columns).
        layout: Where the slices lie.
        options: How.
        phases: What tells the C channels apart.
        frame_numbers: (C, slices) number of each frame in the file, from 0.

    Raises:
        ValueError: A multi-frame file has no place for this phase keyword.
    """
    if options.phase_keyword is not None and options.phase_keyword not in PHASE_GROUPS:
        raise ValueError(f"a multi-frame file has no place for {options.phase_keyword}")
    dataset = make_dataset(options, ENHANCED_SOP_CLASSES[options.modality], options.instance_uid("enhanced"))
    dataset.ImageType = list(options.image_type or ("ORIGINAL", "PRIMARY", "VOLUME", "NONE"))
    add_frame_of_reference(dataset, options)
    _add_image(dataset, options)
    _add_dimensions(dataset, options)
    places = sorted(np.ndindex(frame_numbers.shape), key=lambda place: int(frame_numbers[place]))
    dataset.NumberOfFrames = len(places)
    dataset.SharedFunctionalGroupsSequence = [_shared(layout, options)]
    dataset.PerFrameFunctionalGroupsSequence = [_frame(stored, layout, options, phases, place) for place in places]
    set_pixel_data(dataset, np.stack([stored.values[place] for place in places]), options)
    return dataset


def _add_image(dataset: Dataset, options: SeriesOptions) -> None:
    """What an enhanced image says about all of its frames."""
    dataset.InstanceNumber, dataset.ImageComments = 1, options.identity.comments
    dataset.AcquisitionDateTime, dataset.AcquisitionDuration, dataset.AcquisitionNumber = DATE + TIME, 60.0, 1
    dataset.ContentQualification, dataset.PixelPresentation = "RESEARCH", "MONOCHROME"
    dataset.VolumetricProperties, dataset.VolumeBasedCalculationTechnique = "VOLUME", "NONE"
    dataset.BurnedInAnnotation, dataset.LossyImageCompression = "NO", "00"
    dataset.PresentationLUTShape, dataset.AcquisitionContextSequence = "IDENTITY", []
    dataset.DeviceSerialNumber = options.identity.device_serial_number
    if options.modality == "MR":
        dataset.MagneticFieldStrength, dataset.ResonantNucleus, dataset.KSpaceFiltering = 3.0, "1H", "NONE"
        dataset.ComplexImageComponent, dataset.AcquisitionContrast = "MAGNITUDE", "UNKNOWN"
        dataset.ApplicableSafetyStandardAgency, dataset.PulseSequenceName = "IEC", "synthetic"


def _add_dimensions(dataset: Dataset, options: SeriesOptions) -> None:
    """Frames are indexed by stack and slice, and by phase where there are phases."""
    organization = make_uid("dimensions", options.study_seed, options.seed)
    item = Dataset()
    item.DimensionOrganizationUID = organization
    dataset.DimensionOrganizationSequence = [item]
    pointers = [("FrameContentSequence", "StackID"), ("FrameContentSequence", "InStackPositionNumber")]
    if options.phase_keyword is not None:
        pointers.append(PHASE_GROUPS[options.phase_keyword])
    dataset.DimensionIndexSequence = [_dimension(organization, *pointer) for pointer in pointers]


def _dimension(organization: str, group: str, keyword: str) -> Dataset:
    item = Dataset()
    item.DimensionOrganizationUID = organization
    item.DimensionIndexPointer = Tag(tag_for_keyword(keyword) or 0)
    item.FunctionalGroupPointer = Tag(tag_for_keyword(group) or 0)
    item.DimensionDescriptionLabel = keyword
    return item


def _shared(layout: Layout, options: SeriesOptions) -> Dataset:
    """Functional groups that are the same in all frames."""
    thickness = decimal(options.slice_thickness or layout.slice_spacing)
    measures: dict[str, Any] = {"PixelSpacing": layout.pixel_spacing, "SliceThickness": thickness}
    if options.modality == "MR":
        measures["SpacingBetweenSlices"] = decimal(layout.slice_spacing)
    shared = Dataset()
    _add(shared, "PixelMeasuresSequence", **measures)
    _add(shared, "PlaneOrientationSequence", ImageOrientationPatient=layout.orientation)
    frame_type = {
        "FrameType": list(options.image_type or ("ORIGINAL", "PRIMARY", "VOLUME", "NONE")),
        "PixelPresentation": "MONOCHROME",
        "VolumetricProperties": "VOLUME",
        "VolumeBasedCalculationTechnique": "NONE",
    }
    if options.modality == "MR":
        frame_type |= {"ComplexImageComponent": "MAGNITUDE", "AcquisitionContrast": "UNKNOWN"}
    _add(shared, FRAME_TYPES[options.modality], **frame_type)
    return shared


def _frame(
    stored: StoredValues,
    layout: Layout,
    options: SeriesOptions,
    phases: tuple[float, ...],
    place: tuple[int, ...],
) -> Dataset:
    """Functional groups of the frame of one phase and slice."""
    phase, k = place
    frame, has_phases = Dataset(), options.phase_keyword is not None
    _add(
        frame,
        "FrameContentSequence",
        StackID="1",
        InStackPositionNumber=k + 1,
        DimensionIndexValues=[1, k + 1, *([phase + 1] if has_phases else [])],
        FrameAcquisitionDateTime=DATE + TIME,
        FrameReferenceDateTime=DATE + TIME,
        FrameAcquisitionDuration=60.0,
        FrameAcquisitionNumber=1,
    )
    _add(frame, "PlanePositionSequence", ImagePositionPatient=layout.position(k))
    _add(
        frame,
        "PixelValueTransformationSequence",
        RescaleIntercept=decimal(stored.intercept),
        RescaleSlope=f"{stored.slopes[phase, k]:.10g}",
        RescaleType="HU" if options.modality == "CT" else "US",
    )
    if options.phase_keyword is not None:
        group, keyword = PHASE_GROUPS[options.phase_keyword]
        _add(frame, group, **{keyword: int(phases[phase]) if keyword in WHOLE_NUMBERS else float(phases[phase])})
    return frame


def _add(groups: Dataset, sequence: str, **attributes: Any) -> None:
    """Set attributes of the one item of a functional group, which is made if missing."""
    if sequence not in groups:
        setattr(groups, sequence, [Dataset()])
    item = getattr(groups, sequence)[0]
    for keyword, value in attributes.items():
        setattr(item, keyword, value)
