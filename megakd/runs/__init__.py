"""One module per verb of the command line; each reads from top to bottom."""
