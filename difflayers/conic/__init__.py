"""Conic layers: quadratic and conic programs as layers, and bounds from their duals.

The inner problem is a convex program over cones. A solution is differentiated through its optimality conditions; an
optimal value, or a bound from dual completion, by the envelope theorem. A bridge to CVXPY problems belongs here too.
No layer has landed yet.
"""

__all__: list[str] = []
