"""The pretokenizer: chat files in, role-labelled shards out."""
