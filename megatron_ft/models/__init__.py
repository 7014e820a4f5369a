"""Model families: what a Hugging Face config says, what megatron-core needs to hear, and how the weights correspond."""
