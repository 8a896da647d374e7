"""Pieces of the example on data hyper-cleaning: data, recipes of all methods, runs, figure."""
