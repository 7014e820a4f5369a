"""`megatron-ft doctor --check`: small real runs that test training on this machine. Each check is a function."""
