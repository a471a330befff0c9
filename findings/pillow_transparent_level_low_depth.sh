#!/usr/bin/env bash
# Pillow compares the transparent level of a 4-bit grey PNG with pixels that it has scaled to 8 bits.
#
# One would guess that converting a grey PNG with a tRNS chunk to RGBA makes the pixels of that level transparent, at any
# depth: the PNG specification gives the level in the depth of the image. Pillow 13.0.0 scales 4-bit pixels to 0 .. 255
# and keeps the level as stored, so level 5 (which became 85) matches nothing, and the picture is opaque, with no warning.
# Seen with pillow 13.0.0 and Python 3.11 on 2026-11-30. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import struct
import sys
import zlib

from PIL import Image


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


seen = {}
for bits, row in ((8, bytes([5, 9])), (4, bytes([0x59]))):  # two pixels, of level 5 (transparent) and 9
    path = f"{sys.argv[1]}/{bits}.png"
    with open(path, "wb") as file:
        file.write(
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, bits, 0, 0, 0, 0))
            + chunk(b"tRNS", struct.pack(">H", 5))
            + chunk(b"IDAT", zlib.compress(b"\0" + row))
            + chunk(b"IEND", b"")
        )
    with Image.open(path) as image:
        pixels = image.convert("RGBA")
        seen[bits] = [pixels.getpixel((x, 0))[3] for x in (0, 1)]
    print(f"{bits} bits: opacity of the transparent level {seen[bits][0]}, of another {seen[bits][1]}")
assert seen[8] == [0, 255], "8 bits: changed"
assert seen[4] == [255, 255], "4 bits: the transparent level is no longer ignored"
print("as described: the transparent level works at 8 bits and is ignored at 4")
PYTHON
