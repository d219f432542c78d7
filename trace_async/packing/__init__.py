"""Pack trees into rows in which every shared token stands once, and attend over such rows.

May import `trees`, `method` and `policy`.
"""
