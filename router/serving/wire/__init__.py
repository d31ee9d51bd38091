"""Requests and answers in OpenAI's words, a file for each family of endpoints."""
