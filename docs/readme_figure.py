"""The figure of the README, from two figures of the quickstart's chapter on transport.

make demo
.venv/bin/python docs/readme_figure.py
"""

from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SOURCE, TARGET = ROOT / "out/quickstart/transport", ROOT / "docs/_static/readme.png"
HEIGHT, GAP = 460, 50


def main() -> None:
    parts = [Image.open(SOURCE / name).convert("RGB") for name in ("digits.png", "error.png")]
    parts = [part.resize((part.width * HEIGHT // part.height, HEIGHT), Image.Resampling.LANCZOS) for part in parts]
    canvas = Image.new("RGB", (sum(part.width for part in parts) + GAP, HEIGHT), "white")
    canvas.paste(parts[0], (0, 0))
    canvas.paste(parts[1], (parts[0].width + GAP, 0))
    canvas.quantize(256, Image.Quantize.MAXCOVERAGE).save(TARGET, optimize=True)


if __name__ == "__main__":
    main()
