"""What a synthetic series is asked to be: its pixels, its files, and the patient that it pretends to show."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Literal

from pydicom import uid

Modality = Literal["CT", "MR", "PT"]
SyntaxName = Literal[
    "implicit_le",
    "explicit_le",
    "explicit_be",
    "deflated",
    "rle",
    "jpeg_lossless",
    "jpeg_lossless_sv1",
    "jpeg_ls",
    "jpeg_2000",
]
PhaseKeyword = Literal[
    "TemporalPositionIdentifier",
    "EchoTime",
    "EchoNumbers",
    "DiffusionBValue",
    "TriggerTime",
    "AcquisitionNumber",
    "InversionTime",
]

TRANSFER_SYNTAXES: dict[SyntaxName, uid.UID] = {
    "implicit_le": uid.ImplicitVRLittleEndian,
    "explicit_le": uid.ExplicitVRLittleEndian,
    "explicit_be": uid.ExplicitVRBigEndian,
    "deflated": uid.DeflatedExplicitVRLittleEndian,
    "rle": uid.RLELossless,
    "jpeg_lossless": uid.JPEGLossless,
    "jpeg_lossless_sv1": uid.JPEGLosslessSV1,
    "jpeg_ls": uid.JPEGLSLossless,
    "jpeg_2000": uid.JPEG2000Lossless,
}
_NAMESPACE = uuid.UUID("6f0d3c1e-6f0c-5d0e-9d65-0c6d7f8a1b2c")


def make_uid(*words: object) -> str:
    """A valid UID (root 2.25) that depends on `words` alone."""
    return f"2.25.{uuid.uuid5(_NAMESPACE, ' '.join(map(str, words))).int}"


@dataclass(frozen=True, kw_only=True)
class PlantedIdentity:
    """What tells a patient apart, planted so that a test can search outputs for it. No such person exists.

    Attributes:
        birth_date: YYYYMMDD.
        comments: Free text of the series (ImageComments), in which people write names.
        others: As in DICOM.
    """

    patient_name: str = "Synthetic^Nobody"
    patient_id: str = "FAKE-0000"
    birth_date: str = "19000101"
    sex: str = "O"
    age: str = "099Y"
    accession_number: str = "FAKEACC0"
    institution_name: str = "Hospital of No Place"
    institution_address: str = "0 Nowhere Road"
    referring_physician: str = "Fake^Referrer"
    operators_name: str = "Fake^Operator"
    station_name: str = "FAKESTATION"
    study_id: str = "FAKESTUDY"
    device_serial_number: str = "FAKESERIAL"
    comments: str = "made up by a program"


@dataclass(frozen=True, kw_only=True)
class SeriesOptions:
    """How a volume is written as DICOM.

    Attributes:
        modality: Decides the SOP class and the attributes that go with it.
        transfer_syntax: A key of `TRANSFER_SYNTAXES`.
        is_signed: Two's complement.
        bits_allocated: 8, 16 or 32.
        bits_stored: At most `bits_allocated`, which is the default.
        high_bit: `bits_stored` - 1 by default; higher shifts the stored bits up, as only retired objects do.
        unused_bits: What fills the bits above a negative value: its sign, or zeros.
        slope, intercept: Stored value to intensity.
        slope_per_slice: Choose the slope of every slice so that its largest value fills the stored range, as PET does.
        slice_axis: RAS axis along which the slices lie, in the usual orientation: 0 sagittal, 1 coronal, 2 axial.
            By default the source order of a volume that has one, else axial.
        enhanced: One multi-frame file in place of one file per slice.
        phase_keyword: What tells the channels apart; needed for more than one.
        phase_values: One per channel, by default 1, 2, 3, ...
        slice_thickness: In mm; by default the spacing of the slices.
        is_shuffled: File names and instance numbers (enhanced: order of the frames) do not follow the slices.
        seed: Decides series and instance UIDs, and the shuffling.
        study_seed: Decides the UIDs of study and frame of reference; series of one study share it.
        identity: What is planted about the patient.
        image_type: By default ORIGINAL, PRIMARY and what the modality asks for.
        patient_position: As in DICOM, such as "HFS".
    """

    modality: Modality = "CT"
    transfer_syntax: SyntaxName = "explicit_le"
    is_signed: bool = True
    bits_allocated: Literal[8, 16, 32] = 16
    bits_stored: int | None = None
    high_bit: int | None = None
    unused_bits: Literal["sign", "zero"] = "sign"
    slope: float = 1.0
    intercept: float = 0.0
    slope_per_slice: bool = False
    slice_axis: Literal[0, 1, 2] | None = None
    enhanced: bool = False
    phase_keyword: PhaseKeyword | None = None
    phase_values: tuple[float, ...] = ()
    slice_thickness: float | None = None
    is_shuffled: bool = True
    seed: int = 0
    study_seed: int = 0
    identity: PlantedIdentity = field(default_factory=PlantedIdentity)
    series_description: str = "synthetic series"
    series_number: int = 1
    image_type: tuple[str, ...] = ()
    patient_position: str = "HFS"

    def __post_init__(self) -> None:
        stored = self.stored_bits
        if not 1 <= stored <= self.bits_allocated or not stored - 1 <= self.top_bit < self.bits_allocated:
            raise ValueError(f"{stored} bits up to bit {self.top_bit} do not fit into {self.bits_allocated}")
        if self.slope == 0 or (self.slope_per_slice and self.intercept != 0):
            raise ValueError("the slope must not be 0, and slopes per slice go with an intercept of 0")

    @property
    def stored_bits(self) -> int:
        """`bits_stored` with its default."""
        return self.bits_allocated if self.bits_stored is None else self.bits_stored

    @property
    def top_bit(self) -> int:
        """`high_bit` with its default."""
        return self.stored_bits - 1 if self.high_bit is None else self.high_bit

    @property
    def stored_range(self) -> tuple[int, int]:
        """The least and the greatest stored value."""
        half = 1 << (self.stored_bits - 1)
        return (-half, half - 1) if self.is_signed else (0, 2 * half - 1)

    @property
    def study_uid(self) -> str:
        """Of the study."""
        return make_uid("study", self.study_seed)

    @property
    def frame_of_reference_uid(self) -> str:
        """Of the patient's coordinate system, one per study."""
        return make_uid("frame of reference", self.study_seed)

    @property
    def series_uid(self) -> str:
        """Of the series."""
        return make_uid("series", self.study_seed, self.seed)

    def instance_uid(self, number: int | str) -> str:
        """Of the file with this number."""
        return make_uid("instance", self.study_seed, self.seed, number)
