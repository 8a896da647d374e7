"""Forward mode in torch loads rules through the deprecated `torch.jit.script`: once, here, where it fails no test."""

import warnings

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.zeros(()),))
