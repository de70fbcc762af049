"""From a config to live objects: what training, recording, evaluation and generation stand on."""
