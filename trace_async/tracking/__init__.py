"""Compute figures by name, write them down, and show them live and at the end.

May import `trees`. MLflow is imported only when it is used.
"""
