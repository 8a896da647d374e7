"""Fixed-point layers of papers: the update is part of the layer, its solution is the output."""

__all__: list[str] = []
