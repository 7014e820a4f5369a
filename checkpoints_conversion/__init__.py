"""Checkpoints between Hugging Face's layout and Megatron's: readers, writers, and the two commands that join them.

A reader answers `full(placed)`: one whole megatron-core tensor, true vocabulary, no padding. A writer asks for what it
needs, in the order in which it writes, and keeps no more than the file being written. Any reader goes with any writer:

    models.hf_source Hugging Face safetensors or .bin     -> full tensors (in megatron_ft: generate reads exports too)
    classic          mp_rank_TT_PPP/model_optim_rng.pt   <-> full tensors
    torch_dist       megatron-core's torch_dist          <-> full tensors
    hf_target        full tensors -> Hugging Face safetensors
"""
