"""Mathematics with a Python tool in a sandbox: generated problems, and problems from files."""
