"""How an agent is started and ended: in this process, as a command, or as a fork of an interpreter of its own."""
