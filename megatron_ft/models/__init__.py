"""Model families: reading a Hugging Face config, settings for megatron-core, and the correspondence of weights."""
