"""Hugging Face folders: read, written, and what transformers computes from them."""
