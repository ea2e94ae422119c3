"""The drawing of the rule in "Write your own rule": k numbers, heard by every hidden block.

python figures/modulators.py        writes figures/modulators.svg
"""

from __future__ import annotations

from paths import GREY, INK, SIGNAL, STEP, Drawing, dark, up

from bpfree import style


def main() -> None:
    draw, (x, y) = Drawing(560, 236), (40, 42)
    color = style.line("FeedbackAlignment")["color"]
    up(draw, x, y)
    error, hub = (x + SIGNAL, y + 3 * STEP), (x + SIGNAL + 90, y + 3 * STEP)
    draw.node(*error, "$e$", INK)
    draw.teaches(error, 3, x, y, INK)
    draw.arrow(error, hub, color)
    draw.text(x + SIGNAL + 45, error[1] + 12, "$K$", dark(color))
    draw.node(*hub, "$m$", color)
    for l in (2, 1):
        here = (x + SIGNAL, y + l * STEP)
        draw.arrow(hub, here, color)
        place = (26, 34) if l == 2 else (60, 38)
        draw.text(here[0] + place[0], here[1] + place[1], f"$R_{l}$", dark(color))
        draw.node(*here, rf"$\delta_{l}$", color)
        draw.teaches(here, l, x, y, color)
    lines = (
        "$m=e\\,K$ is k numbers a sample:",
        "all that a hidden neuron",
        "hears of the error.",
        r"$\delta_l=\phi'\odot(m\,R_l)$",
        "$K$, $R_l$ random and fixed",
    )
    for i, text in enumerate(lines):
        draw.text(x + SIGNAL + 150, y + 3 * STEP - 26 * i, text, INK, 14, ha="left")
    draw.arrow((12, 14), (46, 14), GREY, width=1.5, gaps=(0, 0))
    draw.text(53, 14, "activity", INK, 13, ha="left")
    draw.arrow((140, 14), (174, 14), color, gaps=(0, 0))
    draw.text(181, 14, "teaching signal", INK, 13, ha="left")
    draw.arrow((316, 14), (350, 14), color, (0, (1, 1.4)), width=1.3, gaps=(0, 0))
    draw.text(357, 14, "the weights it teaches", INK, 13, ha="left")
    draw.save("modulators")


if __name__ == "__main__":
    main()
