"""The Python API, in RLlib's habits: a config that builds an algorithm. Stands on top of all other packages."""
