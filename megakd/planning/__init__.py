"""What a run will need, told from its config without ranks: parameters, memory, traffic, time."""
