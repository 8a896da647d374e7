"""ReLU layers: two-layer ReLU networks trained to global optimality inside a model.

The inner problem is the training of a two-layer ReLU network with weight decay, written as the equivalent convex
program over activation patterns, so that the trained network is a function of its training set that can be
differentiated. No layer has landed yet.
"""

__all__: list[str] = []
