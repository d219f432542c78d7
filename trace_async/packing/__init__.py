"""Trees as packed sequences in which every shared token stands once, and the attention over them. Imports trees, method and policy."""
