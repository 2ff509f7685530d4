"""Reads a case of a store and says what that took; run as a module, so that damaged data ends no more than this."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from time import perf_counter
from typing import TextIO

from pydantic import TypeAdapter

from pipeline.doctor.apart import answering
from pipeline.doctor.folders import empty_cache
from pipeline.doctor.parts import ANSWER, Part, ReadRequest
from pipeline.geometry import format_shape
from pipeline.sizes import MIB
from pipeline.store import CaseStore


def read_part(request: ReadRequest) -> Part:
    """Read a whole case, image and label, with the system's cache of its files emptied before."""
    store = CaseStore(Path(request.store))
    record = store.record(request.case_id)
    # Records are read already: what is timed is voxels.
    emptied = all([empty_cache(path) for path in (store.folder / "cases").glob(f"{request.case_id}.*.b2nd")])
    started = perf_counter()
    image, label = store.read_case(request.case_id)
    seconds = perf_counter() - started
    num_bytes = image.nbytes + label.nbytes
    on_disk = sum(size for kind, size in record.data_bytes.items() if kind != "voxels")
    cache = "" if emptied else ", perhaps from the system's cache"
    return Part(
        name="read",
        what=f"case {request.case_id}, {format_shape(record.shape)} voxels, {on_disk / MIB:.1f} MiB on disk{cache}",
        seconds=seconds,
        rate=f"{num_bytes / MIB / seconds:.0f} MiB/s of voxels",
        peak_ram_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        figures={"voxel_bytes": num_bytes, "disk_bytes": on_disk},
    )


def answer_request(answers: TextIO) -> None:
    """Answer the request on standard input."""
    part = read_part(TypeAdapter(ReadRequest).validate_json(sys.stdin.read()))
    answers.write(ANSWER.dump_json(part).decode() + "\n")


if __name__ == "__main__":
    sys.exit(answering(answer_request))
