"""Tools of Model Context Protocol servers as an environment."""
