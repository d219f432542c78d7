"""Function calling over stateful services: generated tasks, and BFCL's."""
