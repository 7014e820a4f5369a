"""Chats as tokens: tokenizers, chat formats, role-labelled shards and their manifest, packing and loading.

Chats are tokenized once, decided later: shards hold every token and its role, and what is
trained on is chosen when training starts.
"""
