"""What the two examples on dual bounds and their benchmark share: networks, the baseline, exact optima, training."""
