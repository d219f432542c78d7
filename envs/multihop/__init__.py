"""Multi-hop question answering with search: generated worlds, and questions from files."""
