"""Figures by name: computed, written down, shown while the run goes on and at its end. MLflow is imported when it is used."""
