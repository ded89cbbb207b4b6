"""Adamba for Hugging Face: what an exported repository holds, how it is written, published and read back."""
