"""Chatting with one model or two side by side: the conversation, the terminal, a page in the browser."""
