"""A smaller model cut out of a larger one: what matters least of it, by activations over data, is left out."""
