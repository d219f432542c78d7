"""Trees as packed rows in which every shared token stands once, and the attention over them.

May import `trees`, `method` and `policy`.
"""
