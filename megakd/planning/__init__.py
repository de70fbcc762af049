"""Memory, layout and time of a run before it is launched: arithmetic on the config, without torch and without ranks."""
