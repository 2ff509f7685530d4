"""What a synthetic object says besides its pixels: patient, study, series, equipment, modality."""

from __future__ import annotations

from pathlib import Path

from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import UID

from pipeline.synthetic_dicom.layout import decimal
from pipeline.synthetic_dicom.options import TRANSFER_SYNTAXES, Modality, SeriesOptions, make_uid

DATE, TIME = "20000102", "030405"
SOP_CLASSES: dict[Modality, str] = {
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "PT": "1.2.840.10008.5.1.4.1.1.128",
}
ENHANCED_SOP_CLASSES: dict[Modality, str] = {
    "CT": "1.2.840.10008.5.1.4.1.1.2.1",
    "MR": "1.2.840.10008.5.1.4.1.1.4.1",
    "PT": "1.2.840.10008.5.1.4.1.1.130",
}
IMAGE_TYPES: dict[Modality, tuple[str, ...]] = {
    "CT": ("ORIGINAL", "PRIMARY", "AXIAL"),
    "MR": ("ORIGINAL", "PRIMARY", "OTHER"),
    "PT": ("ORIGINAL", "PRIMARY"),
}


def make_dataset(options: SeriesOptions, sop_class: str, sop_uid: str, *, modality: str = "") -> Dataset:
    """Patient, study, series and equipment of an object of the options' series."""
    dataset, who = Dataset(), options.identity
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, sop_uid
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = options.study_uid, options.series_uid
    dataset.StudyDate = dataset.SeriesDate = dataset.AcquisitionDate = dataset.ContentDate = DATE
    dataset.StudyTime = dataset.SeriesTime = dataset.AcquisitionTime = dataset.ContentTime = TIME
    dataset.Modality, dataset.SeriesNumber = modality or options.modality, options.series_number
    dataset.SeriesDescription, dataset.StudyDescription = options.series_description, "synthetic study"
    dataset.Manufacturer, dataset.ManufacturerModelName = "synthetic", "synthetic"
    dataset.SoftwareVersions, dataset.BodyPartExamined = "1", "ABDOMEN"
    dataset.PatientName, dataset.PatientID = who.patient_name, who.patient_id
    dataset.PatientBirthDate, dataset.PatientSex, dataset.PatientAge = who.birth_date, who.sex, who.age
    dataset.AccessionNumber, dataset.StudyID = who.accession_number, who.study_id
    dataset.InstitutionName, dataset.InstitutionAddress = who.institution_name, who.institution_address
    dataset.ReferringPhysicianName, dataset.OperatorsName = who.referring_physician, who.operators_name
    dataset.StationName, dataset.DeviceSerialNumber = who.station_name, who.device_serial_number
    return dataset


def add_frame_of_reference(dataset: Dataset, options: SeriesOptions) -> None:
    """Where the patient's coordinates are anchored, and how the patient lies."""
    dataset.FrameOfReferenceUID, dataset.PositionReferenceIndicator = options.frame_of_reference_uid, None
    # A PET image says this in codes.
    if options.modality != "PT":
        dataset.PatientPosition = options.patient_position


def add_modality(dataset: Dataset, options: SeriesOptions) -> None:
    """What the classic image of the modality must say about its acquisition."""
    dataset.AcquisitionNumber = 1
    dataset.ImageComments = options.identity.comments
    if options.modality == "CT":
        dataset.KVP, dataset.ConvolutionKernel = "120", "SYNTHETIC"
    elif options.modality == "MR":
        dataset.ScanningSequence, dataset.SequenceVariant, dataset.ScanOptions = "GR", "NONE", None
        dataset.MRAcquisitionType, dataset.SequenceName = "3D", "synthetic"
        dataset.RepetitionTime, dataset.EchoTime, dataset.EchoTrainLength = "8", "3", 1
        dataset.MagneticFieldStrength, dataset.FlipAngle = "3", "10"
    else:
        _add_pet(dataset)


def _add_pet(dataset: Dataset) -> None:
    dataset.Units, dataset.CountsSource, dataset.SeriesType = "BQML", "EMISSION", ["STATIC", "IMAGE"]
    dataset.CorrectedImage, dataset.DecayCorrection = ["DECY", "ATTN"], "START"
    dataset.CollimatorType, dataset.AttenuationCorrectionMethod = "NONE", "synthetic"
    dataset.DecayFactor, dataset.FrameReferenceTime, dataset.ActualFrameDuration = "1", "0", 60000
    drug = Dataset()
    drug.RadionuclideCodeSequence = [make_code("C-111A1", "SRT", "^18^Fluorine")]
    drug.RadiopharmaceuticalStartTime, drug.RadionuclideTotalDose = TIME, "370000000"
    drug.RadionuclideHalfLife, drug.Radiopharmaceutical = "6586.2", "synthetic"
    dataset.RadiopharmaceuticalInformationSequence = [drug]
    dataset.PatientOrientationCodeSequence = [make_code("F-10450", "SRT", "recumbent")]
    dataset.PatientOrientationCodeSequence[0].PatientOrientationModifierCodeSequence = [
        make_code("F-10340", "SRT", "supine")
    ]
    dataset.PatientGantryRelationshipCodeSequence = [make_code("F-10470", "SRT", "headfirst")]


def make_code(value: str, scheme: str, meaning: str) -> Dataset:
    """An item of a code sequence."""
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, scheme, meaning
    return code


def set_number(dataset: Dataset, keyword: str, value: float) -> None:
    """Set a numeric attribute as its value representation wants it: a decimal string, a whole number or a double."""
    from pydicom.datadict import dictionary_VR

    kind = dictionary_VR(keyword)
    setattr(dataset, keyword, decimal(value) if kind == "DS" else int(value) if kind == "IS" else float(value))


def save(dataset: Dataset, path: Path, options: SeriesOptions) -> Path:
    """Write a DICOM file with preamble and file meta information that do not depend on pydicom's version."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID(dataset.SOPClassUID)
    meta.MediaStorageSOPInstanceUID = UID(dataset.SOPInstanceUID)
    meta.TransferSyntaxUID = TRANSFER_SYNTAXES[options.transfer_syntax]
    meta.ImplementationClassUID, meta.ImplementationVersionName = UID(make_uid("implementation")), "SYNTHETIC"
    path.parent.mkdir(parents=True, exist_ok=True)
    syntax = meta.TransferSyntaxUID
    encoding = {"is_implicit_VR": syntax.is_implicit_VR, "is_little_endian": syntax.is_little_endian}
    file = FileDataset(str(path), dataset, preamble=bytes(128), file_meta=meta, **encoding)
    file.save_as(path, enforce_file_format=True)
    return path
