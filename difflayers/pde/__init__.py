"""PDE layers: fields that satisfy a differential equation by construction.

The inner problem finds the coefficients of a basis for which an equation, its boundary values and its initial values
hold in the least-squares sense, on one domain or on many, or corrects a field so that it obeys a conservation law. No
layer has landed yet.
"""

__all__: list[str] = []
