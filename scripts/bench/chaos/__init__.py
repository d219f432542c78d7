"""Chaos: a real run is killed, hung, slowed, filled up and stopped at random from a seed, and must go on. What is
counted is what was injected, what survived it, how long it took, and whether the books still add up.
"""
