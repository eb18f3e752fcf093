"""Policy losses and divergences: pure functions of tensors, one file a family."""
