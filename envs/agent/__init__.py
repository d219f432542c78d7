"""Any agent as it is: a program that asks a model over HTTP, trained through a recording endpoint."""
