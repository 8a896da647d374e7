"""Proximal layers: the prox of a function, the projection on a set, and what is built from such steps.

The inner problem is `argmin_z 1/2 ||z - x||^2 + step * g(z)`, or a composite of such steps: proximal operators and
projections, networks that are the prox of a learned prior, Moreau envelopes, and sparse coding. No layer has landed
yet.
"""

__all__: list[str] = []
