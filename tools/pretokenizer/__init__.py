"""The pretokenizer: converts chat files to role-labelled shards."""
