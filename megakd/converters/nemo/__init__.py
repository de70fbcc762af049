"""`.nemo` archives of NeMo 1: read, written, and what they compute."""
