#!/usr/bin/env bash
# Pillow reads an 8-bit TIFF whose zero means white as a positive, and a 16-bit one as a negative.
#
# One would guess that the photometric interpretation (tag 262; 0 is WhiteIsZero) is honoured at every depth, as the
# TIFF 6.0 specification defines it for grey images of any number of bits. Pillow 13.0.0 inverts such an image at 8 bits
# a sample and hands on the raw levels at 16 bits, with no warning: the same picture comes out as its negative.
# Seen with pillow 13.0.0 and Python 3.11 on 2026-11-30. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import struct
import sys

from PIL import Image

# two pixels: stored as black ink (the greatest level) and as bare paper (0), which WhiteIsZero shows as black and white
seen = {}
for bits, code in ((8, "B"), (16, "H")):
    greatest = 2**bits - 1
    pixels = struct.pack(f"<2{code}", greatest, 0)
    tags = [(256, 2), (257, 1), (258, bits), (259, 1), (262, 0), (277, 1), (278, 1), (279, len(pixels))]
    start = 8 + 2 + 12 * (len(tags) + 1) + 4
    tags = sorted([*tags, (273, start)])
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    path = f"{sys.argv[1]}/{bits}.tif"
    with open(path, "wb") as file:
        file.write(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + pixels)
    with Image.open(path) as image:
        seen[bits] = [image.getpixel((x, 0)) / greatest for x in (0, 1)]
    print(f"{bits:2} bits: ink {seen[bits][0]:g}, paper {seen[bits][1]:g} (0 is black, 1 is white)")
assert seen[8] == [0, 1], "8 bits: no longer a positive"
assert seen[16] == [1, 0], "16 bits: no longer a negative"
print("as described: 8 bits are inverted to a positive, 16 bits are not")
PYTHON
