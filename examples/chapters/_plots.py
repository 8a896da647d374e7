"""One look for the figures of all chapters."""

from pathlib import Path

INK, BLUE, ORANGE, GREY = "#1c2430", "#1f5fa8", "#d9822b", "#8a94a0"


def axes(*, wide: bool = False, height: float = 2.6):
    """A figure with one panel, without a box: half of the page's width, or all of it. Legible on a phone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 9.5,
            "axes.titlesize": 10,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
        }
    )
    return plt.subplots(figsize=(5.2 if wide else 3.8, height), layout="constrained")


def save(figure, path: Path) -> Path:
    """Writes the figure and frees it."""
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=220)
    plt.close(figure)
    return path
