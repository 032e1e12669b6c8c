"""The passes. Each file holds one; its name is its ``use``."""
