"""Write the CSV list of a dataset that has one folder per case.

Example:
    python scripts/list_cases.py DATA --image T1=t1.nii.gz --image T2=t2.nii.gz --label seg.nii.gz --out cases.csv

Every sub-folder of DATA that holds one of the named files becomes a case; `voxfit inspect cases.csv` then says what is
missing where. The folder's name is the case id.
"""

import argparse
import csv
import io
import os
import sys
from pathlib import Path

from pipeline.artifacts import write_text


def main() -> int:
    """Parse the options, write the list, say how many cases it has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--image", action="append", required=True, metavar="CHANNEL=FILE")
    parser.add_argument("--label", required=True, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    channels = dict(image.split("=", 1) for image in options.image if "=" in image)
    if len(channels) != len(options.image):
        parser.error("--image takes CHANNEL=FILE, each channel once")
    rows = list_cases(options.folder, channels, options.label, relative_to=options.out.parent)
    if not rows:
        parser.error(f"{options.folder}: no sub-folder holds any of {', '.join([*channels.values(), options.label])}")
    write_text(options.out, to_csv(rows))
    print(f"{options.out}: {len(rows)} cases")
    return 0


def list_cases(folder: Path, channels: dict[str, str], label: str, *, relative_to: Path) -> list[dict[str, str]]:
    """A row per sub-folder: case id, a path per channel, the label's path; paths relative to the list."""
    rows = []
    for case in sorted(path for path in folder.iterdir() if path.is_dir()):
        names = {**{f"image_{channel}": name for channel, name in channels.items()}, "label": label}
        if any((case / name).exists() for name in names.values()):
            paths = {key: os.path.relpath(case / name, relative_to) for key, name in names.items()}
            rows.append({"case_id": case.name, **paths})
    return rows


def to_csv(rows: list[dict[str, str]]) -> str:
    """The rows as CSV text with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


if __name__ == "__main__":
    sys.exit(main())
