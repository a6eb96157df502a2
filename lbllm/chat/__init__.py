"""Chatting: answers of one or two models, their comparison, votes, and the showcase."""
