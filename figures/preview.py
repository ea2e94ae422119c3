"""The picture that other sites show beside a link to the book.

python figures/preview.py        writes _static/preview.png, which tools/accessible.py names
"""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib.pyplot as plt
from paths import INK, WIDTH, Drawing, dark, panel
from PIL import Image

from bpfree import style

FILE = Path(__file__).resolve().parent.parent / "_static" / "preview.png"
SIZE = (1200, 630)  # what sites crop to: 1.91 to 1
RULES = ("Backprop", "FeedbackAlignment", "PEPITA")


def draw() -> Image.Image:
    """Title, thesis and three rules, in 32 colours."""
    sheet = Drawing(SIZE[0] / 2, SIZE[1] / 2)
    sheet.text(300, 289, "Learning without backpropagation", size=26, fontweight="bold")
    sheet.text(300, 261, "Learning rules differ in where the teaching signal comes from", INK, 15)
    for i, rule in enumerate(RULES):
        x, color = 22 + i * WIDTH, style.line(rule)["color"]
        panel(sheet, rule, x, 26)
        sheet.text(x + WIDTH / 2 - 14, 227, style.label(rule), dark(color), 17, fontweight="bold")
    png = io.BytesIO()
    sheet.fig.savefig(png, dpi=200)
    plt.close(sheet.fig)
    return Image.open(png).convert("RGB").quantize(32)


if __name__ == "__main__":
    draw().save(FILE, optimize=True)
