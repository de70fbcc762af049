"""Where a step's targets come from: a model that runs, a recording, nothing."""
