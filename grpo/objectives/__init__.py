"""Objectives: pure functions of tensors. `online` puts one together of a loss of `policy` and a divergence."""
