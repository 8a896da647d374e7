"""Bilevel layers: hyperparameters, data and weights that are chosen by what training makes of them.

The inner problem is a lower-level training problem; the upper-level objective is differentiated through its solution
by an implicit hypergradient, or followed by methods that take one step on each level. No layer has landed yet.
"""

__all__: list[str] = []
