"""What the student writes itself and learns from: who writes it, what is kept of it, and the batches made of it."""
