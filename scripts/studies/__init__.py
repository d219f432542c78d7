"""Studies: questions about the method that are answered once, with figures."""
