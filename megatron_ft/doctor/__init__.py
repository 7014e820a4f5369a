"""`megatron-ft doctor --check`: small real runs that show whether this machine trains as it should. Each check is a function."""
