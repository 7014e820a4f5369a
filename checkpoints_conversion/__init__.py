"""Conversion of checkpoints between Hugging Face's and Megatron's formats: readers, writers, and the commands that use them.

A reader has `full(placed)`, which returns one whole megatron-core tensor with the true vocabulary and no padding. A writer calls it in
the order in which it writes and holds only the file being written. Any reader can be combined with any writer:

    models.hf_source Hugging Face safetensors or .bin     -> full tensors (in megatron_ft: generate reads exports too)
    classic          mp_rank_TT_PPP/model_optim_rng.pt   <-> full tensors
    torch_dist       megatron-core's torch_dist          <-> full tensors
    hf_target        full tensors -> Hugging Face safetensors
"""
