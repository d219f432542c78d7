"""Figures by name: computed, written down, shown live and at the end. May import `trees`; MLflow only when used."""
