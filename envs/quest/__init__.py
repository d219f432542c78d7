"""Quests: generated text worlds of rooms, doors, keys, tools and recipes, ten to thirty actions long."""
