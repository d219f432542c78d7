"""Text worlds that others wrote and others measure on: ScienceWorld and TextWorld-Express, both run by Java."""
