"""Commands of other tools as commands of this project: `megatron-ft import-command`."""
