"""Chats as tokens: tokenizers, chat formats, role-labelled shards and their manifest, packing and loading.

Chats are tokenized once. Shards hold every token and its role; the tokens to train on are chosen when training starts.
"""
