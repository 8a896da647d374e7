"""Transport layers: couplings with given marginals.

The inner problem chooses a nonnegative matrix under constraints on its row and column sums, usually with an entropic
term: optimal transport plans, soft assignments, pooling, distillation and clustering. No layer has landed yet.
"""

__all__: list[str] = []
