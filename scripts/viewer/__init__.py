"""A run's rollout trees and curves, as data for the viewer's page."""
